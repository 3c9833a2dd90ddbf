"""The parameters for loading a model, as one picklable object that can be sent to a subprocess."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from embeddings_mcp.models import CardOverride, ModelCard, Precision

if TYPE_CHECKING:
    from embeddings_mcp.embedders.local.runtime.in_process import InProcessModel


@dataclass(frozen=True, slots=True)
class LoadParameters:
    """Parameters for loading a model; see `load_encoder`.

    Attributes:
        name: name of the model.
        folder: its checkpoint.
        builtin_card: the built-in card of that name, if any.
        user_card: the user's card, if any.
        devices: devices to load it on; several devices share the work.
        precision: number format.
        cuda_graphs: whether to capture CUDA graphs of passes over few tokens.
    """

    name: str
    folder: Path
    builtin_card: ModelCard | None
    user_card: CardOverride | None
    devices: tuple[str, ...]
    precision: Precision
    cuda_graphs: bool

    def load(self) -> InProcessModel:
        """Load the model into this process.

        Raises:
            ImportError: a required package is not installed.
            CheckpointInvalid: something in the folder is missing, damaged or not supported.
            ModelUnavailable: a device cannot be used on this machine, or does not support the precision.
        """
        _leave_deleted_working_directory()
        from embeddings_mcp.embedders.local.encoder import load_encoder
        from embeddings_mcp.embedders.local.runtime.in_process import InProcessModel

        encoders = [
            load_encoder(
                self.name,
                self.folder,
                builtin_card=self.builtin_card,
                user_card=self.user_card,
                device=device,
                precision=self.precision,
                cuda_graphs=self.cuda_graphs,
            )
            for device in self.devices
        ]
        return InProcessModel(encoders)


def _leave_deleted_working_directory() -> None:
    """Change to the root if the working directory was deleted.

    MKL would not find its own libraries there, and abort the process.
    """
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError:
        os.chdir(os.sep)

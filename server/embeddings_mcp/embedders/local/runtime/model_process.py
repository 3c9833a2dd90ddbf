"""A model in a subprocess: the server keeps serving while the model computes, and if its process crashes.

A thread that computes needs the GIL between any two kernels, and waits for it while other threads of its process serve
requests. On two cores that costs a fifth of the throughput. And whatever kills the model (the OOM killer, a driver
fault) kills only the subprocess, which is restarted for the next request.

The server has one connection to the subprocess for every batch that may be in flight. On each, it sends a batch and
receives its vectors. `process_main` is the other end; both ends are the same program, and exchange pickled messages.
Texts are tokenized in the server.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from embeddings_mcp import errors
from embeddings_mcp.embedders.cores import usable_cores
from embeddings_mcp.embedders.local.checkpoint import Checkpoint
from embeddings_mcp.embedders.local.inputs import InputTokenizer, Row
from embeddings_mcp.embedders.local.runtime.load_parameters import LoadParameters
from embeddings_mcp.embedders.local.runtime.loaded_model import ModelInfo
from embeddings_mcp.errors import EmbeddingsError, ModelUnavailable
from embeddings_mcp.vectors import FloatMatrix, SparseVector

_logger = logging.getLogger(__name__)

_PROGRAM = "from embeddings_mcp.embedders.local.runtime.process_main import main; main()"

_SECRET_NAME = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL)S?($|_)", re.IGNORECASE)
"""Environment variables whose names match hold credentials, and are not passed on."""

_KILL_TIMEOUT_SECONDS = 5
"""Seconds to wait for the process to exit after it was killed, or after it closed a connection."""


@dataclass(frozen=True, slots=True)
class StartParameters:
    """Start-up parameters of the model process.

    Attributes:
        load_parameters: the model to load.
        connections: file descriptors of the connections for batches.
        log: file descriptor of the connection for log records.
        workers: number of batches computed concurrently; None for the model's own choice.
        cores: processor cores shared by all workers.
    """

    load_parameters: LoadParameters
    connections: Sequence[int]
    log: int
    workers: int | None
    cores: int


@dataclass(frozen=True, slots=True)
class Ready:
    """Message of the process once the model is loaded: its properties, and the number of workers."""

    info: ModelInfo
    workers: int


@dataclass(frozen=True, slots=True)
class RemoteError:
    """An exception that was raised in the model process: the name of its class, and its message."""

    kind: str
    message: str

    @classmethod
    def from_exception(cls, error: BaseException) -> RemoteError:
        """Describe an exception, in the model process."""
        return cls(type(error).__name__, error.message if isinstance(error, EmbeddingsError) else str(error))

    def to_exception(self) -> Exception:
        """Recreate the exception, in the server."""
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, ModelUnavailable):
            return kind(self.message)
        if self.kind in {"ImportError", "ModuleNotFoundError"}:
            return ImportError(self.message)
        return RuntimeError(f"{self.kind}: {self.message}")


class ModelProcess:
    """A model that computes in a subprocess, on systems whose child processes inherit file descriptors (not Windows).

    Args:
        load_parameters: the model to load.
        checkpoint: its checkpoint, already read.
        workers: number of batches computed concurrently; None for the model's own choice.

    Attributes:
        info: see `LoadedModel`.

    Raises:
        ImportError: a required package is not installed.
        ModelUnavailable: `LoadParameters.load` raised it (CheckpointInvalid included), or the process ended while
            loading.
    """

    def __init__(self, load_parameters: LoadParameters, checkpoint: Checkpoint, *, workers: int | None) -> None:
        cores = usable_cores()
        self._name = load_parameters.name
        self._closed = False
        self._killed = False  # whether `close` killed the process; False if it had already exited
        self._idle_connections: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        # Undone explicitly: the traceback of an error refers to the connections, and may live on; see `gc_paused`.
        with contextlib.ExitStack() as on_error:

            def open_pipe(*, duplex: bool = True) -> tuple[Connection, Connection]:
                here, there = Pipe(duplex)
                on_error.callback(here.close)
                on_error.callback(there.close)
                return here, there

            connections = workers or max(cores, 2 * len(load_parameters.devices))
            local_ends, remote_ends = zip(*(open_pipe() for _ in range(connections)), strict=True)
            log, remote_log = open_pipe(duplex=False)
            self._process = _start_process(
                StartParameters(
                    load_parameters, [end.fileno() for end in remote_ends], remote_log.fileno(), workers, cores
                )
            )
            for end in (*remote_ends, remote_log):
                end.close()
            self._log_thread = threading.Thread(
                target=self._forward_log, args=(log,), name=f"log of {self._name}", daemon=True
            )
            self._log_thread.start()
            on_error.callback(self.close)
            ready: Ready = self._receive(local_ends[0])
            self.info = info = ready.info
            self.tokenize = InputTokenizer(checkpoint, info.card, vocabulary_size=info.vocabulary_size).tokenize
            on_error.pop_all()
        for connection in local_ends[: ready.workers]:
            self._idle_connections.put(connection)
        self._workers = ready.workers

    @property
    def alive(self) -> bool:
        """Whether the process is still running."""
        return self._process.poll() is None

    def workers(self, _cores: int) -> int:
        """See `LoadedModel.workers`; the number was decided in the subprocess."""
        return self._workers

    def set_thread_cores(self, cores: int) -> None:
        """See `LoadedModel.set_thread_cores`; does nothing, since the calling thread only waits for the subprocess."""

    def forward(self, rows: Sequence[Row], skip: int) -> FloatMatrix:
        """See `LoadedModel.forward`."""
        vectors: FloatMatrix = self._call("forward", rows, skip)
        return vectors

    def forward_all(self, rows: Sequence[Row], skip: int) -> tuple[FloatMatrix, list[SparseVector], list[FloatMatrix]]:
        """See `LoadedModel.forward_all`."""
        result: tuple[FloatMatrix, list[SparseVector], list[FloatMatrix]] = self._call("forward_all", rows, skip)
        return result

    def close(self) -> None:
        """Kill the process, even while it computes. What it has logged so far is still forwarded."""
        self._closed = True
        self._killed |= self.alive
        self._process.kill()
        self._process.wait(_KILL_TIMEOUT_SECONDS)
        self._log_thread.join(_KILL_TIMEOUT_SECONDS)
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._close_idle_connections()

    def _close_idle_connections(self) -> None:
        """Close the connections that are not in use; a later call that takes one of them fails with the exit reason."""
        for _ in range(self._idle_connections.qsize()):
            with contextlib.suppress(queue.Empty):  # another thread took it, and closes it when it has finished
                connection = self._idle_connections.get_nowait()
                connection.close()
                self._idle_connections.put(connection)

    def _call(self, method: str, rows: Sequence[Row], skip: int) -> Any:  # noqa: ANN401 - the method's result
        connection = self._idle_connections.get()
        try:
            try:
                connection.send((method, rows, skip))
            except OSError as error:
                raise self._exit_error() from error
            return self._receive(connection)
        finally:
            self._idle_connections.put(connection)
            if self._closed:
                self._close_idle_connections()

    def _receive(self, connection: Connection) -> Any:  # noqa: ANN401 - any message
        """Return the next message on a connection; raise the exception if it is a `RemoteError`."""
        try:
            message = connection.recv()
        except (EOFError, OSError) as error:
            raise self._exit_error() from error
        if isinstance(message, RemoteError):
            raise message.to_exception()
        return message

    def _exit_error(self) -> ModelUnavailable:
        """Return the error for requests that were in flight when the process ended."""
        return ModelUnavailable(
            f"the process that runs {self._name} {self._exit_reason()} during this request; the next request starts it "
            "again"
        )

    def _exit_reason(self) -> str:
        """Describe how the process ended."""
        try:
            code = self._process.wait(_KILL_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return "stopped responding"
        if code >= 0:
            return f"ended with exit code {code}"
        return f"was ended by {signal.Signals(-code).name}"

    def _forward_log(self, log: Connection) -> None:
        """Log the records of the process here, and finally its exit, unless `close` killed it."""
        with log, contextlib.suppress(EOFError, OSError):
            while True:
                name, level, message = log.recv()
                logging.getLogger(name).log(level, "%s", message)
        if not self._killed:
            _logger.error("The process that runs %s %s.", self._name, self._exit_reason())


def _start_process(parameters: StartParameters) -> subprocess.Popen[bytes]:
    """Start the process and send it its parameters.

    Its stdin stays open, without further input, as long as this process lives: EOF tells it that the server has ended.
    """
    process = subprocess.Popen(  # noqa: S603 - this interpreter, and our own program
        [sys.executable, "-P", "-c", _PROGRAM],
        stdin=subprocess.PIPE,
        stdout=2,  # to stderr: the server's stdout may carry a protocol
        pass_fds=[*parameters.connections, parameters.log],
        # A Ctrl-C in the terminal is for the server only: it has to finish requests first.
        start_new_session=True,
        env=_environment(),
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has already exited: receiving its first message reports that
        process.stdin.write(pickle.dumps(parameters))
        process.stdin.flush()
    return process


def _environment() -> dict[str, str]:
    """Return this process's environment without our settings and without credentials.

    The model process reads files from untrusted sources, and needs neither.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("EMBEDDINGS_MCP_") and not _SECRET_NAME.search(name)
    }
    return {**inherited, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}

"""A model in a process of its own: the server goes on while it computes, and when it ends.

A thread that computes needs Python's interpreter lock between any two steps, and waits for it while another thread of
its process serves callers. On two cores that costs a fifth of what both could do. And whatever ends the model (a system
that is out of memory, a fault in a driver) ends one process, which is started again for the next request.

The server has as many connections to the process as batches run there at the same time. On each, a batch goes there
and its vectors come back. The other end is `process_main`; both are one program, and what they send each other is
pickled. Texts are tokenized here.
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
from embeddings_mcp.embedders.local.running.loaded import Facts
from embeddings_mcp.embedders.local.running.loading import Loading
from embeddings_mcp.errors import EmbeddingsError, ModelUnavailable
from embeddings_mcp.vectors import FloatMatrix, SparseVector

_logger = logging.getLogger(__name__)

_PROGRAM = "from embeddings_mcp.embedders.local.running.process_main import main; main()"

_SECRET = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL)S?($|_)", re.IGNORECASE)
"""What names of environment variables hold that are nobody else's business."""

_SECONDS = 5
"""Longest that the system may take to end a process that it was told to kill."""


@dataclass(frozen=True, slots=True)
class Order:
    """What the process is told when it starts.

    Attributes:
        loading: the model.
        connections: file descriptors of the connections for batches.
        log: that of the connection for log records.
        workers: how many batches run at the same time; None for as many as the model finds good.
        cores: processor cores for all of them together.
    """

    loading: Loading
    connections: Sequence[int]
    log: int
    workers: int | None
    cores: int


@dataclass(frozen=True, slots=True)
class Ready:
    """What the process says once the model is loaded: what is known of it, and how many batches run at a time."""

    facts: Facts
    workers: int


@dataclass(frozen=True, slots=True)
class Failed:
    """What was raised there: the name of its class, and its message."""

    kind: str
    message: str

    @classmethod
    def by(cls, error: BaseException) -> Failed:
        """What is to be told of an error."""
        return cls(type(error).__name__, error.message if isinstance(error, EmbeddingsError) else str(error))

    def error(self) -> Exception:
        """The same error, here."""
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, ModelUnavailable):
            return kind(self.message)
        if self.kind in {"ImportError", "ModuleNotFoundError"}:
            return ImportError(self.message)
        return RuntimeError(f"{self.kind}: {self.message}")


class ModelProcess:
    """A model that computes in a process of its own, on systems that hand files on to their children (not Windows).

    Args:
        loading: the model.
        checkpoint: the same, as it was read.
        workers: how many batches run at the same time; None for as many as it finds good.

    Attributes:
        facts: see `LoadedModel`.

    Raises:
        ImportError: a package that it needs is not installed.
        ModelUnavailable: it cannot be loaded, as `Loading.load`; or its process ended meanwhile.
    """

    def __init__(self, loading: Loading, checkpoint: Checkpoint, *, workers: int | None) -> None:
        cores = usable_cores()
        ours, theirs = zip(*(Pipe() for _ in range(workers or max(cores, 2 * len(loading.devices)))), strict=True)
        log, their_log = Pipe(duplex=False)
        order = Order(loading, [end.fileno() for end in theirs], their_log.fileno(), workers, cores)
        self._name = loading.name
        self._closed = False
        self._killed = False  # by `close`; what had ended before it did so by itself
        self._free: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._process = _start(order)
        for end in (*theirs, their_log):
            end.close()
        self._log = threading.Thread(target=self._listen, args=(log,), name=f"log of {self._name}", daemon=True)
        self._log.start()
        try:
            ready: Ready = self._answer(ours[0])
            self.facts = facts = ready.facts
            self.tokenize = InputTokenizer(checkpoint, facts.card, vocabulary=facts.vocabulary).tokenize
        except BaseException:
            self.close()
            for end in ours:  # which the error holds, and it may stay for good, see `gc_paused`
                end.close()
            raise
        for connection in ours[: ready.workers]:
            self._free.put(connection)
        self._workers = ready.workers

    @property
    def alive(self) -> bool:
        """Whether its process has not ended."""
        return self._process.poll() is None

    def workers(self, _cores: int) -> int:
        """See `LoadedModel.workers`; there it was decided."""
        return self._workers

    def compute_on(self, cores: int) -> None:
        """See `LoadedModel.compute_on`: the calling thread only waits."""

    def forward(self, rows: Sequence[Row], skip: int) -> FloatMatrix:
        """See `LoadedModel.forward`."""
        made: FloatMatrix = self._ask("forward", rows, skip)
        return made

    def forward_all(self, rows: Sequence[Row], skip: int) -> tuple[FloatMatrix, list[SparseVector], list[FloatMatrix]]:
        """See `LoadedModel.forward_all`."""
        made: tuple[FloatMatrix, list[SparseVector], list[FloatMatrix]] = self._ask("forward_all", rows, skip)
        return made

    def close(self) -> None:
        """End the process, whatever it is doing; all that it said is logged then."""
        self._closed = True
        self._killed |= self.alive
        self._process.kill()
        self._process.wait(_SECONDS)
        self._log.join(_SECONDS)
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._close_free()

    def _close_free(self) -> None:
        """Close the connections that nobody uses; who asks by one of them is told of the end."""
        for _ in range(self._free.qsize()):
            with contextlib.suppress(queue.Empty):  # somebody was faster, and comes here after that
                connection = self._free.get_nowait()
                connection.close()
                self._free.put(connection)

    def _ask(self, method: str, rows: Sequence[Row], skip: int) -> Any:  # noqa: ANN401 - what the method makes
        connection = self._free.get()
        try:
            try:
                connection.send((method, rows, skip))
            except OSError as error:
                raise self._ended() from error
            return self._answer(connection)
        finally:
            self._free.put(connection)
            if self._closed:
                self._close_free()

    def _answer(self, connection: Connection) -> Any:  # noqa: ANN401 - whatever was asked for
        """What the process answers next on a connection; raises what was raised there."""
        try:
            answer = connection.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if isinstance(answer, Failed):
            raise answer.error()
        return answer

    def _ended(self) -> ModelUnavailable:
        """What its end is for those who asked it."""
        return ModelUnavailable(
            f"the process that runs {self._name} {self._end()} while this was computed; the next request starts it "
            "again"
        )

    def _end(self) -> str:
        """How the process ended."""
        try:
            code = self._process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return "no longer answered"
        if code >= 0:
            return f"ended with exit code {code}"
        return f"was ended by {signal.Signals(-code).name}"

    def _listen(self, log: Connection) -> None:
        """Log what is logged there, and its end if `close` did not bring that about."""
        with log, contextlib.suppress(EOFError, OSError):
            while True:
                name, level, message = log.recv()
                logging.getLogger(name).log(level, "%s", message)
        if not self._killed:
            _logger.error("The process that runs %s %s.", self._name, self._end())


def _start(order: Order) -> subprocess.Popen[bytes]:
    """Start the process; its stdin is open, and nothing more will come, for as long as this process lives."""
    process = subprocess.Popen(  # noqa: S603 - this same Python, and a program of ours
        [sys.executable, "-P", "-c", _PROGRAM],
        stdin=subprocess.PIPE,
        stdout=2,  # stdout may be a protocol's
        pass_fds=[*order.connections, order.log],
        # A Ctrl-C in the terminal is the server's: it has requests to end first.
        start_new_session=True,
        env=_environment(),
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended already: whoever waits for its answer will hear of it
        process.stdin.write(pickle.dumps(order))
        process.stdin.flush()
    return process


def _environment() -> dict[str, str]:
    """This process's, without what a model has no use for, and without keys, since it reads files of strangers."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("EMBEDDINGS_MCP_") and not _SECRET.search(name)
    }
    return {**kept, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}

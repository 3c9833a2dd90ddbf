"""The other end of `model_process`: loads a model, and computes what it is sent until the server ends."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from embeddings_mcp.embedders.local.running.model_process import Failed, Order, Ready
from embeddings_mcp.gc_pause import gc_paused

if TYPE_CHECKING:
    from embeddings_mcp.embedders.local.running.in_process import InProcessModel

_logger = logging.getLogger(__name__)


def main() -> None:
    """Do what the order says that comes by stdin."""
    # Whoever stops the server may stop this as well; the server still has requests to answer, and ends this itself.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    order: Order = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the process that started this one
    server = threading.Thread(target=_end_with_the_server, name="server")
    server.start()
    logging.basicConfig(level=logging.INFO, handlers=[_ToServer(Connection(order.log, readable=False))], force=True)
    with _whole():
        connections = [Connection(file) for file in order.connections]
        try:
            with gc_paused():
                model = order.loading.load()
        except Exception as error:  # noqa: BLE001 - it is raised in the server, which then ends this process
            connections[0].send(Failed.by(error))
        else:
            _compute_all(model, connections, order)
    server.join()


def _compute_all(model: InProcessModel, connections: Sequence[Connection], order: Order) -> None:
    """Compute what comes by the connections, on a thread for each batch that is to run at the same time."""
    workers = order.workers or min(model.workers(order.cores), len(connections))
    for connection in connections[:workers]:
        cores = max(1, order.cores // workers)
        threading.Thread(target=_compute, args=(model, connection, cores), name="encode", daemon=True).start()
    connections[0].send(Ready(model.facts, workers))


def _compute(model: InProcessModel, connection: Connection, cores: int) -> None:
    """Make of every batch that comes what is to be made of it."""
    with _whole():
        model.compute_on(cores)
        methods = {"forward": model.forward, "forward_all": model.forward_all}
        while True:
            try:
                method, rows, skip = connection.recv()
            except (EOFError, OSError):  # the server has ended
                return
            try:
                connection.send(methods[method](rows, skip))
            except Exception as error:  # of making it, or of pickling it, which is done before any of it is sent
                _logger.exception("a batch failed")
                connection.send(Failed.by(error))


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """End the process with the thread that ends by an error: of the one who waits for it the server would not hear."""
    try:
        yield
    except BaseException:  # noqa: BLE001 - the process ends
        try:
            _logger.exception("the process that runs the model cannot go on")
        finally:
            os._exit(1)


def _end_with_the_server() -> None:
    """Nothing more comes by stdin, and its end comes with that of the server, however it ends."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(0)


class _ToServer(logging.Handler):
    """Sends log records to the server, which has been told how to write them, and which of them."""

    def __init__(self, log: Connection) -> None:
        super().__init__()
        self._log = log
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Send one; a traceback follows its message."""
        try:
            self._log.send((record.name, record.levelno, self.format(record)))
        except Exception:  # noqa: BLE001 - of a faulty call of a package's, say: as all handlers of logging do
            self.handleError(record)

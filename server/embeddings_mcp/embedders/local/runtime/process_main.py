"""The program of the model process: load a model, and compute batches for the server until the server ends."""

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

from embeddings_mcp.embedders.local.runtime.model_process import Ready, RemoteError, StartParameters
from embeddings_mcp.gc_pause import gc_paused

if TYPE_CHECKING:
    from embeddings_mcp.embedders.local.runtime.in_process import InProcessModel

_logger = logging.getLogger(__name__)


def main() -> None:
    """Read the start-up parameters from stdin, load the model, and start the workers."""
    # A signal to stop the server may be sent to this process too. The server still has requests to finish, and kills
    # this process afterwards.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    parameters: StartParameters = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the process that started this one
    watcher = threading.Thread(target=_exit_with_server, name="server")
    watcher.start()
    log = Connection(parameters.log, readable=False)
    logging.basicConfig(level=logging.INFO, handlers=[_ServerLogHandler(log)], force=True)
    with _exit_process_on_error():
        connections = [Connection(descriptor) for descriptor in parameters.connections]
        try:
            with gc_paused():
                model = parameters.load_parameters.load()
        except Exception as error:  # noqa: BLE001 - it is raised in the server, which then kills this process
            connections[0].send(RemoteError.from_exception(error))
        else:
            _start_workers(model, connections, parameters)
    watcher.join()


def _start_workers(model: InProcessModel, connections: Sequence[Connection], parameters: StartParameters) -> None:
    """Start one worker thread per concurrent batch, each with its own connection, and tell the server."""
    workers = parameters.workers or min(model.workers(parameters.cores), len(connections))
    cores = max(1, parameters.cores // workers)
    for connection in connections[:workers]:
        threading.Thread(target=_serve, args=(model, connection, cores), name="encode", daemon=True).start()
    connections[0].send(Ready(model.info, workers))


def _serve(model: InProcessModel, connection: Connection, cores: int) -> None:
    """Compute the batches that arrive on a connection, and send back the results."""
    with _exit_process_on_error():
        model.set_thread_cores(cores)
        methods = {"forward": model.forward, "forward_all": model.forward_all}
        while True:
            try:
                method, rows, skip = connection.recv()
            except (EOFError, OSError):  # the server has ended
                return
            try:
                connection.send(methods[method](rows, skip))
            except Exception as error:  # from computing, or from pickling, which precedes any output to the connection
                _logger.exception("a batch failed")
                connection.send(RemoteError.from_exception(error))


@contextlib.contextmanager
def _exit_process_on_error() -> Iterator[None]:
    """End the process if the thread fails: the server would otherwise wait for its response forever."""
    try:
        yield
    except BaseException:  # noqa: BLE001 - the process exits
        try:
            _logger.exception("the process that runs the model cannot continue")
        finally:
            os._exit(1)


def _exit_with_server() -> None:
    """Exit when stdin is closed: nothing more is sent on it, so EOF means that the server has ended, for any reason."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(0)


class _ServerLogHandler(logging.Handler):
    """Sends log records to the server, whose logging configuration filters and formats them."""

    def __init__(self, log: Connection) -> None:
        super().__init__()
        self._log = log
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record; its message includes the traceback."""
        try:
            self._log.send((record.name, record.levelno, self.format(record)))
        except Exception:  # noqa: BLE001 - for example a third party's faulty logging call; every logging handler does so
            self.handleError(record)

"""Our server, with CPU time accounting: ``python -m benchmarks.accounting FILE ARGUMENT...``.

On SIGUSR1 it appends a line to the file: the CPU seconds used so far, and how many of them were spent on tokenizing and
encoding. The difference is the cost of serving.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from embeddings_mcp.embedders.local.encoder import Encoder
from embeddings_mcp.embedders.local.tokenizer import Tokenizer
from embeddings_mcp.faces.cli import commands

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_TIMEOUT_SECONDS = 30


class _Account:
    """CPU seconds spent in some functions, on all threads."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._lock = threading.Lock()

    def timed(self, function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        """Wrap a function so that its CPU time is counted; not a generator, since calling one does no work yet."""
        assert not inspect.isgeneratorfunction(function), f"the work of generator {function} would not be counted"

        def wrapper(*arguments: _Arguments.args, **keywords: _Arguments.kwargs) -> _Result:
            started = time.thread_time()
            try:
                return function(*arguments, **keywords)
            finally:
                with self._lock:
                    self.seconds += time.thread_time() - started

        return wrapper


def main(path: str) -> None:
    """Run the server."""
    account = _Account()
    # mypy warns about replaced methods, which is the purpose here.
    Tokenizer.encode = account.timed(Tokenizer.encode)  # type: ignore[method-assign]
    Encoder.forward = account.timed(Encoder.forward)  # type: ignore[method-assign]

    def report(_signal: int, _frame: object) -> None:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{time.process_time()} {account.seconds}\n")

    signal.signal(signal.SIGUSR1, report)
    commands.main()


def read(pid: int, path: Path) -> tuple[float, float]:
    """CPU seconds that such a server has used so far: in total, and on tokenizing and encoding."""
    size = path.stat().st_size if path.exists() else 0
    os.kill(pid, signal.SIGUSR1)
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if path.exists() and path.stat().st_size > size and (text := path.read_text(encoding="utf-8")).endswith("\n"):
            total, computing = text.splitlines()[-1].split()
            return float(total), float(computing)
        time.sleep(0.01)
    raise TimeoutError(f"process {pid} did not report")


if __name__ == "__main__":
    main(sys.argv.pop(1))

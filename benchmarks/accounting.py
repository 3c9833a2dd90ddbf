"""Our server, keeping account of what it computes: ``python -m benchmarks.accounting FILE ARGUMENT...``.

On SIGUSR1 it appends a line to the file: the processor seconds it has spent so far, those of them that went into
tokenizing and encoding. The rest is what serving costs.
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

_SECONDS = 30


class _Account:
    """Processor seconds spent within some functions, on whatever thread."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._lock = threading.Lock()

    def of(self, function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        """The function, counted; no generator, which has done nothing yet when it has been called."""
        assert not inspect.isgeneratorfunction(function), f"{function} would be counted as nothing"

        def counted(*arguments: _Arguments.args, **keywords: _Arguments.kwargs) -> _Result:
            started = time.thread_time()
            try:
                return function(*arguments, **keywords)
            finally:
                with self._lock:
                    self.seconds += time.thread_time() - started

        return counted


def main(path: str) -> None:
    """Serve."""
    account = _Account()
    # To replace a method is what mypy warns of, and what is wanted here.
    Tokenizer.encode = account.of(Tokenizer.encode)  # type: ignore[method-assign]
    Encoder.forward = account.of(Encoder.forward)  # type: ignore[method-assign]

    def report(_signal: int, _frame: object) -> None:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{time.process_time()} {account.seconds}\n")

    signal.signal(signal.SIGUSR1, report)
    commands.main()


def read(pid: int, path: Path) -> tuple[float, float]:
    """What such a server has spent so far, and what of it on tokenizing and encoding."""
    size = path.stat().st_size if path.exists() else 0
    os.kill(pid, signal.SIGUSR1)
    ends = time.monotonic() + _SECONDS
    while time.monotonic() < ends:
        if path.exists() and path.stat().st_size > size and (text := path.read_text(encoding="utf-8")).endswith("\n"):
            total, computing = text.splitlines()[-1].split()
            return float(total), float(computing)
        time.sleep(0.01)
    raise TimeoutError(f"process {pid} did not report")


if __name__ == "__main__":
    main(sys.argv.pop(1))

"""HTTP servers to be asked: ours and infinity-emb's, each a process of its own as its users start it."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contest import PEERS_PYTHON, ROOT, ContenderMissing, environment
from benchmarks.machine import cores

_SECONDS = 120
"""Longest that a server may take until it can answer."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs.

    Attributes:
        name: what it is called in tables.
        url: where embeddings are asked for.
        model: what its model is called.
        pid: its process.
    """

    name: str
    url: str
    model: str
    pid: int


@contextlib.contextmanager
def our_server(
    *, command: Sequence[str] = ("-m", "embeddings_mcp"), settings: Mapping[str, str] | None = None, name: str = "ours"
) -> Iterator[Server]:
    """Our server, without a cache: what is measured is the work.

    Args:
        command: what Python runs, up to our own command line's arguments.
        settings: environment variables.
        name: what it is called in tables.
    """
    full = [sys.executable, *command, "serve", "--transport", "http", "--port", "0"]
    with _process(full, {"EMBEDDINGS_MCP_CACHE": "off", **(settings or {})}) as started:
        found = None
        while found is None:
            found = re.search(r"REST at (\S+)/v1", started.next_line())
        started.wait_for(f"{found[1]}/v1/health/ready")
        yield Server(name, f"{found[1]}/v1/embeddings", "default", started.pid)


@contextlib.contextmanager
def infinity_server(folder: Path, engine: str) -> Iterator[Server]:
    """infinity-emb's server.

    Args:
        folder: the model; for the engine ``optimum`` as ONNX.
        engine: ``torch`` or ``optimum``.

    Raises:
        ContenderMissing: it is not installed, or does not start.
    """
    program = PEERS_PYTHON.with_name("infinity_emb")
    if not program.exists():
        raise ContenderMissing(f"infinity-emb: no {program}; `make bench-peers` makes it")
    port = _free_port()
    full = [str(program), "v2", "--model-id", str(folder), "--served-model-name", "minilm", "--engine", engine]
    full += ["--device", "cpu", "--onnx-do-not-prefer-quantized", "--log-level", "error"]
    full += ["--host", "127.0.0.1", "--port", str(port)]
    with _process(full, {}) as started:
        started.wait_for(f"http://127.0.0.1:{port}/health")
        yield Server(f"infinity-emb {engine}", f"http://127.0.0.1:{port}/embeddings", "minilm", started.pid)


class _Started:
    """A process that is to serve; it is ended unless it answers in time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        self.pid = process.pid
        self._process = process
        self._stderr = process.stderr
        self._said = [""]
        self._reader = threading.Thread(target=self._keep_reading, daemon=True)
        self._deadline = threading.Timer(_SECONDS, process.kill)
        self._deadline.start()

    def next_line(self) -> str:
        """The next that it writes to stderr."""
        line = self._stderr.readline()
        if not line:
            raise self._missing()
        self._said.append(line.strip())
        return line

    def wait_for(self, url: str) -> None:
        """Return once this address answers; from then on what it writes is read and kept."""
        self._reader.start()
        while self._process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=_SECONDS):  # noqa: S310 - loopback
                self._deadline.cancel()
                return
            time.sleep(0.1)
        raise self._missing()

    def end(self) -> None:
        """Kill it."""
        self._deadline.cancel()
        self._process.kill()
        if self._reader.is_alive():
            self._reader.join()

    def _keep_reading(self) -> None:
        self._said.extend(line.strip() for line in self._stderr if line.strip())

    def _missing(self) -> ContenderMissing:
        return ContenderMissing(f"{Path(str(self._process.args[0])).name}: {self._said[-1] or 'it said nothing'}")  # type: ignore[index]


@contextlib.contextmanager
def _process(command: Sequence[str], settings: Mapping[str, str]) -> Iterator[_Started]:
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**environment(cores()), **settings},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        started = _Started(process)
        try:
            yield started
        finally:
            started.end()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

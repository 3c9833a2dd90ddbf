"""HTTP servers under test: ours and infinity-emb's, each started as a process in the way its users do."""

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

_TIMEOUT_SECONDS = 120
"""Timeout for a server to become ready."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server.

    Attributes:
        name: in tables.
        url: of its embeddings route.
        model: name of its model.
        pid: of its process.
    """

    name: str
    url: str
    model: str
    pid: int


@contextlib.contextmanager
def our_server(
    *, command: Sequence[str] = ("-m", "embeddings_mcp"), settings: Mapping[str, str] | None = None, name: str = "ours"
) -> Iterator[Server]:
    """Our server, without a cache, so that every request is computed.

    Args:
        command: arguments of Python, up to those of our own command line.
        settings: environment variables.
        name: in tables.
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
        folder: of the model; for the engine ``optimum`` in ONNX format.
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
    """A server process that is starting; it is killed unless it is ready in time."""

    def __init__(self, process: subprocess.Popen[str], program: str) -> None:
        assert process.stderr is not None
        self.pid = process.pid
        self._program = program
        self._process = process
        self._stderr = process.stderr
        self._stderr_lines = [""]
        self._reader = threading.Thread(target=self._keep_reading, daemon=True)
        self._deadline = threading.Timer(_TIMEOUT_SECONDS, process.kill)
        self._deadline.start()

    def next_line(self) -> str:
        """The next line that it writes to stderr."""
        line = self._stderr.readline()
        if not line:
            raise self._missing()
        self._stderr_lines.append(line.strip())
        return line

    def wait_for(self, url: str) -> None:
        """Return once this address responds; its stderr is read in the background from now on."""
        self._reader.start()
        while self._process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS):  # noqa: S310 - loopback
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
        self._stderr_lines.extend(line.strip() for line in self._stderr if line.strip())

    def _missing(self) -> ContenderMissing:
        return ContenderMissing(f"{Path(self._program).name}: {self._stderr_lines[-1] or 'no output'}")


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
        started = _Started(process, command[0])
        try:
            yield started
        finally:
            started.end()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

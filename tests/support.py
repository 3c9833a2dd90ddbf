"""Helpers shared by several test modules."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import numpy as np
import uvicorn
from starlette.types import ASGIApp

from embeddings_mcp.embedders.base import Embedder, Embeddings, OnProgress, OnRows
from embeddings_mcp.errors import InputTooLong
from embeddings_mcp.faces.http.app import create_app
from embeddings_mcp.faces.http.connection import Connection
from embeddings_mcp.faces.mcp.server import build_mcp_server
from embeddings_mcp.models import InputType, ModelCard, Truncate
from embeddings_mcp.request_limits import Limits
from embeddings_mcp.service import EmbeddingService
from embeddings_mcp.settings import Settings

ROOT = Path(__file__).parents[1]

COMMAND = str(Path(sys.executable).with_name("embeddings-mcp"))
"""The installed command."""

ERAS = {"2025-11-25": "legacy", "2026-07-28": "auto"}
"""Protocol versions of MCP, and the mode in which the SDK's client speaks each."""

ENVELOPE = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientCapabilities": {},
}
"""The client metadata of an MCP request, in ``_meta``: from this protocol version on there is no handshake."""

LIST_TOOLS = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {"_meta": ENVELOPE}}
"""A request that every MCP server answers."""

INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "0"}},
}
"""The first request of a session; from protocol 2026-07-28 on there are no sessions."""

SECONDS = 10
"""Timeout of anything that does not start a process."""

START_SECONDS = 60
"""Timeout for a server process to listen, on a busy machine."""


@dataclass
class HashEmbedder:
    """An embedder without a model, for tests of the layers above: a hash of (prompt, text) seeds a unit vector.

    A text has one token per word, and two special tokens. `gate`, if not None, blocks every call until it is set.
    """

    card: ModelCard = field(default_factory=lambda: ModelCard(id="test/hash", dimensions=8, max_tokens=64))
    origin: str = "local"
    gate: anyio.Event | None = None
    cancelled: bool = False
    closed: bool = False
    batches: list[list[str]] = field(default_factory=list)

    async def identify(self) -> str:
        return self.card.id

    async def embed(
        self,
        texts: Sequence[str],
        *,
        input_type: InputType | None,
        truncate: Truncate,
        on_progress: OnProgress | None = None,
        on_rows: OnRows | None = None,
    ) -> Embeddings:
        self.batches.append(list(texts))
        counts = [len(text.split()) + 2 for text in texts]
        max_tokens = self.card.max_tokens
        if truncate == "NONE" and max_tokens is not None and max(counts) > max_tokens:
            index, *others = [index for index, tokens in enumerate(counts) if tokens > max_tokens]
            raise InputTooLong(index=index, tokens=counts[index], max_tokens=max_tokens, others=others)
        if self.gate is not None:
            try:
                await self.gate.wait()
            except BaseException:
                self.cancelled = True
                raise
        vectors = np.stack([self.vector(text, input_type) for text in texts])
        for done in range(1, len(texts) + 1):
            if on_rows is not None:
                on_rows([done - 1], Embeddings(vectors[done - 1 : done], counts[done - 1 : done]))
            if on_progress is not None:
                await on_progress(done)
        return Embeddings(vectors, counts)

    def vector(self, text: str, input_type: InputType | None = None) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """The vector of this text."""
        seed = int.from_bytes(hashlib.sha256((self.card.prompt(input_type) + text).encode()).digest()[:8], "little")
        vector = np.random.default_rng(seed).standard_normal(self.card.dimensions or 8).astype(np.float32)
        return vector / np.float32(np.linalg.norm(vector))

    async def check(self) -> None:
        """Always ready."""

    async def aclose(self) -> None:
        self.closed = True


@dataclass
class FailingEmbedder(HashEmbedder):
    """Raises `error` for requests and for readiness probes."""

    error: Exception = field(default_factory=RuntimeError)

    async def embed(self, texts: Sequence[str], **options: Any) -> Embeddings:
        raise self.error

    async def check(self) -> None:
        raise self.error


def service_of(*embedders: Embedder) -> EmbeddingService:
    """A service with these embedders, the first as the default; with one `HashEmbedder` if none is given."""
    embedders = embedders or (HashEmbedder(),)
    return EmbeddingService(embedders, default_model=embedders[0].card.id)


@contextmanager
def client_of(*embedders: Embedder, **chosen: Any) -> Iterator[httpx.Client]:
    """An HTTP client of a server with these embedders and settings."""
    with http_server(service_of(*embedders), **chosen) as url, httpx.Client(base_url=url, timeout=SECONDS) as client:
        yield client


@contextmanager
def http_server(service: EmbeddingService, **chosen: Any) -> Iterator[str]:
    """Run an HTTP server of this service with these settings; yields its address."""
    settings = Settings(**chosen)
    with asgi_server(create_app(service, build_mcp_server(service, Limits.from_settings(settings)), settings)) as url:
        yield url


@contextmanager
def asgi_server(app: ASGIApp) -> Iterator[str]:
    """Serve `app` on a free loopback port, in a thread; yields its address."""
    config = uvicorn.Config(
        app, port=0, http=Connection, lifespan="on", ws="none", log_config=None, access_log=False, proxy_headers=False
    )
    server = _Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert server.started_up.wait(10), "the server did not start"
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the server did not stop"


class _Server(uvicorn.Server):
    """Sets an event when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.started_up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.started_up.set()


@contextmanager
def server_process(*command: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a process that serves HTTP on a free port; yields it and its address, read from stderr."""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        try:
            yield process, _address_of(process)
        finally:
            process.kill()


def _address_of(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    output = []
    with killed_late(process):
        for line in process.stderr:
            output.append(line)
            if found := re.search(r"serving MCP at (\S+)/mcp and REST at \1/v1$", line):
                return found[1]
    raise AssertionError(f"the server did not start: {''.join(output)}")


@contextmanager
def stdio_process(*command: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Start a process for `ask`; it is killed at the end of the block, or after `START_SECONDS`."""
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", **options
    ) as process:
        try:
            with killed_late(process):
                yield process
        finally:
            process.kill()


@contextmanager
def killed_late(process: subprocess.Popen[str]) -> Iterator[None]:
    """Kill the process if the block takes longer than `START_SECONDS`, since reading its output has no timeout."""
    timer = threading.Timer(START_SECONDS, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def ask(process: subprocess.Popen[str], request: Mapping[str, Any]) -> str:
    """Send an MCP message to a process; returns the line that it answers."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    return process.stdout.readline()


@contextmanager
def no_file_descriptors_left(limit: int = 3) -> Iterator[None]:
    """Let this process open no file descriptors from `limit` on within the block; those that are open stay open."""
    import resource  # not available on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def wait_until(condition: Callable[[], object]) -> None:
    """Let the other tasks run until `condition` holds."""
    with anyio.fail_after(SECONDS):
        while not condition():
            await anyio.lowlevel.checkpoint()


class Clock:
    """A replacement for the module `time`, whose clock a test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now

"""Pieces that several tests share."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import subprocess
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

ENVELOPE = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientCapabilities": {},
}
"""What a request of MCP says of its client, in ``_meta``; there is no handshake from this protocol version on."""

LIST_TOOLS = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {"_meta": ENVELOPE}}
"""A request that every server of MCP answers."""

INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "0"}},
}
"""The first request of a session; from protocol 2026-07-28 on there are none."""

SECONDS = 10
"""Longest that anything may take for which no process is started."""

START_SECONDS = 60
"""Longest that a server process may take to listen, on a machine that is busy."""


@dataclass
class HashEmbedder:
    """An embedder without a model: every (text, prompt) has one unit vector of its own, drawn from its hash.

    It counts a word as a token, and two more for a text.

    For tests of what lies above the embedder. `gate`, when set, holds every call until the event is set.
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
        allowed = self.card.max_tokens
        if truncate == "NONE" and allowed is not None and max(counts) > allowed:
            index, *others = [index for index, tokens in enumerate(counts) if tokens > allowed]
            raise InputTooLong(index=index, tokens=counts[index], allowed=allowed, others=others)
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
        """The vector that this text has."""
        seed = int.from_bytes(hashlib.sha256((self.card.prompt(input_type) + text).encode()).digest()[:8], "little")
        vector = np.random.default_rng(seed).standard_normal(self.card.dimensions or 8).astype(np.float32)
        return vector / np.float32(np.linalg.norm(vector))

    async def check(self) -> None:
        """Always ready."""

    async def aclose(self) -> None:
        self.closed = True


@dataclass
class FailingEmbedder(HashEmbedder):
    """Answers nothing but `error`, to requests and to readiness probes."""

    error: Exception = field(default_factory=RuntimeError)

    async def embed(self, texts: Sequence[str], **options: Any) -> Embeddings:
        raise self.error

    async def check(self) -> None:
        raise self.error


def service_of(*embedders: Embedder) -> EmbeddingService:
    """A service over these embedders, the first being the default; over a `HashEmbedder` where none is given."""
    embedders = embedders or (HashEmbedder(),)
    return EmbeddingService(embedders, default_model=embedders[0].card.id)


@contextmanager
def client_of(*embedders: Embedder, **chosen: Any) -> Iterator[httpx.Client]:
    """A client of an HTTP server over these embedders, with these settings."""
    with served(service_of(*embedders), **chosen) as url, httpx.Client(base_url=url, timeout=SECONDS) as client:
        yield client


@contextmanager
def served(service: EmbeddingService, **chosen: Any) -> Iterator[str]:
    """The address of an HTTP server of this service, with these settings."""
    settings = Settings(**chosen)
    with serving(create_app(service, build_mcp_server(service, Limits.of(settings)), settings)) as url:
        yield url


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """Serves `app` on a free loopback port, in a thread; gives its address."""
    config = uvicorn.Config(
        app, port=0, http=Connection, lifespan="on", ws="none", log_config=None, access_log=False, proxy_headers=False
    )
    server = _Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert server.up.wait(10), "the server did not start"
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the server did not stop"


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()


@contextmanager
def running(*command: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves HTTP on a free port, once it has said where, and its address."""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        deadline = threading.Timer(START_SECONDS, process.kill)
        deadline.start()
        try:
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"serving MCP at (\S+)/mcp and REST at \1/v1$", line):
                    deadline.cancel()
                    yield process, found[1]
                    return
            raise AssertionError(f"the server did not start: {''.join(said)}")
        finally:
            deadline.cancel()
            process.kill()


@contextmanager
def over_stdio(*command: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that is spoken to by `ask`; it is ended with the block, and after the time that a start may take."""
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", **options
    ) as process:
        deadline = threading.Timer(START_SECONDS, process.kill)
        deadline.start()
        try:
            yield process
        finally:
            deadline.cancel()
            process.kill()


def ask(process: subprocess.Popen[str], request: Mapping[str, Any]) -> str:
    """The line with which a process answers a message of MCP."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    return process.stdout.readline()


@contextmanager
def out_of_files() -> Iterator[None]:
    """For the time of the block this process can open nothing more; what is open already stays so."""
    import resource  # which Windows does not have

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def until(condition: Callable[[], object]) -> None:
    """Let the other tasks run until they have brought about `condition`."""
    with anyio.fail_after(SECONDS):
        while not condition():
            await anyio.lowlevel.checkpoint()


class Clock:
    """In the place of the module `time`: the time, which passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now

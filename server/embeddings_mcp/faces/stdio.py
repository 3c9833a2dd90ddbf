"""MCP over stdio, for the one host that started this process."""

from __future__ import annotations

import asyncio
import contextlib
import signal

import anyio

from embeddings_mcp.faces.loading import loaded
from embeddings_mcp.faces.mcp import EmbeddingsServer
from embeddings_mcp.service import EmbeddingService
from embeddings_mcp.settings import Settings

_WRITTEN_SECONDS = 0.1
"""Within these an answer is written: to import torch takes the interpreter lock for longer than that takes."""


def serve_stdio(service: EmbeddingService, server: EmbeddingsServer, settings: Settings) -> None:
    """Serve until the host closes stdin.

    Raises:
        ModelUnavailable: the default model is to be loaded first, and cannot be.
    """

    async def listed() -> None:
        """Return once the host has its list of tools, which is the first that it asks for."""
        await server.listed.wait()
        await asyncio.sleep(_WRITTEN_SECONDS)

    async def serve() -> None:
        async with contextlib.aclosing(service), loaded(service, settings.load, after=listed):
            await server.run_stdio_async()

    # Ctrl-C ends the process at once: a thread of it waits for stdin, and nothing but its end would wake it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    anyio.run(serve)

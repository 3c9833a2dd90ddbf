"""A server whose embedder reports its state on stderr: ``python -m tests.e2e.waiting_server stdio|http``.

A request with the text `WAIT` never completes. Every request also writes to stdout, as a careless library might.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import anyio

from embeddings_mcp.embedders.base import Embeddings
from embeddings_mcp.faces.http.app import serve_http
from embeddings_mcp.faces.mcp.server import build_mcp_server
from embeddings_mcp.settings import Settings
from tests.support import HashEmbedder, service_of

WAIT = "wait"


class ReportingEmbedder(HashEmbedder):
    """Writes ``began`` and ``cancelled`` to stderr, one per line."""

    async def embed(self, texts: Sequence[str], **options: Any) -> Embeddings:
        print("a library prints to stdout")
        os.write(1, b"and another writes to the descriptor\n")
        print("began", file=sys.stderr, flush=True)
        self.gate = anyio.Event() if WAIT in texts else None
        try:
            return await super().embed(texts, **options)
        finally:
            if self.cancelled:
                print("cancelled", file=sys.stderr, flush=True)


if __name__ == "__main__":
    service = service_of(ReportingEmbedder())
    server = build_mcp_server(service)
    if sys.argv[1] == "http":
        serve_http(service, server, Settings(port=0))
    else:
        anyio.run(server.run_stdio_async)

"""A demonstration of what an MCP host does with this server."""

from __future__ import annotations

import os
import shlex
import sys
import time
from typing import Any, cast

from mcp import Client, StdioServerParameters
from mcp.shared.exceptions import MCPError
from rich.console import Console
from rich.text import Text

from embeddings_mcp.errors import ModelUnavailable, first_error
from embeddings_mcp.faces.cli import tables
from embeddings_mcp.schema import EmbeddingResponse, SearchResponse, SimilarityResponse

SAMPLES = [
    "How do I change my password?",
    "Open Settings, choose Security, and pick a new password.",
    "Our office is closed on public holidays.",
    "Die Rechnung kommt am Monatsende per E-Mail.",
    "The invoice is sent by email at the end of the month.",
]


async def run_demo(texts: list[str] | None = None) -> None:
    """Start ``embeddings-mcp serve`` over stdio, list its tools, embed, compare and search `texts`.

    Raises:
        ModelUnavailable: the server did not start or failed to respond; the message includes the server's own.
    """
    try:
        await _demonstrate(texts or SAMPLES, Console())
    except BaseExceptionGroup as group:  # errors in the client context are wrapped by its task group
        error = first_error(group)
        if isinstance(error, MCPError):
            raise ModelUnavailable(f"the server has exited or does not respond: {error.message}") from error
        raise error from None


async def _demonstrate(texts: list[str], console: Console) -> None:
    command = [sys.executable, "-m", "embeddings_mcp", "serve"]
    console.print(Text(f"$ {shlex.join(command)}", style="dim"))
    started = time.perf_counter()
    server = StdioServerParameters(command=command[0], args=command[1:], env=dict(os.environ))
    async with Client(server, read_timeout_seconds=600) as client:
        listed = await client.list_tools()
        console.print(f"[dim]tools after {time.perf_counter() - started:.1f} s[/dim]")
        console.print(tables.tools([(tool.name, tool.title or "") for tool in listed.tools]))

        started = time.perf_counter()
        embedded = await _call(client, "create_embedding", {"model": "default", "input": texts})
        console.print(
            f"[dim]model loaded and {len(texts)} texts embedded in {time.perf_counter() - started:.1f} s[/dim]"
        )
        console.print(tables.embeddings(cast("EmbeddingResponse", embedded), texts))

        started = time.perf_counter()
        matrix = await _call(client, "similarity", {"model": "default", "input": texts})
        console.print(f"[dim]compared in {(time.perf_counter() - started) * 1000:.0f} ms[/dim]")
        console.print(tables.similarity(cast("SimilarityResponse", matrix), texts, texts))

        query, passages = texts[0], texts[1:] or texts
        ranking = await _call(client, "search", {"query": query, "input": passages})
        console.print(Text(f"search: {query!r}", style="dim"))
        console.print(tables.search(cast("SearchResponse", ranking), passages))


async def _call(client: Client, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
    result = await client.call_tool(tool, arguments)
    if result.is_error:
        raise ModelUnavailable(" ".join(block.text for block in result.content if block.type == "text"))
    return cast("dict[str, Any]", result.structured_content)

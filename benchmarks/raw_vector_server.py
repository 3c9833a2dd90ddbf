"""A typical embedding server for agents: one tool that returns the vectors themselves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from mcp.server.mcpserver import MCPServer

from embeddings_mcp.vectors import FloatMatrix


def build_raw_vector_server(embed: Callable[[Sequence[str]], Awaitable[FloatMatrix]]) -> MCPServer:
    """A server whose tool returns the numbers in their shortest float32 form."""
    server = MCPServer("raw-vectors")

    @server.tool()
    async def embed_texts(texts: list[str]) -> list[list[float]]:
        """Embed texts; returns one vector for each."""
        # The shortest digits that identify the float32, not the 17 of the float64 with the same value.
        return [[float(str(number)) for number in vector] for vector in await embed(texts)]

    return server

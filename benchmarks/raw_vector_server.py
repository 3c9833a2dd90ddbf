"""What most embedding servers for agents are: one tool that gives the vectors themselves to whoever asked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from mcp.server.mcpserver import MCPServer

from embeddings_mcp.vectors import FloatMatrix


def build_raw_vector_server(embed: Callable[[Sequence[str]], Awaitable[FloatMatrix]]) -> MCPServer:
    """A server whose tool answers with the numbers, as short as float32 can be written."""
    server = MCPServer("raw-vectors")

    @server.tool()
    async def embed_texts(texts: list[str]) -> list[list[float]]:
        """Embed texts; returns one vector for each."""
        # Of a float32 the shortest digits that mean it, and not the 17 of the float64 with the same value.
        return [[float(str(number)) for number in vector] for vector in await embed(texts)]

    return server

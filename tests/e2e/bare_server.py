"""A minimal MCP server, as a baseline for our start-up time: ``python -m tests.e2e.bare_server``."""

from __future__ import annotations

from mcp.server.mcpserver import MCPServer

server = MCPServer("bare")


@server.tool()
def add(left: int, right: int) -> int:
    """Add two numbers."""
    return left + right


if __name__ == "__main__":
    server.run()

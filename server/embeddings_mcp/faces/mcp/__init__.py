"""The MCP server, and its transport over stdio."""

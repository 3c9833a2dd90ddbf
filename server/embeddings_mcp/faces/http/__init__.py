"""The HTTP server: REST and MCP on one port, behind one guard."""

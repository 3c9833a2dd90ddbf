"""Paths of the HTTP server that several modules need; those of the operations are in the table of operations."""

MCP = "/mcp"
LIVE = "/v1/health/live"
READY = "/v1/health/ready"
METRICS = "/v1/metrics"

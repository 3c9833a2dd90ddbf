"""The paths of the HTTP server that several modules have to know; those of the operations stand in their table."""

MCP = "/mcp"
LIVE = "/v1/health/live"
READY = "/v1/health/ready"
METRICS = "/v1/metrics"

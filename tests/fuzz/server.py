"""The server under fuzzing: its embedder has no model, so that the time is spent in the faces."""

from __future__ import annotations

from embeddings_mcp.faces.http.app import serve_http
from embeddings_mcp.faces.mcp.server import build_mcp_server
from embeddings_mcp.settings import Settings
from tests.support import service_of

if __name__ == "__main__":
    service = service_of()
    serve_http(service, build_mcp_server(service), Settings(port=0))

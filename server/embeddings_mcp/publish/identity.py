"""Name, authors and URLs of the project, as given to registries, indexes and installers."""

from __future__ import annotations

from typing import Literal

Format = Literal["ikanos", "naftiko", "openapi", "json-schema", "apis-json", "server-card"]
"""Formats in which a server describes itself."""

NAME = "embeddings-mcp"
"""Name of the distribution, the command and the plugin."""

REGISTRY_NAME = "io.github.embeddings-mcp/embeddings-mcp"
"""Name in the MCP registry; the GitHub organization proves ownership of the namespace."""

TITLE = "Text embeddings"

DESCRIPTION = "Text embeddings as tools: embed, compare and search by meaning, locally or with NVIDIA NIM"
"""At most 100 characters, the limit of the MCP registry and of server cards."""

LICENSE = "Apache-2.0"
AUTHOR = "The embeddings-mcp authors"
REPOSITORY = "https://github.com/embeddings-mcp/embeddings-mcp"
DOCUMENTS = "https://raw.githubusercontent.com/embeddings-mcp/embeddings-mcp/main"
"""Base URL of the raw files in the repository."""

KEYWORDS = ("mcp", "embeddings", "nvidia-nim", "semantic-search", "sentence-transformers")
SINCE = "2026-11-22"

EXTRAS = "local,bundled"
"""Extras that an installation needs to work without an endpoint."""

LOCAL_URL = "http://localhost:8000"
"""Default URL of a server."""

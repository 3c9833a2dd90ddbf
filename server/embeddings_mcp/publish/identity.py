"""Who this is, as registries, indexes and installers are told."""

from __future__ import annotations

from typing import Literal

Format = Literal["ikanos", "naftiko", "openapi", "json-schema", "apis-json", "server-card"]
"""The forms in which a server describes itself."""

NAME = "embeddings-mcp"
"""Name of the distribution, the command and the plugin."""

REGISTRY_NAME = "io.github.embeddings-mcp/embeddings-mcp"
"""Name in the MCP registry: the namespace is proved by the GitHub organisation."""

TITLE = "Text embeddings"

DESCRIPTION = "Text embeddings as tools: embed, compare and search by meaning, locally or with NVIDIA NIM"
"""At most 100 characters, which is all that the MCP registry and a server card take."""

LICENCE = "Apache-2.0"
AUTHOR = "The embeddings-mcp authors"
REPOSITORY = "https://github.com/embeddings-mcp/embeddings-mcp"
DOCUMENTS = "https://raw.githubusercontent.com/embeddings-mcp/embeddings-mcp/main"
"""Where the files of the repository are read as they are."""

KEYWORDS = ("mcp", "embeddings", "nvidia-nim", "semantic-search", "sentence-transformers")
SINCE = "2026-11-22"

EXTRAS = "local,bundled"
"""What an installation needs besides the package to answer without any endpoint."""

LOCAL_URL = "http://localhost:8000"
"""Where a server listens that was told nothing else."""

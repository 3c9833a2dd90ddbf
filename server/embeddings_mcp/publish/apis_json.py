"""The APIs.json index of this API, format version 0.23, for directories such as apis.io."""

from __future__ import annotations

from typing import Any

from embeddings_mcp.publish import identity

_IMAGE = "https://github.com/embeddings-mcp.png"


def apis_index(url: str) -> dict[str, Any]:
    """Build the index; `url` is the base URL of the server, since every user runs their own."""
    maintainers = [{"FN": identity.AUTHOR, "X-github": "embeddings-mcp", "url": identity.REPOSITORY}]
    return {
        "aid": identity.NAME,
        "name": identity.NAME,
        "description": f"{identity.DESCRIPTION}.",
        "image": _IMAGE,
        "url": f"{identity.DOCUMENTS}/apis.json",
        "type": "Index",
        "kind": "opensource",
        "position": "Producing",
        "access": "3rd-Party",
        "created": identity.SINCE,
        "modified": identity.SINCE,
        "specificationVersion": "0.23",
        "tags": ["Embeddings", "Semantic Search", "MCP", "NVIDIA NIM", "OpenAI-Compatible"],
        "apis": [
            {
                "aid": f"{identity.NAME}:embeddings",
                "name": identity.TITLE,
                "description": (
                    "POST /v1/embeddings as published for NVIDIA NIM, plus similarity and search, which return scores "
                    "instead of vectors."
                ),
                "image": _IMAGE,
                "humanURL": f"{identity.REPOSITORY}#readme",
                "baseURL": f"{url}/v1",
                "tags": ["Embeddings", "Semantic Search", "RAG"],
                "properties": [
                    _property("OpenAPI", "docs/openapi.json", "application/json"),
                    _property("JSONSchema", "docs/schema.json", "application/json"),
                    _property("APIReference", "docs/api.md", "text/markdown"),
                    _property("AgentSkill", "skills/embeddings/SKILL.md", "text/markdown"),
                    _property("MCPServer", "server.json", "application/json"),
                    _property("X-IkanosCapability", "skills/embeddings/capability.yaml", "application/yaml"),
                    _property("X-NaftikoCapability", "skills/embeddings/capability.naftiko.yaml", "application/yaml"),
                ],
                "contact": maintainers,
            }
        ],
        "common": [
            {"type": "GitHubRepository", "url": identity.REPOSITORY},
            {"type": "GettingStarted", "url": f"{identity.REPOSITORY}#readme"},
            _property("ChangeLog", "CHANGELOG.md", "text/markdown"),
            _property("License", "LICENSE", "text/plain"),
        ],
        "maintainers": maintainers,
    }


def _property(kind: str, path: str, media_type: str) -> dict[str, str]:
    return {"type": kind, "url": f"{identity.DOCUMENTS}/{path}", "mediaType": media_type}

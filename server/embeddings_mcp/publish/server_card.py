"""The server card: what a client can learn about a server before it connects.

The format is not final yet: SEP-2127, repository modelcontextprotocol/experimental-ext-server-card, schema v2. A card
lists no tools; clients get those from the server itself.
"""

from __future__ import annotations

from typing import Any

from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS, MODERN_PROTOCOL_VERSIONS

from embeddings_mcp import __version__
from embeddings_mcp.publish import identity

MEDIA_TYPE = "application/mcp-server-card+json"


def server_card(url: str) -> dict[str, Any]:
    """Build the card of a server at `url`."""
    return {
        "$schema": "https://static.modelcontextprotocol.io/schemas/v2/server-card.schema.json",
        "name": identity.REGISTRY_NAME,
        "title": identity.TITLE,
        "description": identity.DESCRIPTION,
        "version": __version__,
        "websiteUrl": identity.REPOSITORY,
        "repository": {"url": identity.REPOSITORY, "source": "github"},
        "remotes": [
            {
                "type": "streamable-http",
                "url": f"{url}/mcp",
                "supportedProtocolVersions": [*HANDSHAKE_PROTOCOL_VERSIONS, *MODERN_PROTOCOL_VERSIONS],
                "headers": [
                    {
                        "name": "Authorization",
                        "description": "`Bearer` and an API key, if the server requires one.",
                        "isSecret": True,
                    }
                ],
            }
        ],
    }

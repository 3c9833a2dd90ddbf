"""The JSON Schema of every wire type, in one document."""

from __future__ import annotations

from typing import Any

from embeddings_mcp.publish import identity
from embeddings_mcp.publish.openapi import openapi_document


def json_schema_document() -> dict[str, Any]:
    """The document: each request and response is a definition, under the name that the OpenAPI document gives it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"{identity.DOCUMENTS}/docs/schema.json",
        "title": identity.NAME,
        "description": "The requests and responses of the embeddings API, e.g. #/$defs/EmbeddingRequest.",
        "$defs": openapi_document()["components"]["schemas"],
    }

"""NIM endpoints, hosted and self-hosted, and other servers of the same API."""

from __future__ import annotations

from embeddings_mcp.embedders.nim.client import EndpointClient
from embeddings_mcp.embedders.nim.discovery import card_for, discover, is_embedding_model
from embeddings_mcp.embedders.nim.embedder import NimEmbedder
from embeddings_mcp.embedders.nim.endpoint import HOSTED_DEFAULT_MODEL, HOSTED_MODELS, HOSTED_URL, Endpoint
from embeddings_mcp.embedders.nim.source import EndpointModels

__all__ = [
    "HOSTED_DEFAULT_MODEL",
    "HOSTED_MODELS",
    "HOSTED_URL",
    "Endpoint",
    "EndpointClient",
    "EndpointModels",
    "NimEmbedder",
    "card_for",
    "discover",
    "is_embedding_model",
]

"""Embedding cache, in memory and on disk, that never mixes the vectors of different models."""

from embeddings_mcp.embedders.cache.disk import DiskStore
from embeddings_mcp.embedders.cache.embedder import CachedEmbedder, cached
from embeddings_mcp.embedders.cache.memory import MemoryStore
from embeddings_mcp.embedders.cache.store import Cache

__all__ = ["Cache", "CachedEmbedder", "DiskStore", "MemoryStore", "cached"]

"""Vectors that were made before: kept in memory and on disk, and never mixed with others."""

from embeddings_mcp.embedders.cache.disk import DiskStore
from embeddings_mcp.embedders.cache.embedder import CachedEmbedder, cached
from embeddings_mcp.embedders.cache.memory import MemoryStore
from embeddings_mcp.embedders.cache.store import Cache

__all__ = ["Cache", "CachedEmbedder", "DiskStore", "MemoryStore", "cached"]

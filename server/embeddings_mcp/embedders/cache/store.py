"""The cache of a server, shared by all of its models: in memory and optionally on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from embeddings_mcp.embedders.cache.disk import DiskStore
from embeddings_mcp.embedders.cache.memory import MemoryStore
from embeddings_mcp.embedders.cache.rows import Key, Row


class Cache:
    """A two-level cache: memory first, then a file.

    Args:
        memory: the first level; rows read from the file are put here too.
        disk: the second level, or None.
    """

    def __init__(self, memory: MemoryStore, disk: DiskStore | None = None) -> None:
        self.memory = memory
        self.disk = disk

    async def generation(self, model: str) -> str:
        """Return a part of the keys of a model's rows that changes when the operator clears them in the file."""
        return "" if self.disk is None else await self.disk.generation(model)

    async def get(self, keys: Sequence[Key]) -> dict[Key, Row]:
        """Return the cached rows among these keys."""
        found = self.memory.get(keys)
        if self.disk is None or len(found) == len(keys):
            return found
        read = await self.disk.get([key for key in keys if key not in found])
        self.memory.put(read)
        return found | read

    async def put(self, rows: Mapping[Key, Row], *, model: str, origin: str) -> None:
        """Store in the file rows that are in `memory` already."""
        if self.disk is not None:
            await self.disk.put(rows, model=model, origin=origin)

    async def aclose(self) -> None:
        """Close the file; idempotent."""
        if self.disk is not None:
            await self.disk.aclose()

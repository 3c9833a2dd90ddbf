"""The rows of all models of a server: in memory and, where the operator wants it, in a file behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from embeddings_mcp.embedders.cache.disk import DiskStore
from embeddings_mcp.embedders.cache.memory import MemoryStore
from embeddings_mcp.embedders.cache.rows import Key, Row


class Cache:
    """Memory before a file.

    Args:
        memory: looked into first; what is read from the file goes there.
        disk: the file, or None.
    """

    def __init__(self, memory: MemoryStore, disk: DiskStore | None = None) -> None:
        self.memory = memory
        self.disk = disk

    async def generation(self, model: str) -> str:
        """Belongs in the keys of a model's rows: another one once the operator has cleared them in the file."""
        return "" if self.disk is None else await self.disk.generation(model)

    async def get(self, keys: Sequence[Key]) -> dict[Key, Row]:
        """Those of the rows asked for that are here."""
        found = self.memory.get(keys)
        if self.disk is None or len(found) == len(keys):
            return found
        read = await self.disk.get([key for key in keys if key not in found])
        self.memory.put(read)
        return found | read

    async def put(self, rows: Mapping[Key, Row], *, model: str, origin: str) -> None:
        """Keep in the file what `memory` was given one by one."""
        if self.disk is not None:
            await self.disk.put(rows, model=model, origin=origin)

    async def aclose(self) -> None:
        """Close the file; may be done more than once."""
        if self.disk is not None:
            await self.disk.aclose()

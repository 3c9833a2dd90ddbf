"""The in-memory LRU cache of rows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from embeddings_mcp.embedders.cache.rows import Key, Row

_OVERHEAD = 400
"""Measured memory of a row in addition to its vector: key, token count, two objects and the dictionary entry."""


class MemoryStore:
    """An LRU cache of rows, bounded by their size in bytes.

    Args:
        max_bytes: bound on the total size; 0 stores nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rows: OrderedDict[Key, Row] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, keys: Iterable[Key]) -> dict[Key, Row]:
        """Return the stored rows among these keys."""
        found = {}
        for key in keys:
            row = self._rows.get(key)
            if row is not None:
                self._rows.move_to_end(key)
                found[key] = row
        return found

    def put(self, rows: Mapping[Key, Row]) -> None:
        """Store these rows, replacing rows with the same keys, and evict the least recently used rows."""
        self.remove(rows)
        for key, row in rows.items():
            self._rows[key] = row
            self._bytes += _cost(row)
        while self._bytes > self._max_bytes:
            _, oldest = self._rows.popitem(last=False)
            self._bytes -= _cost(oldest)

    def remove(self, keys: Iterable[Key]) -> None:
        """Remove these rows."""
        for key in keys:
            row = self._rows.pop(key, None)
            if row is not None:
                self._bytes -= _cost(row)


def _cost(row: Row) -> int:
    return len(row.vector) + _OVERHEAD

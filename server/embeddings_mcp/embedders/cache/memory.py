"""The rows used last, in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from embeddings_mcp.embedders.cache.rows import Key, Row

_OVERHEAD = 400
"""Bytes that a row takes besides its vector: key, number, two objects and its place in the table, as measured."""


class MemoryStore:
    """Rows within a bound, out of which the one goes first that was not used for longest.

    Args:
        max_bytes: the bound; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rows: OrderedDict[Key, Row] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, keys: Iterable[Key]) -> dict[Key, Row]:
        """Those of the rows asked for that are here."""
        found = {}
        for key in keys:
            row = self._rows.get(key)
            if row is not None:
                self._rows.move_to_end(key)
                found[key] = row
        return found

    def put(self, rows: Mapping[Key, Row]) -> None:
        """Keep these rows, in the place of others under the same keys."""
        self.drop(rows)
        for key, row in rows.items():
            self._rows[key] = row
            self._bytes += _cost(row)
        while self._bytes > self._max_bytes:
            _, oldest = self._rows.popitem(last=False)
            self._bytes -= _cost(oldest)

    def drop(self, keys: Iterable[Key]) -> None:
        """Forget these rows."""
        for key in keys:
            row = self._rows.pop(key, None)
            if row is not None:
                self._bytes -= _cost(row)


def _cost(row: Row) -> int:
    return len(row.vector) + _OVERHEAD

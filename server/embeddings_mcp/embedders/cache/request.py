"""The state of one request to the cache: the rows found so far, the missing keys, and the progress."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from embeddings_mcp.embedders.base import Embeddings, OnProgress
from embeddings_mcp.embedders.cache.rows import Key, Kind, Row, embeddings_of


class Request:
    """The texts of a request and the rows found for them so far.

    Args:
        texts: in order.
        keys: one for each text.
        on_progress: called with the number of texts that have their rows.

    Attributes:
        texts: as given.
        rows: found so far.
    """

    def __init__(self, texts: Sequence[str], keys: Sequence[Key], on_progress: OnProgress | None) -> None:
        self.texts = texts
        self.rows: dict[Key, Row] = {}
        self._keys = keys
        self._indices: dict[Key, list[int]] = {}  # a text may occur more than once
        for index, key in enumerate(keys):
            self._indices.setdefault(key, []).append(index)
        self._on_progress = on_progress
        self._done = self._reported = 0

    @property
    def missing(self) -> list[Key]:
        """The distinct keys without a row, in the order of the texts."""
        return [key for key in self._indices if key not in self.rows]

    @property
    def bytes(self) -> int:
        """Size of the result's vectors."""
        return sum(len(self.rows[key].vector) for key in self._keys)

    def texts_of(self, keys: Iterable[Key]) -> list[str]:
        """Return the texts of these keys."""
        return [self.texts[self._indices[key][0]] for key in keys]

    def add(self, rows: Mapping[Key, Row]) -> None:
        """Add rows of this request's texts."""
        self._done += sum(len(self._indices[key]) for key in rows if key not in self.rows)
        self.rows.update(rows)

    def drop_mismatched(self, latest: Kind | None) -> list[Key]:
        """Drop the rows that are not of the latest kind; if that is unknown and the rows differ in kind, drop all.

        Returns:
            The keys of the dropped rows.
        """
        kinds = {row.kind for row in self.rows.values()}
        if kinds <= {latest} or (latest is None and len(kinds) == 1):
            return []
        dropped = [key for key, row in self.rows.items() if row.kind != latest]
        for key in dropped:
            del self.rows[key]
            self._done -= len(self._indices[key])
        return dropped

    async def report_progress(self, _done: int = 0) -> None:
        """Report the number of texts done; never less than reported before, even if rows were dropped since."""
        self._reported = max(self._reported, self._done)
        if self._on_progress is not None:
            await self._on_progress(self._reported)

    async def report_new_progress(self) -> None:
        """Report the number of texts done if it has increased."""
        if self._done > self._reported:
            await self.report_progress()

    def indices_of(self, key: Key) -> Sequence[int]:
        """Return the indices of the texts with this key, in order."""
        return self._indices[key]

    def result(self) -> Embeddings:
        """Return the rows in the order of the texts; none may be missing."""
        return embeddings_of([self.rows[key] for key in self._keys])

"""One request to a cache: which rows it has, which it still needs, and where they go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from embeddings_mcp.embedders.base import Embeddings, OnProgress
from embeddings_mcp.embedders.cache.rows import Key, Kind, Row, gathered


class Request:
    """What is asked for, and what of it is there.

    Args:
        texts: in their order.
        keys: of each text.
        on_progress: told how many texts have their rows.

    Attributes:
        texts: as given.
        rows: what is there so far.
    """

    def __init__(self, texts: Sequence[str], keys: Sequence[Key], on_progress: OnProgress | None) -> None:
        self.texts = texts
        self.rows: dict[Key, Row] = {}
        self._keys = keys
        self._places: dict[Key, list[int]] = {}  # a text may be there more than once
        for position, key in enumerate(keys):
            self._places.setdefault(key, []).append(position)
        self._on_progress = on_progress
        self._done = self._told = 0

    @property
    def missing(self) -> list[Key]:
        """What is not there, each once, in the order of the texts."""
        return [key for key in self._places if key not in self.rows]

    @property
    def bytes(self) -> int:
        """Size of the answer's vectors."""
        return sum(len(self.rows[key].vector) for key in self._keys)

    def texts_of(self, keys: Iterable[Key]) -> list[str]:
        """The texts that these keys stand for."""
        return [self.texts[self.place_of(key)] for key in keys]

    def add(self, rows: Mapping[Key, Row]) -> None:
        """Take rows that have come."""
        self._done += sum(len(self._places[key]) for key in rows if key not in self.rows)
        self.rows.update(rows)

    def drop_strays(self, latest: Kind | None) -> list[Key]:
        """Let go of the rows that are not of the latest kind; where that is not known, of all that do not agree.

        Returns:
            The keys of what was dropped.
        """
        kinds = {row.kind for row in self.rows.values()}
        if kinds <= {latest} or (latest is None and len(kinds) == 1):
            return []
        strays = [key for key, row in self.rows.items() if row.kind != latest]
        for key in strays:
            del self.rows[key]
            self._done -= len(self._places[key])
        return strays

    async def tell(self, _done: int = 0) -> None:
        """Say how many texts are done, which may be as many as before, but never fewer."""
        self._told = max(self._told, self._done)
        if self._on_progress is not None:
            await self._on_progress(self._told)

    async def tell_news(self) -> None:
        """The same, if more are done than was said."""
        if self._done > self._told:
            await self.tell()

    def place_of(self, key: Key) -> int:
        """The first position of the text that this key stands for."""
        return self._places[key][0]

    def answer(self) -> Embeddings:
        """The rows in the places of their texts, once none is missing."""
        return gathered([self.rows[key] for key in self._keys])

"""The rows on disk, for the event loop: on a worker thread, and never in the way.

A cache is a help, not a need: where its file is damaged, locked, full, or not to be opened, requests go on without it,
and the log says so once.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread

from embeddings_mcp.embedders.cache.database import FILE, Database, ForeignDatabase, is_damaged
from embeddings_mcp.embedders.cache.rows import Key, Row

_logger = logging.getLogger(__name__)

_Found = TypeVar("_Found")

_PAUSE = 60.0
"""Seconds without the file after it could not be used: a full disk or a lock passes, and what is damaged is cleared."""

_State = tuple[int, int] | None
"""Which file it is and when it was changed last; None where there is none."""


class DiskStore:
    """Rows in a folder, opened when it is first needed.

    Args:
        folder: where; made if need be.
        max_bytes: bound on the size of the file.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.path = folder / FILE
        self._max_bytes = max_bytes
        self._database: Database | None = None
        self._generations: dict[str, tuple[_State, str]] = {}  # with the state in which each was read
        self._lock = threading.Lock()
        self._turn = anyio.CapacityLimiter(1)
        self._unused_until = 0.0
        self._warned = False

    async def generation(self, model: str) -> str:
        """What is another one once this model's rows were cleared; where the file has not changed, it costs a `stat`.

        Where the file cannot be read, its state stands in, lest what was cleared meanwhile be found.
        """
        state = self._state()
        read_at, generation = self._generations.get(model, (None, ""))
        if state is not None and state == read_at:
            return generation
        read = await self._beside_loop(lambda database: database.generation(model), None)
        if read is None:
            return f"unread {state}"
        self._generations[model] = state, read
        return read

    async def get(self, keys: Iterable[Key]) -> dict[Key, Row]:
        """Those of the rows asked for that can be had."""
        return await self._beside_loop(lambda database: database.get(keys), {})

    async def put(self, rows: Mapping[Key, Row], *, model: str, origin: str) -> None:
        """Keep these rows, if that can be done."""
        await self._beside_loop(lambda database: database.put(rows, model=model, origin=origin), None)

    def noted(self, subject: str, find_out: Callable[[], str]) -> str:
        """What is known of a subject, found out only where it was not noted before; for worker threads."""
        known = self._with_database(lambda database: database.note(subject), None)
        if known is not None:
            return known
        text = find_out()
        self._with_database(lambda database: database.take_note(subject, text), None)
        return text

    async def aclose(self) -> None:
        """Close the file for good."""
        await anyio.to_thread.run_sync(self._close, limiter=self._turn)

    def _state(self) -> _State:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    async def _beside_loop(self, work: Callable[[Database], _Found], otherwise: _Found) -> _Found:
        if time.monotonic() < self._unused_until:
            return otherwise
        return await anyio.to_thread.run_sync(self._with_database, work, otherwise, limiter=self._turn)

    def _with_database(self, work: Callable[[Database], _Found], otherwise: _Found) -> _Found:
        with self._lock:
            if time.monotonic() < self._unused_until:
                return otherwise
            try:
                if self._database is not None and not self._database.is_in_place():
                    self._close_file()
                if self._database is None:
                    self._database = Database(self.path, self._max_bytes)
                return work(self._database)
            except (sqlite3.Error, ForeignDatabase, OSError) as error:
                self._do_without(error)
                return otherwise

    def _do_without(self, error: Exception) -> None:
        if isinstance(error, ForeignDatabase):
            remedy = ": give it another folder"
        elif is_damaged(error):
            remedy = ": `embeddings-mcp cache clear` removes it"
        else:
            remedy = ""
        self._unused_until = time.monotonic() + _PAUSE
        self._close_file()
        if not self._warned:
            self._warned = True
            _logger.warning(
                "the cache %s cannot be used: %s%s; requests go on without it, and it is tried again every minute",
                self.path,
                error,
                remedy,
            )

    def _close(self) -> None:
        with self._lock:
            self._unused_until = float("inf")
            self._close_file()

    def _close_file(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

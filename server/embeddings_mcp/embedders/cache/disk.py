"""Asynchronous access to the rows on disk, on a worker thread.

The cache is optional for a request: if its file is damaged, locked or cannot be opened, or the disk is full, requests
continue without it, and one warning is logged.
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

_Result = TypeVar("_Result")

_RETRY_SECONDS = 60.0
"""Pause after a failure: a full disk or a lock may be temporary, and a damaged file may be cleared."""

_FileState = tuple[int, int] | None
"""Inode and modification time in nanoseconds; None if there is no file."""


class DiskStore:
    """The cache file in a folder, opened lazily.

    Args:
        folder: created if it does not exist.
        max_bytes: bound on the size of the file.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.path = folder / FILE
        self._max_bytes = max_bytes
        self._database: Database | None = None
        self._generations: dict[str, tuple[_FileState, str]] = {}  # by model, with the file state when it was read
        self._lock = threading.Lock()
        self._limiter = anyio.CapacityLimiter(1)
        self._disabled_until = 0.0
        self._warned = False

    async def generation(self, model: str) -> str:
        """Return a string that changes when this model's rows are cleared; costs one `stat` if the file is unchanged.

        If the file cannot be read, its state is returned instead, so that rows cleared in the meantime are not found.
        """
        state = self._file_state()
        known_state, generation = self._generations.get(model, (None, ""))
        if state is not None and state == known_state:
            return generation
        read = await self._run_in_thread(lambda database: database.generation(model), None)
        if read is None:
            return f"unread {state}"
        self._generations[model] = state, read
        return read

    async def get(self, keys: Iterable[Key]) -> dict[Key, Row]:
        """Return the stored rows among these keys; none if the file cannot be used."""
        return await self._run_in_thread(lambda database: database.get(keys), {})

    async def put(self, rows: Mapping[Key, Row], *, model: str, origin: str) -> None:
        """Store these rows, if the file can be used."""
        await self._run_in_thread(lambda database: database.put(rows, model=model, origin=origin), None)

    def get_or_compute_note(self, subject: str, compute: Callable[[], str]) -> str:
        """Return the note on a subject, computed and stored if there is none; blocking, for worker threads."""
        stored = self._with_database(lambda database: database.get_note(subject), None)
        if stored is not None:
            return stored
        text = compute()
        self._with_database(lambda database: database.set_note(subject, text), None)
        return text

    async def aclose(self) -> None:
        """Close the file; later calls do not open it again."""
        await anyio.to_thread.run_sync(self._close, limiter=self._limiter)

    def _file_state(self) -> _FileState:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    async def _run_in_thread(self, work: Callable[[Database], _Result], default: _Result) -> _Result:
        if time.monotonic() < self._disabled_until:
            return default
        return await anyio.to_thread.run_sync(self._with_database, work, default, limiter=self._limiter)

    def _with_database(self, work: Callable[[Database], _Result], default: _Result) -> _Result:
        with self._lock:
            if time.monotonic() < self._disabled_until:
                return default
            try:
                if self._database is not None and not self._database.is_in_place():
                    self._close_file()
                if self._database is None:
                    self._database = Database(self.path, self._max_bytes)
                return work(self._database)
            except (sqlite3.Error, ForeignDatabase, OSError) as error:
                self._disable(error)
                return default

    def _disable(self, error: Exception) -> None:
        if isinstance(error, ForeignDatabase):
            remedy = ": choose another folder"
        elif is_damaged(error):
            remedy = ": `embeddings-mcp cache clear` removes it"
        else:
            remedy = ""
        self._disabled_until = time.monotonic() + _RETRY_SECONDS
        self._close_file()
        if not self._warned:
            self._warned = True
            _logger.warning(
                "the cache %s cannot be used: %s%s; requests continue without it, and it is tried again every minute",
                self.path,
                error,
                remedy,
            )

    def _close(self) -> None:
        with self._lock:
            self._disabled_until = float("inf")
            self._close_file()

    def _close_file(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

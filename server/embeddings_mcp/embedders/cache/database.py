"""The rows in an SQLite file that several processes may use concurrently. Synchronous; SQLite's errors propagate.

Every change is one transaction in the write-ahead log (WAL): a killed process loses only what it had not committed.
Every row has a checksum over everything read from it, its key included, so that a row that is damaged or stored under
the wrong key counts as missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from embeddings_mcp.embedders.cache.rows import Key, Row

FILE = "embeddings.sqlite3"
"""Name of the file in the cache folder."""

_APPLICATION_ID = 0x456D4243
"""Identifies our files in SQLite's header: "EmBC"."""

_VERSION = 1
"""Schema version; files of other versions are neither used nor changed."""

_CLEARED = "cleared"
"""Subject of the note that changes when everything is cleared; followed by a model's id, when that model is."""

_TABLES = """
CREATE TABLE source (
    id INTEGER PRIMARY KEY,
    model TEXT NOT NULL,
    origin TEXT NOT NULL,
    served_model TEXT NOT NULL,  -- empty if the endpoint reports no model id
    UNIQUE (model, origin, served_model)
);
CREATE TABLE vector (
    key BLOB NOT NULL UNIQUE,
    used INTEGER NOT NULL,       -- in hours since 1970
    source INTEGER NOT NULL REFERENCES source,
    tokens INTEGER NOT NULL,
    checksum BLOB NOT NULL,
    numbers BLOB NOT NULL        -- float32, little-endian
);
CREATE INDEX vector_used ON vector (used);
CREATE TABLE note (subject TEXT PRIMARY KEY, text TEXT NOT NULL);
"""

_LOCK_TIMEOUT_SECONDS = 2.0
"""Timeout for locks held by other processes, which usually last milliseconds."""

_EVICTION_BATCH = 64  # rows
_MAX_EVICTION_BATCHES = 256  # in one transaction, so that evictions for a lowered bound do not block other processes
_CLEAR_BATCH = 1_000  # rows in one transaction
_SHRINK_BATCH = 1_000  # pages in one transaction


class ForeignDatabase(Exception):
    """The file is not a cache of this version; the message says why and completes a sentence."""


def is_damaged(error: Exception) -> bool:
    """Return whether the error means that the file itself is damaged, so that a retry cannot help."""
    extended_code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)
    return extended_code & 0xFF in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


@dataclass(frozen=True, slots=True)
class Holding:
    """Statistics on the rows of one model and origin.

    Attributes:
        model: id of the model.
        origin: where its vectors were computed, as in `Embedder.origin`.
        vectors: number of vectors.
        bytes: of the vectors alone.
        last_used: seconds since 1970, to the hour.
    """

    model: str
    origin: str
    vectors: int
    bytes: int
    last_used: int


class Database:
    """An open cache file, created with its folder if it does not exist.

    May be used from several threads, but not concurrently.

    Args:
        path: of the file.
        max_bytes: bound on the size of the file; the least recently used rows are evicted for new ones.

    Raises:
        ForeignDatabase: the file belongs to another application or version.
        sqlite3.Error: it cannot be used.
        OSError: the folder or file cannot be created.
    """

    def __init__(self, path: Path, max_bytes: int = sys.maxsize) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            path.touch(mode=0o600)  # as private as the texts: vectors reveal much about them
        self._path = path
        self._inode = path.stat().st_ino
        self._max_bytes = max_bytes
        self._connection = sqlite3.connect(
            path, timeout=_LOCK_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=32
        )
        try:
            self._prepare_with_retry()
        except UnicodeDecodeError as error:  # raised for SQLite's message, which quotes the damaged name of a table
            self._connection.close()
            damaged = sqlite3.DatabaseError("malformed database schema")
            damaged.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise damaged from error
        except BaseException:
            self._connection.close()
            raise

    def get(self, keys: Iterable[Key]) -> dict[Key, Row]:
        """Return the undamaged rows among these keys."""
        hour = _current_hour()
        found: dict[Key, Row] = {}
        stale: list[Key] = []
        with self._transaction("DEFERRED"):
            for key in keys:
                values = self._connection.execute(
                    "SELECT used, tokens, served_model, checksum, numbers"
                    " FROM vector JOIN source ON source.id = vector.source WHERE key = ?",
                    (key,),
                ).fetchone()
                if values is None:
                    continue
                used, tokens, served_model, checksum, numbers = values
                if checksum != _checksum(key, tokens, served_model, numbers):
                    continue
                found[key] = Row(numbers, tokens, served_model or None)
                if used != hour:
                    stale.append(key)
        if stale:
            with self._transaction("IMMEDIATE"):
                self._connection.executemany("UPDATE vector SET used = ? WHERE key = ?", [(hour, key) for key in stale])
        return found

    def put(self, rows: Mapping[Key, Row], *, model: str, origin: str) -> None:
        """Store these rows, replacing rows with the same keys.

        Args:
            rows: to store, in order, up to half of the file's bound; the rest is ignored.
            model: id of the model that produced them.
            origin: where they were computed, as in `Embedder.origin`.
        """
        hour = _current_hour()
        stored: list[tuple[Key, Row]] = []
        size = 0
        for key, row in rows.items():
            if size + _stored_size(row) > self._max_bytes // 2:
                break
            size += _stored_size(row)
            stored.append((key, row))
        with self._transaction("IMMEDIATE"):
            self._evict_for(size)
            sources = {
                served_model: self._source(model, origin, served_model)
                for served_model in {row.served_model or "" for _, row in stored}
            }
            self._connection.executemany(
                "INSERT OR REPLACE INTO vector (key, used, source, tokens, checksum, numbers)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (
                        key,
                        hour,
                        sources[row.served_model or ""],
                        row.tokens,
                        _checksum(key, row.tokens, row.served_model or "", row.vector),
                        row.vector,
                    )
                    for key, row in stored
                ],
            )
        if self._bytes_of("page_count") > self._max_bytes:
            self._shrink()

    def get_note(self, subject: str) -> str | None:
        """Return the note on this subject, or None."""
        found = self._connection.execute("SELECT text FROM note WHERE subject = ?", (subject,)).fetchone()
        return None if found is None else str(found[0])

    def set_note(self, subject: str, text: str) -> None:
        """Store a note, replacing the one on the same subject."""
        with self._transaction("IMMEDIATE"):
            self._connection.execute("INSERT OR REPLACE INTO note VALUES (?, ?)", (subject, text))

    def generation(self, model: str) -> str:
        """Return a string, unique to this file, that changes when this model's rows are cleared."""
        return f"{self.get_note(_CLEARED)} {self.get_note(f'{_CLEARED} {model}')}"

    def holdings(self) -> list[Holding]:
        """Return statistics by model and origin; reads the whole file."""
        return [
            Holding(model, origin, vectors, size, used * 3600)
            for model, origin, vectors, size, used in self._connection.execute(
                "SELECT model, origin, count(*), sum(length(numbers)), max(used)"
                " FROM vector JOIN source ON source.id = vector.source GROUP BY model, origin ORDER BY model, origin"
            )
        ]

    def clear(self, model: str | None = None) -> int:
        """Delete all rows, or one model's, and release their disk space; other processes can write in between.

        First changes the `generation` of what is cleared, and the file's modification time: rows that are not deleted
        yet are no longer found.

        Returns:
            The number of rows deleted.
        """
        with self._transaction("IMMEDIATE"):
            self._set_random_note(_CLEARED if model is None else f"{_CLEARED} {model}")
            first, last = self._connection.execute("SELECT min(rowid), max(rowid) FROM vector").fetchone()
        now = time.time_ns()  # the file system's own clock may stand still for milliseconds
        os.utime(self._path, ns=(now, now))
        deleted = 0
        if first is not None:
            for start in range(first, last + 1, _CLEAR_BATCH):
                with _pause_after(), self._transaction("IMMEDIATE"):
                    deleted += self._connection.execute(
                        "DELETE FROM vector WHERE rowid BETWEEN ?1 AND ?2"
                        " AND (?3 IS NULL OR source IN (SELECT id FROM source WHERE model = ?3))",
                        (start, min(start + _CLEAR_BATCH - 1, last), model),
                    ).rowcount
        self._shrink()
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return deleted

    def _set_random_note(self, subject: str) -> None:
        """Store a random note, different from any before."""
        self._connection.execute("INSERT OR REPLACE INTO note VALUES (?, hex(randomblob(8)))", (subject,))

    def is_in_place(self) -> bool:
        """Return whether the path still leads to the open file, which may have been removed or replaced."""
        try:
            return self._path.stat().st_ino == self._inode
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _prepare_with_retry(self) -> None:
        """Prepare the file, retrying while another process does so: SQLite's timeout does not cover enabling WAL."""
        deadline = time.monotonic() + _LOCK_TIMEOUT_SECONDS
        while True:
            try:
                self._prepare()
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return

    def _prepare(self) -> None:
        if not self._has_schema():
            # Both must precede the first table. Another process may be doing the same.
            self._connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self._connection.execute("PRAGMA journal_mode = WAL")
            with self._transaction("IMMEDIATE"):
                if not self._has_schema():
                    for statement in _TABLES.split(";\n"):
                        self._connection.execute(statement)
                    self._set_random_note(_CLEARED)
                    self._connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                    self._connection.execute(f"PRAGMA user_version = {_VERSION}")
        self._connection.execute("PRAGMA synchronous = NORMAL")  # a power failure may lose the last rows only
        self._connection.execute(f"PRAGMA journal_size_limit = {16 << 20}")

    def _has_schema(self) -> bool:
        """Return whether the file has our tables; False if it is empty.

        Raises:
            ForeignDatabase: it has others.
        """
        if not self._pragma("schema_version"):
            return False
        if self._pragma("application_id") != _APPLICATION_ID:
            raise ForeignDatabase("it is the database of another application")
        if (version := self._pragma("user_version")) != _VERSION:
            raise ForeignDatabase(
                f"it was written by another version of embeddings-mcp (format {version}, not {_VERSION})"
            )
        return True

    def _source(self, model: str, origin: str, served_model: str) -> int:
        names = (model, origin, served_model)
        self._connection.execute("INSERT OR IGNORE INTO source (model, origin, served_model) VALUES (?, ?, ?)", names)
        found = self._connection.execute(
            "SELECT id FROM source WHERE model = ? AND origin = ? AND served_model = ?", names
        ).fetchone()
        return int(found[0])

    def _evict_for(self, size: int) -> None:
        """Evict the least recently used rows until this many more bytes are within the bound."""
        for _ in range(_MAX_EVICTION_BATCHES):
            if self._bytes_of("page_count") - self._bytes_of("freelist_count") + size <= self._max_bytes:
                break
            self._connection.execute(
                "DELETE FROM vector WHERE rowid IN (SELECT rowid FROM vector ORDER BY used, rowid LIMIT ?)",
                (_EVICTION_BATCH,),
            )

    def _shrink(self) -> None:
        """Return free pages to the file system."""
        for _ in range(0, self._pragma("freelist_count"), _SHRINK_BATCH):
            with _pause_after():  # execute() would free one page only
                self._connection.executescript(f"PRAGMA incremental_vacuum({_SHRINK_BATCH})")

    def _bytes_of(self, page_count_pragma: str) -> int:
        return self._pragma(page_count_pragma) * self._pragma("page_size")

    def _pragma(self, name: str) -> int:
        return int(self._connection.execute(f"PRAGMA {name}").fetchone()[0])

    @contextlib.contextmanager
    def _transaction(self, kind: str) -> Iterator[None]:
        """Run the block as a transaction. IMMEDIATE waits for other writers at the start instead of in the middle."""
        self._connection.execute(f"BEGIN {kind}")
        try:
            yield
        except BaseException:
            if self._connection.in_transaction:  # some errors roll back by themselves
                self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")


@contextlib.contextmanager
def _pause_after() -> Iterator[None]:
    """Sleep after the block for half of the time it took.

    SQLite does not queue for locks but polls, so one transaction right after another would keep other processes out.
    """
    start = time.monotonic()
    yield
    time.sleep((time.monotonic() - start) / 2)


def _checksum(key: Key, tokens: object, served_model: object, numbers: object) -> bytes:
    """Return the checksum of a row's values, which may have any type in a damaged file."""
    digest = hashlib.blake2b(key, digest_size=8)
    digest.update(repr((tokens, served_model)).encode("utf-8", "backslashreplace"))
    digest.update(numbers if isinstance(numbers, bytes) else b"")
    return digest.digest()


def _stored_size(row: Row) -> int:
    """Return an upper estimate of a row's bytes in the file, indices included; measured with 64 to 4,096 dimensions.

    A page holds whole rows, so up to a third of it may stay empty.
    """
    return len(row.vector) * 4 // 3 + 150


def _current_hour() -> int:
    return int(time.time() // 3600)

"""The rows in an SQLite file, which several processes may have open at once. Synchronous; raises what SQLite raises.

Every change is one transaction in the write-ahead log: a process that is killed takes with it what it had not
committed, and nothing else. Every row has a checksum over all that is read of it, so that a row that is damaged, or
found under a key that is not its own, is a row that is not there.
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
"""The file's name in the folder of the cache."""

_APPLICATION_ID = 0x456D4243
"""Says of a file that it is ours: "EmBC"."""

_VERSION = 1
"""Of the tables below; files of other versions are left alone."""

_CLEARED = "cleared"
"""Subject of a note that is another one once everything was cleared; with a model's id, once that model was."""

_TABLES = """
CREATE TABLE source (
    id INTEGER PRIMARY KEY,
    model TEXT NOT NULL,
    origin TEXT NOT NULL,
    served_model TEXT NOT NULL,  -- empty where the model's own id is all there is
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

_BUSY_SECONDS = 2.0
"""Longest wait for other processes: as a rule they are done in milliseconds."""


_EVICTED_AT_ONCE = 64
_MOST_EVICTIONS = 256  # in one transaction, lest a bound that was lowered hold everybody up


class ForeignDatabase(Exception):
    """The file is no cache, or one of another version; the text says so for the end of a sentence."""


def is_damaged(error: Exception) -> bool:
    """Whether the error says that the file is broken, which it will be the next time too."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF  # the rest says where
    return code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


@dataclass(frozen=True, slots=True)
class Holding:
    """What a file holds of one model.

    Attributes:
        model: its id.
        origin: where its vectors were made.
        vectors: how many there are.
        bytes: of the vectors alone.
        last_used: seconds since 1970, to the hour.
    """

    model: str
    origin: str
    vectors: int
    bytes: int
    last_used: int


class Database:
    """An open file; made, with its folder, where there is none.

    May be used by several threads, one at a time.

    Args:
        path: the file.
        max_bytes: bound on what the file holds; the rows that were not used for longest make room for new ones.

    Raises:
        ForeignDatabase: the file belongs to something else.
        sqlite3.Error: it cannot be used.
        OSError: the folder cannot be made.
    """

    def __init__(self, path: Path, max_bytes: int = sys.maxsize) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            path.touch(mode=0o600)  # as private as the texts: vectors tell much about them
        self._path = path
        self._inode = path.stat().st_ino
        self._max_bytes = max_bytes
        self._connection = sqlite3.connect(
            path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=32
        )
        try:
            self._prepare_in_time()
        except UnicodeDecodeError as error:  # of what SQLite says, where it repeats a damaged name of a table
            self._connection.close()
            damaged = sqlite3.DatabaseError("malformed database schema")
            damaged.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise damaged from error
        except BaseException:
            self._connection.close()
            raise

    def get(self, keys: Iterable[Key]) -> dict[Key, Row]:
        """Those of the rows asked for that are here and undamaged."""
        now = _hour()
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
                if used != now:
                    stale.append(key)
        if stale:
            with self._transaction("IMMEDIATE"):
                self._connection.executemany("UPDATE vector SET used = ? WHERE key = ?", [(now, key) for key in stale])
        return found

    def put(self, rows: Mapping[Key, Row], *, model: str, origin: str) -> None:
        """Keep these rows, in the place of others under the same keys.

        Args:
            rows: what to keep; half of what the bound allows at most.
            model: the id of the model that made them.
            origin: where.
        """
        now = _hour()
        kept: list[tuple[Key, Row]] = []
        size = 0
        for key, row in rows.items():
            if size + _size_in_file(row) > self._max_bytes // 2:
                break
            size += _size_in_file(row)
            kept.append((key, row))
        with self._transaction("IMMEDIATE"):
            self._make_room(size)
            sources = {
                served_model: self._source(model, origin, served_model)
                for served_model in {row.served_model or "" for _, row in kept}
            }
            self._connection.executemany(
                "INSERT OR REPLACE INTO vector (key, used, source, tokens, checksum, numbers)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (
                        key,
                        now,
                        sources[row.served_model or ""],
                        row.tokens,
                        _checksum(key, row.tokens, row.served_model or "", row.vector),
                        row.vector,
                    )
                    for key, row in kept
                ],
            )
        if self._bytes_of("page_count") > self._max_bytes:
            self._shrink()

    def note(self, subject: str) -> str | None:
        """What was noted on this subject."""
        found = self._connection.execute("SELECT text FROM note WHERE subject = ?", (subject,)).fetchone()
        return None if found is None else str(found[0])

    def take_note(self, subject: str, text: str) -> None:
        """Note it, in the place of what was noted before."""
        with self._transaction("IMMEDIATE"):
            self._connection.execute("INSERT OR REPLACE INTO note VALUES (?, ?)", (subject, text))

    def generation(self, model: str) -> str:
        """What a model's rows have in common until they are cleared; no other file has the same."""
        return f"{self.note(_CLEARED)} {self.note(f'{_CLEARED} {model}')}"

    def holdings(self) -> list[Holding]:
        """What is here, by model; reads the whole file."""
        return [
            Holding(model, origin, vectors, size, used * 3600)
            for model, origin, vectors, size, used in self._connection.execute(
                "SELECT model, origin, count(*), sum(length(numbers)), max(used)"
                " FROM vector JOIN source ON source.id = vector.source GROUP BY model, origin ORDER BY model, origin"
            )
        ]

    def clear(self, model: str | None = None) -> int:
        """Forget everything, or one model's rows, and give the disk its space back.

        What was cleared has another `generation` from then on, and the file another time of change.

        Returns:
            How many rows there were.
        """
        with self._transaction("IMMEDIATE"):
            if model is None:
                forgotten = self._connection.execute("DELETE FROM vector").rowcount
            else:
                forgotten = self._connection.execute(
                    "DELETE FROM vector WHERE source IN (SELECT id FROM source WHERE model = ?)", (model,)
                ).rowcount
            self._renew(_CLEARED if model is None else f"{_CLEARED} {model}")
        now = time.time_ns()  # for that of files stands still for milliseconds
        os.utime(self._path, ns=(now, now))
        self._shrink()
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return forgotten

    def _renew(self, subject: str) -> None:
        """Note something that was never noted before."""
        self._connection.execute("INSERT OR REPLACE INTO note VALUES (?, hex(randomblob(8)))", (subject,))

    def is_in_place(self) -> bool:
        """Whether this is still the file that the path leads to."""
        try:
            return self._path.stat().st_ino == self._inode
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    # --- The steps ---------------------------------------------------------------------------------------------------

    def _prepare_in_time(self) -> None:
        """As SQLite does elsewhere, wait for a process that does the same: not so where the log is switched on."""
        deadline = time.monotonic() + _BUSY_SECONDS
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
        if not self._is_ours():
            # These two are possible before the first table only; another process may do the same at the same time.
            self._connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self._connection.execute("PRAGMA journal_mode = WAL")
            with self._transaction("IMMEDIATE"):
                if not self._is_ours():
                    for statement in _TABLES.split(";\n"):
                        self._connection.execute(statement)
                    self._renew(_CLEARED)
                    self._connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                    self._connection.execute(f"PRAGMA user_version = {_VERSION}")
        self._connection.execute("PRAGMA synchronous = NORMAL")  # a power cut may cost the last rows, and no others
        self._connection.execute(f"PRAGMA journal_size_limit = {16 << 20}")

    def _is_ours(self) -> bool:
        """Whether the tables are there.

        Raises:
            ForeignDatabase: others are.
        """
        if not self._pragma("schema_version"):  # an empty file
            return False
        if self._pragma("application_id") != _APPLICATION_ID:
            raise ForeignDatabase("it is a database of something else")
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

    def _make_room(self, wanted: int) -> None:
        """Let go of the rows that were not used for longest, until so many bytes more are within the bound."""
        for _ in range(_MOST_EVICTIONS):
            if self._bytes_of("page_count") - self._bytes_of("freelist_count") + wanted <= self._max_bytes:
                break
            self._connection.execute(
                "DELETE FROM vector WHERE rowid IN (SELECT rowid FROM vector ORDER BY used, rowid LIMIT ?)",
                (_EVICTED_AT_ONCE,),
            )

    def _shrink(self) -> None:
        """Give free pages back to the disk."""
        self._connection.executescript("PRAGMA incremental_vacuum")  # execute() gives back one page only

    def _bytes_of(self, pages: str) -> int:
        return self._pragma(pages) * self._pragma("page_size")

    def _pragma(self, name: str) -> int:
        return int(self._connection.execute(f"PRAGMA {name}").fetchone()[0])

    @contextlib.contextmanager
    def _transaction(self, kind: str) -> Iterator[None]:
        """All of the block or nothing. IMMEDIATE waits for other writers before it begins, not in the middle."""
        self._connection.execute(f"BEGIN {kind}")
        try:
            yield
        except BaseException:
            if self._connection.in_transaction:  # some errors have ended it
                self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")


def _checksum(key: Key, tokens: object, served_model: object, numbers: object) -> bytes:
    """Of what is read; in a damaged file that may be anything."""
    digest = hashlib.blake2b(key, digest_size=8)
    digest.update(repr((tokens, served_model)).encode("utf-8", "backslashreplace"))
    digest.update(numbers if isinstance(numbers, bytes) else b"")
    return digest.digest()


def _size_in_file(row: Row) -> int:
    """Bytes that a row takes, its indices included: rather more than measured with 64 to 4,096 numbers.

    A page holds whole rows, so that up to a third of it stays empty.
    """
    return len(row.vector) * 4 // 3 + 150


def _hour() -> int:
    return int(time.time() // 3600)

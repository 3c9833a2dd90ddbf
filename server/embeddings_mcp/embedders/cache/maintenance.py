"""Operator commands on the cache file: inspect and clear it, also while servers are using it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from embeddings_mcp.embedders.cache.database import FILE, Database, ForeignDatabase, Holding, is_damaged
from embeddings_mcp.errors import InvalidSetting


@dataclass(frozen=True, slots=True)
class Contents:
    """Contents of a cache file.

    Attributes:
        path: of the file.
        bytes: on disk; 0 if there is no file yet.
        holdings: one for each model and origin.
    """

    path: str
    bytes: int
    holdings: list[Holding]


def inspect_cache(folder: Path) -> Contents:
    """Return the contents of the cache in this folder; reads the whole file.

    Raises:
        InvalidSetting: the file cannot be used.
    """
    path = folder / FILE
    if not _exists(path):
        return Contents(str(path), 0, [])
    try:
        with closing(Database(path)) as database:
            holdings = database.holdings()
        size = sum(file.stat().st_size for file in _files(path))
    except (sqlite3.Error, ForeignDatabase, OSError) as error:
        raise _unusable(path, "used", error) from error
    return Contents(str(path), size, holdings)


def clear(folder: Path, model: str | None = None) -> int:
    """Clear the cache in this folder; a damaged file is removed.

    Args:
        folder: of the cache.
        model: clear only this model's vectors.

    Returns:
        The number of vectors cleared; 0 for a damaged file.

    Raises:
        InvalidSetting: the file is not a cache of this version, or cannot be used now.
    """
    path = folder / FILE
    if not _exists(path):
        return 0
    try:
        return _clear(path, model)
    except (sqlite3.Error, ForeignDatabase, OSError) as error:
        raise _unusable(path, "cleared", error) from error


def _clear(path: Path, model: str | None) -> int:
    try:
        with closing(Database(path)) as database:
            return database.clear(model)
    except sqlite3.Error as error:
        if not is_damaged(error):
            raise
    for file in _files(path):
        file.unlink(missing_ok=True)
    return 0


def _exists(path: Path) -> bool:
    """Return whether the file exists.

    Raises:
        InvalidSetting: the folder cannot be accessed, or the path is not valid.
    """
    try:
        path.stat()  # from Python 3.14 on, Path.exists returns False for any error
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _unusable(path, "used", error) from error
    return True


def _unusable(path: Path, verb: str, error: Exception) -> InvalidSetting:
    reason = error.strerror if isinstance(error, OSError) else error
    advice = ": `embeddings-mcp cache clear` removes it" if is_damaged(error) else ""
    return InvalidSetting(f"the cache {path} cannot be {verb}: {reason}{advice}")


def _files(path: Path) -> list[Path]:
    """Return SQLite's existing journal, WAL and shared-memory files, then the database.

    The database comes last, since running servers create a new one once it is removed.
    """
    companions = [path.with_name(f"{path.name}{suffix}") for suffix in ("-journal", "-wal", "-shm")]
    return [file for file in (*companions, path) if file.exists()]

"""What the operator may do with the file of a cache, also while servers use it: look into it, and empty it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from embeddings_mcp.embedders.cache.database import FILE, Database, ForeignDatabase, Holding, is_damaged
from embeddings_mcp.errors import InvalidSetting


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in a folder.

    Attributes:
        path: the file.
        bytes: that it takes on the disk; 0 where there is none yet.
        holdings: by model.
    """

    path: str
    bytes: int
    holdings: list[Holding]


def inspect_cache(folder: Path) -> Contents:
    """What the folder's cache holds; reads all of it.

    Raises:
        InvalidSetting: the file cannot be used.
    """
    path = folder / FILE
    if not _is_there(path):
        return Contents(str(path), 0, [])
    try:
        with closing(Database(path)) as database:
            holdings = database.holdings()
        size = sum(file.stat().st_size for file in _files(path))
    except (sqlite3.Error, ForeignDatabase, OSError) as error:
        raise _unusable(path, "used", error) from error
    return Contents(str(path), size, holdings)


def clear(folder: Path, model: str | None = None) -> int:
    """Forget what the folder's cache holds; a file that is damaged is removed.

    Args:
        folder: of the cache.
        model: forget this one's vectors only.

    Returns:
        How many vectors are forgotten, as far as they could be counted.

    Raises:
        InvalidSetting: the file is not ours, or cannot be used now.
    """
    path = folder / FILE
    if not _is_there(path):
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


def _is_there(path: Path) -> bool:
    """Whether there is a file.

    Raises:
        InvalidSetting: nobody may look there, or no file can have such a name.
    """
    try:
        path.stat()  # Path.exists says no to all errors, from Python 3.14 on
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
    """SQLite's journal, log and index, where they are, and the file: last, since once it is gone servers make anew."""
    beside = [path.with_name(f"{path.name}{ending}") for ending in ("-journal", "-wal", "-shm")]
    return [file for file in (*beside, path) if file.exists()]

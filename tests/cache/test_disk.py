"""The cache file: concurrent processes, crashes, damage and size bounds. Its failures never fail a request."""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import anyio
import numpy as np
import pytest

from embeddings_mcp.embedders.cache import Cache, DiskStore, MemoryStore, cached
from embeddings_mcp.embedders.cache.database import FILE, Database
from embeddings_mcp.embedders.cache.rows import Key, Row
from embeddings_mcp.errors import ModelUnavailable
from tests.cache.support import MB, TextByText, ask, expected, on_disk, read_only
from tests.cache.writer import MAX_BYTES, batch
from tests.support import Clock, stdio_process, wait_until

pytestmark = pytest.mark.anyio

TEXTS = ["one", "two", "three"]


@contextmanager
def database_in(folder: Path, max_bytes: int = MAX_BYTES) -> Iterator[Database]:
    with closing(Database(folder / FILE, max_bytes)) as database:
        yield database


def rows_of(count: int, *, dimensions: int = 384, seed: int = 0) -> dict[Key, Row]:
    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((count, dimensions)).astype("<f4")
    return {generator.bytes(32): Row(vector.tobytes(), 5) for vector in vectors}


async def filled(folder: Path) -> TextByText:
    """Return an embedder whose vectors for `TEXTS` are in the file."""
    source = TextByText()
    embedder = on_disk(source, DiskStore(folder, MB))
    await ask(embedder, TEXTS)
    await embedder.aclose()
    assert source.batches == [TEXTS]
    return source


async def check_answers(source: TextByText, folder: Path) -> None:
    """Check that a new cache gives the right vectors, whatever is in the folder."""
    embedder = on_disk(source, DiskStore(folder, MB))
    for _ in range(2):
        result = await ask(embedder, TEXTS)
        np.testing.assert_array_equal(result.vectors, expected(source, TEXTS))
        assert list(result.tokens) == [3, 3, 3]
    await embedder.aclose()


# --- Persistence -----------------------------------------------------------------------------------------------------


async def test_rows_outlive_the_process(tmp_path: Path) -> None:
    source = await filled(tmp_path)
    await check_answers(source, tmp_path)
    assert source.batches == [TEXTS]


async def test_rows_read_from_the_file_are_kept_in_memory(tmp_path: Path) -> None:
    source = await filled(tmp_path)
    embedder = cached(source, Cache(MemoryStore(MB), DiskStore(tmp_path, MB)))
    await ask(embedder, TEXTS)
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as connection:
        connection.execute("DELETE FROM vector")
    await ask(embedder, TEXTS)
    assert source.batches == [TEXTS]
    await embedder.aclose()


async def test_rows_completed_before_a_failure_or_cancellation_are_in_the_file(tmp_path: Path) -> None:
    source = TextByText(held={"two": anyio.Event()})
    embedder = on_disk(source, DiskStore(tmp_path, MB))
    async with anyio.create_task_group() as cancelled:
        cancelled.start_soon(ask, embedder, TEXTS)
        await wait_until(lambda: source.counts["one"])
        cancelled.cancel_scope.cancel()
    await embedder.aclose()

    source.held.clear()
    source.failures["three"] = ModelUnavailable("broken")
    embedder = on_disk(source, DiskStore(tmp_path, MB))
    with pytest.raises(ModelUnavailable):
        await ask(embedder, TEXTS)
    await embedder.aclose()

    source.failures.clear()
    await check_answers(source, tmp_path)
    assert source.batches == [TEXTS, TEXTS[1:], TEXTS[2:]]


def test_the_file_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    anyio.run(filled, folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}


async def test_the_file_holds_no_text(tmp_path: Path) -> None:
    source = TextByText()
    embedder = on_disk(source, DiskStore(tmp_path, MB))
    await ask(embedder, ["an unmistakable secret"], input_type="query")
    await embedder.aclose()
    assert b"unmistakable" not in (tmp_path / FILE).read_bytes()


async def test_a_request_is_one_transaction(tmp_path: Path) -> None:
    source = TextByText()
    embedder = on_disk(source, DiskStore(tmp_path, MB))
    await ask(embedder, ["a"])
    with closing(sqlite3.connect(tmp_path / FILE)) as observer:
        versions = []
        for texts in (["b", "c", "d", "a"], ["a", "b"]):
            await ask(embedder, texts)
            versions.append(observer.execute("PRAGMA data_version").fetchone()[0])
        assert versions[0] == versions[1]  # reading alone changes nothing
    await embedder.aclose()


def test_several_processes_open_and_fill_one_file_concurrently(tmp_path: Path) -> None:
    def write(name: str) -> int:
        with writer(tmp_path, name) as process:
            return acknowledged(process, 10)

    names = [f"writer {number}" for number in range(4)]
    with ThreadPoolExecutor(4) as threads:
        lasts = list(threads.map(write, names))
    check_batches(tmp_path, dict(zip(names, lasts, strict=True)))


def test_a_process_that_is_killed_loses_nothing_that_was_committed(tmp_path: Path) -> None:
    lasts: dict[str, int] = {}
    for number in range(6):
        name = f"writer {number}"
        with writer(tmp_path, name) as process:
            lasts[name] = acknowledged(process, 3 * number + 1)
            process.kill()  # at an arbitrary point
            process.wait(10)
        check_batches(tmp_path, lasts)


def writer(folder: Path, name: str) -> AbstractContextManager[subprocess.Popen[str]]:
    return stdio_process(sys.executable, "-m", "tests.cache.writer", str(folder), name)


def acknowledged(process: subprocess.Popen[str], batches: int) -> int:
    """Wait for this many batches to be committed; return the number of the last."""
    assert process.stdout is not None
    last = -1
    for _ in range(batches):
        line = process.stdout.readline()
        assert line, "the process ended"
        last = int(line)
    return last


def check_batches(folder: Path, lasts: dict[str, int]) -> None:
    """Check that every acknowledged batch is in the file, bit for bit, and that the file is intact."""
    with database_in(folder) as database:
        assert database._connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        for name, last in lasts.items():
            for number in range(last + 1):
                rows = batch(name, number)
                assert database.get(rows) == rows


# --- Bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [64, 384, 1024, 4096])
def test_the_file_stays_within_its_bound(tmp_path: Path, dimensions: int) -> None:
    with database_in(tmp_path, 4 * MB) as database:
        for seed in range(30):
            last = rows_of(MB // 4 // dimensions // 4, dimensions=dimensions, seed=seed)
            database.put(last, model="m", origin="local")
            assert database.get(last) == last
        database.put(rows_of(8 * MB // 4 // dimensions, dimensions=dimensions, seed=99), model="m", origin="local")
    size = (tmp_path / FILE).stat().st_size
    assert 2 * MB < size < 4.2 * MB


def test_a_lowered_bound_is_enforced_when_the_next_rows_are_stored(tmp_path: Path) -> None:
    with database_in(tmp_path) as database:
        database.put(rows_of(4000), model="m", origin="local")
    with database_in(tmp_path, MB) as database:
        new = rows_of(10, seed=1)
        database.put(new, model="m", origin="local")
        assert database.get(new) == new
    assert (tmp_path / FILE).stat().st_size < 1.1 * MB


def test_the_least_recently_used_rows_are_evicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    with database_in(tmp_path, 2 * MB) as database:
        old, older = rows_of(100, seed=1), rows_of(100, seed=2)
        for rows in (old, older):
            database.put(rows, model="m", origin="local")
            now += 3600
        assert database.get(old) == old  # now the most recently used
        for seed in range(3, 11):
            now += 3600
            database.put(rows_of(100, seed=seed), model="m", origin="local")
        assert database.get(old) == old
        assert len(database.get(older)) < 100


# --- Unusable files --------------------------------------------------------------------------------------------------


def garbage(path: Path) -> None:
    path.write_bytes(b"no database at all " * 1000)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwritten(path: Path) -> None:
    """Overwrite all but the first page, which identifies the file."""
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))


def other_version(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")


def other_application(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE vector (key)")


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def without_tables(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE vector")


@pytest.mark.parametrize(
    "damage", [garbage, cut_in_half, overwritten, other_version, other_application, folder_instead, without_tables]
)
async def test_requests_continue_without_an_unusable_file_after_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    source = await filled(tmp_path)
    damage(tmp_path / FILE)
    await check_answers(source, tmp_path)
    assert len(source.batches) == 3
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert f"the cache {tmp_path / FILE} cannot be used: " in warning.message
    assert "requests continue without it" in warning.message


def remove_files(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


async def test_a_file_removed_while_open_is_replaced_by_a_new_one(tmp_path: Path) -> None:
    source = TextByText()
    embedder = on_disk(source, DiskStore(tmp_path, MB))
    await ask(embedder, TEXTS)
    remove_files(tmp_path)
    for _ in range(2):
        await ask(embedder, TEXTS)
    assert source.batches == [TEXTS] * 2
    await embedder.aclose()
    await check_answers(source, tmp_path)
    assert source.batches == [TEXTS] * 2


async def test_a_row_with_a_wrong_checksum_is_ignored(tmp_path: Path) -> None:
    source = await filled(tmp_path)
    one, latest = "(SELECT min(rowid) FROM vector)", "(SELECT max(rowid) FROM source)"
    for table, row, change in (
        ("vector", one, "numbers = zeroblob(32)"),
        ("vector", one, "numbers = 'text'"),
        ("vector", one, "numbers = (SELECT numbers FROM vector ORDER BY rowid DESC)"),
        ("vector", one, "tokens = tokens + 1"),
        ("vector", one, "tokens = 'many'"),
        ("vector", one, "source = 99"),
        ("vector", one, "checksum = 'wrong'"),
        ("source", latest, "served_model = 'another'"),
        ("source", latest, "id = 99"),
        ("source", latest, "served_model = CAST(x'ff' AS TEXT)"),
    ):
        with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as connection:
            connection.execute(f"UPDATE {table} SET {change} WHERE rowid = {row}")  # noqa: S608
        del source.batches[:]
        await check_answers(source, tmp_path)
        assert source.batches, change


async def test_a_row_under_another_rows_key_is_ignored(tmp_path: Path) -> None:
    source = await filled(tmp_path)
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as connection:
        (one,), (other,), _ = connection.execute("SELECT key FROM vector").fetchall()
        for before, after in ((one, b""), (other, one), (b"", other)):
            connection.execute("UPDATE vector SET key = ? WHERE key = ?", (after, before))
    await check_answers(source, tmp_path)
    assert [len(batch) for batch in source.batches] == [3, 2]


async def test_a_locked_file_is_skipped_and_tried_again_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embeddings_mcp.embedders.cache.database._LOCK_TIMEOUT_SECONDS", 0.01)
    clock = Clock()
    monkeypatch.setattr("embeddings_mcp.embedders.cache.disk.time", clock)
    source = TextByText()
    embedder = on_disk(source, DiskStore(tmp_path, MB))
    await ask(embedder, ["zero"])
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as locker:
        locker.execute("BEGIN IMMEDIATE")
        for _ in range(3):
            await ask(embedder, TEXTS)
            clock.now += 60
        await ask(embedder, TEXTS)
        locker.execute("ROLLBACK")
    await ask(embedder, TEXTS)  # the file is not tried during the pause
    assert source.batches == [["zero"], *[TEXTS] * 5]
    assert ["database is locked" in record.message for record in caplog.records] == [True]

    clock.now += 60
    for _ in range(2):
        await ask(embedder, [*TEXTS, "zero"])
    assert source.batches[6:] == [TEXTS]
    await embedder.aclose()


async def test_requests_continue_when_the_disk_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = await filled(tmp_path)
    disk = DiskStore(tmp_path, MB)
    embedder = on_disk(source, disk)
    await ask(embedder, TEXTS)
    assert disk._database is not None
    disk._database._connection.execute("PRAGMA max_page_count = 1")  # to SQLite, a full disk
    many = [str(number) for number in range(1000)]
    for _ in range(2):
        result = await ask(embedder, many)
        np.testing.assert_array_equal(result.vectors, expected(source, many))
    assert ["full" in record.message for record in caplog.records] == [True]
    await embedder.aclose()


async def test_requests_continue_when_the_file_is_read_only(caplog: pytest.LogCaptureFixture) -> None:
    # Not in tmp_path, which only its owner can access.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = await filled(folder)
        with read_only(folder):
            await check_answers(source, folder)
    assert len(source.batches) == 3
    assert ["cannot be used" in record.message for record in caplog.records] == [True]


async def test_a_closed_cache_is_empty_and_stores_nothing(tmp_path: Path) -> None:
    disk = DiskStore(tmp_path, MB)
    source = TextByText()
    embedder = on_disk(source, disk)
    await ask(embedder, TEXTS)
    for _ in range(2):
        await embedder.aclose()
    await ask(embedder, TEXTS)
    assert source.batches == [TEXTS] * 2


async def test_a_note_is_computed_once(tmp_path: Path) -> None:
    for answer in ("blue", "green"):
        disk = DiskStore(tmp_path, MB)
        assert disk.get_or_compute_note("the sky", lambda answer=answer: answer) == "blue"  # type: ignore[misc]
        await disk.aclose()
    garbage(tmp_path / FILE)
    assert DiskStore(tmp_path, MB).get_or_compute_note("the sky", lambda: "gray") == "gray"

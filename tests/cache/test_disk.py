"""The file: several processes, sudden ends, damage, and bounds. What is wrong with it is never a request's problem."""

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
from tests.cache.support import MB, TextByText, ask, expected, on_disk, only_reading
from tests.cache.writer import MAX_BYTES, batch
from tests.support import over_stdio, until

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
    """A source whose vectors for `TEXTS` are in the file."""
    source = TextByText()
    embedder = on_disk(source, DiskStore(folder, MB))
    await ask(embedder, TEXTS)
    await embedder.aclose()
    assert source.batches == [TEXTS]
    return source


async def answered(source: TextByText, folder: Path) -> None:
    """A server of its own answers rightly, whatever is in the folder."""
    embedder = on_disk(source, DiskStore(folder, MB))
    for _ in range(2):
        made = await ask(embedder, TEXTS)
        np.testing.assert_array_equal(made.vectors, expected(source, TEXTS))
        assert list(made.tokens) == [3, 3, 3]
    await embedder.aclose()


# --- What outlives a process -----------------------------------------------------------------------------------------


async def test_the_next_process_finds_what_this_one_made(tmp_path: Path) -> None:
    source = await filled(tmp_path)
    await answered(source, tmp_path)
    assert source.batches == [TEXTS]


async def test_what_is_read_from_the_file_is_read_once(tmp_path: Path) -> None:
    source = await filled(tmp_path)
    embedder = cached(source, Cache(MemoryStore(MB), DiskStore(tmp_path, MB)))
    await ask(embedder, TEXTS)
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as connection:
        connection.execute("DELETE FROM vector")
    await ask(embedder, TEXTS)
    assert source.batches == [TEXTS]
    await embedder.aclose()


async def test_what_was_made_before_a_request_ended_badly_is_in_the_file(tmp_path: Path) -> None:
    source = TextByText(held={"two": anyio.Event()})
    embedder = on_disk(source, DiskStore(tmp_path, MB))
    async with anyio.create_task_group() as leaving:
        leaving.start_soon(ask, embedder, TEXTS)
        await until(lambda: source.made["one"])
        leaving.cancel_scope.cancel()
    await embedder.aclose()

    source.held.clear()
    source.failures["three"] = ModelUnavailable("broken")
    embedder = on_disk(source, DiskStore(tmp_path, MB))
    with pytest.raises(ModelUnavailable):
        await ask(embedder, TEXTS)
    await embedder.aclose()

    source.failures.clear()
    await answered(source, tmp_path)
    assert source.batches == [TEXTS, TEXTS[1:], TEXTS[2:]]


def test_the_file_is_nobody_elses_to_read(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "for us"
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
    with closing(sqlite3.connect(tmp_path / FILE)) as watching:
        versions = []
        for texts in (["b", "c", "d", "a"], ["a", "b"]):
            await ask(embedder, texts)
            versions.append(watching.execute("PRAGMA data_version").fetchone()[0])
        assert versions[0] == versions[1]  # what is only read changes nothing
    await embedder.aclose()


def test_several_processes_open_and_fill_one_file_at_once(tmp_path: Path) -> None:
    def write(name: str) -> int:
        with writing(tmp_path, name) as process:
            return acknowledged(process, 10)

    names = [f"writer {number}" for number in range(4)]
    with ThreadPoolExecutor(4) as threads:
        lasts = list(threads.map(write, names))
    check(tmp_path, dict(zip(names, lasts, strict=True)))


def test_a_process_that_is_killed_loses_nothing_that_was_committed(tmp_path: Path) -> None:
    lasts: dict[str, int] = {}
    for number in range(6):
        name = f"writer {number}"
        with writing(tmp_path, name) as process:
            lasts[name] = acknowledged(process, 3 * number + 1)
            process.kill()  # in the middle of whatever it does now
            process.wait(10)
        check(tmp_path, lasts)


def writing(folder: Path, name: str) -> AbstractContextManager[subprocess.Popen[str]]:
    return over_stdio(sys.executable, "-m", "tests.cache.writer", str(folder), name)


def acknowledged(process: subprocess.Popen[str], batches: int) -> int:
    """The number of the last of so many batches, once it is committed."""
    assert process.stdout is not None
    last = -1
    for _ in range(batches):
        line = process.stdout.readline()
        assert line, "the process ended"
        last = int(line)
    return last


def check(folder: Path, lasts: dict[str, int]) -> None:
    """Every batch that was acknowledged is in the file, bit for bit, and the file is sound."""
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


def test_a_bound_that_was_lowered_is_kept_from_the_next_rows_on(tmp_path: Path) -> None:
    with database_in(tmp_path) as database:
        database.put(rows_of(4000), model="m", origin="local")
    with database_in(tmp_path, MB) as database:
        new = rows_of(10, seed=1)
        database.put(new, model="m", origin="local")
        assert database.get(new) == new
    assert (tmp_path / FILE).stat().st_size < 1.1 * MB


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    with database_in(tmp_path, 2 * MB) as database:
        old, older = rows_of(100, seed=1), rows_of(100, seed=2)
        for rows in (old, older):
            database.put(rows, model="m", origin="local")
            now += 3600
        assert database.get(old) == old  # so that the older ones are younger now
        for seed in range(3, 11):
            now += 3600
            database.put(rows_of(100, seed=seed), model="m", origin="local")
        assert database.get(old) == old
        assert len(database.get(older)) < 100


# --- What is wrong with the file -------------------------------------------------------------------------------------


def garbage(path: Path) -> None:
    path.write_bytes(b"no database at all " * 1000)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def torn_page(path: Path) -> None:
    """All but the first page, which says what the file is."""
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))


def another_version(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")


def of_something_else(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE vector (key)")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def without_tables(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE vector")


@pytest.mark.parametrize(
    "spoil", [garbage, cut_in_half, torn_page, another_version, of_something_else, a_folder, without_tables]
)
async def test_a_file_that_cannot_be_used_is_done_without_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None]
) -> None:
    source = await filled(tmp_path)
    spoil(tmp_path / FILE)
    await answered(source, tmp_path)
    assert len(source.batches) == 3
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert f"the cache {tmp_path / FILE} cannot be used: " in warning.message
    assert "requests go on without it" in warning.message


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


async def test_what_is_removed_is_forgotten_by_who_has_it_open_and_a_new_file_takes_its_place(tmp_path: Path) -> None:
    source = TextByText()
    embedder = on_disk(source, DiskStore(tmp_path, MB))
    await ask(embedder, TEXTS)
    empty(tmp_path)
    for _ in range(2):
        await ask(embedder, TEXTS)
    assert source.batches == [TEXTS] * 2
    await embedder.aclose()
    await answered(source, tmp_path)
    assert source.batches == [TEXTS] * 2


async def test_a_row_is_not_believed_when_its_checksum_is_wrong(tmp_path: Path) -> None:
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
        await answered(source, tmp_path)
        assert source.batches, change


async def test_a_row_under_another_rows_key_is_not_believed(tmp_path: Path) -> None:
    source = await filled(tmp_path)
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as connection:
        (one,), (other,), _ = connection.execute("SELECT key FROM vector").fetchall()
        for before, after in ((one, b""), (other, one), (b"", other)):
            connection.execute("UPDATE vector SET key = ? WHERE key = ?", (after, before))
    await answered(source, tmp_path)
    assert [len(batch) for batch in source.batches] == [3, 2]


async def test_a_file_that_is_locked_is_done_without_and_tried_again_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embeddings_mcp.embedders.cache.database._BUSY_SECONDS", 0.01)
    source = TextByText()
    disk = DiskStore(tmp_path, MB)
    embedder = on_disk(source, disk)
    await ask(embedder, ["zero"])
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as locking:
        locking.execute("BEGIN IMMEDIATE")
        for _ in range(3):
            await ask(embedder, TEXTS)
            disk._unused_until = time.monotonic()
        await ask(embedder, TEXTS)
        locking.execute("ROLLBACK")
    await ask(embedder, TEXTS)  # as long as the pause lasts, nobody looks
    assert source.batches == [["zero"], *[TEXTS] * 5]
    assert ["database is locked" in record.message for record in caplog.records] == [True]

    disk._unused_until = time.monotonic()
    for _ in range(2):
        await ask(embedder, [*TEXTS, "zero"])
    assert source.batches[6:] == [TEXTS]
    await embedder.aclose()


async def test_a_disk_that_is_full_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = await filled(tmp_path)
    disk = DiskStore(tmp_path, MB)
    embedder = on_disk(source, disk)
    await ask(embedder, TEXTS)
    assert disk._database is not None
    disk._database._connection.execute("PRAGMA max_page_count = 1")  # to SQLite, a disk without room
    many = [str(number) for number in range(1000)]
    for _ in range(2):
        made = await ask(embedder, many)
        np.testing.assert_array_equal(made.vectors, expected(source, many))
    assert ["full" in record.message for record in caplog.records] == [True]
    await embedder.aclose()


async def test_a_file_that_may_only_be_read_is_done_without(caplog: pytest.LogCaptureFixture) -> None:
    # Not in tmp_path, into which only its owner may look.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = await filled(folder)
        with only_reading(folder):
            await answered(source, folder)
    assert len(source.batches) == 3
    assert ["cannot be used" in record.message for record in caplog.records] == [True]


async def test_a_closed_cache_is_empty_and_keeps_nothing(tmp_path: Path) -> None:
    disk = DiskStore(tmp_path, MB)
    source = TextByText()
    embedder = on_disk(source, disk)
    await ask(embedder, TEXTS)
    for _ in range(2):
        await embedder.aclose()
    await ask(embedder, TEXTS)
    assert source.batches == [TEXTS] * 2


async def test_what_was_found_out_once_is_noted(tmp_path: Path) -> None:
    for answer in ("blue", "green"):
        disk = DiskStore(tmp_path, MB)
        assert disk.noted("the sky", lambda answer=answer: answer) == "blue"  # type: ignore[misc]
        await disk.aclose()
    garbage(tmp_path / FILE)
    assert DiskStore(tmp_path, MB).noted("the sky", lambda: "grey") == "grey"

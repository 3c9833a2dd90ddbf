"""The commands ``cache info`` and ``cache clear``."""

from __future__ import annotations

import json
import sqlite3
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np
import pytest

from embeddings_mcp.assemble import build_service
from embeddings_mcp.embedders.cache import DiskStore
from embeddings_mcp.embedders.cache.database import FILE, Database
from embeddings_mcp.embedders.cache.rows import Row
from embeddings_mcp.faces.cli import commands
from embeddings_mcp.settings import EndpointSettings, Settings
from embeddings_mcp.vectors import FloatMatrix
from tests.cache.support import ASYMMETRIC, MB, TextByText, ask, on_disk, read_only
from tests.nim.standin import SYMMETRIC, StandIn, held, stand_in
from tests.support import SECONDS, Clock, HashEmbedder, http_server

Cache = Callable[..., str]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cache:
    """Runs ``embeddings-mcp cache`` and returns its output, or its error message if it fails."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["embeddings-mcp", "cache", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        captured = capsys.readouterr()
        return captured.err if ended.value.code else captured.out

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache with three vectors of one model and two of another."""
    anyio.run(fill, tmp_path)
    return tmp_path


async def fill(folder: Path) -> None:
    for embedder, texts in ((TextByText(), ["a", "b", "c"]), (HashEmbedder(), ["a", "b"])):
        cached = on_disk(embedder, DiskStore(folder, MB))
        await ask(cached, texts)
        await cached.aclose()


def vectors_by_model(output: str) -> dict[str, Any]:
    return {holding["model"]: holding["vectors"] for holding in json.loads(output)["holdings"]}


def test_info_lists_the_vectors_of_each_model(cache: Cache, folder: Path) -> None:
    info = json.loads(cache("info", "--cache", folder, "--json"))
    assert info["path"] == str(folder / FILE)
    assert info["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert [(held["model"], held["origin"], held["vectors"], held["bytes"]) for held in info["holdings"]] == [
        (ASYMMETRIC.id, "local", 3, 96),
        ("test/hash", "local", 2, 64),
    ]
    table = cache("info", "--cache", folder)
    assert all(name in table for name in (ASYMMETRIC.id, "test/hash"))


def test_clear_removes_the_vectors_of_one_model_or_all(cache: Cache, folder: Path) -> None:
    assert cache("clear", "--cache", folder, "--model", "test/none") == (
        f"0 vectors removed: the cache has none of test/none, only of {ASYMMETRIC.id}, test/hash\n"
    )
    assert cache("clear", "--cache", folder, "--model", "test/hash") == "2 vectors removed\n"
    assert vectors_by_model(cache("info", "--cache", folder, "--json")) == {ASYMMETRIC.id: 3}
    assert json.loads(cache("clear", "--cache", folder, "--json")) == {"removed": 3}
    assert vectors_by_model(cache("info", "--cache", folder, "--json")) == {}


def test_clear_accepts_a_models_aliases(cache: Cache, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDINGS_MCP_CARDS", '[{"id": "test/hash", "aliases": ["hash"]}]')
    assert cache("clear", "--cache", folder, "--model", "HASH") == "2 vectors removed\n"


def test_a_cache_in_use_can_be_inspected_and_cleared(cache: Cache, tmp_path: Path) -> None:
    source = TextByText()
    embedder = on_disk(source, DiskStore(tmp_path, MB))

    async def use() -> None:
        await ask(embedder, ["a", "b"])

    for _ in range(2):
        anyio.run(use)
        assert vectors_by_model(cache("info", "--cache", tmp_path, "--json")) == {ASYMMETRIC.id: 2}
        assert cache("clear", "--cache", tmp_path) == "2 vectors removed\n"
    anyio.run(embedder.aclose)
    assert source.counts == {"a": 2, "b": 2}


@asynccontextmanager
async def server(nim: StandIn, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """HTTP client of a server whose cache is in the folder and whose endpoint is the stand-in."""
    settings = Settings(endpoints=(EndpointSettings(url=nim.url),), cache=str(folder))
    with http_server(build_service(settings)) as url, anyio.fail_after(SECONDS):
        async with httpx.AsyncClient(base_url=url, timeout=SECONDS) as http:
            yield http


async def embedded(http: httpx.AsyncClient, *texts: str, model: str = SYMMETRIC.id) -> FloatMatrix:
    """Embed the texts with the server."""
    body = {"model": model, "input": texts, "input_type": "passage"}
    answer = await http.post("/v1/embeddings", json=body)
    return np.array([row["embedding"] for row in answer.raise_for_status().json()["data"]], np.float32)


def swap(nim: StandIn) -> None:
    """Replace the model behind the same id."""
    nim.models = {**nim.models, SYMMETRIC.id: replace(SYMMETRIC, default_prompt="another model: ")}


def vectors_of(nim: StandIn, *texts: str) -> FloatMatrix:
    """Return the vectors that the stand-in's current model produces."""
    return np.stack([nim.vector(text, SYMMETRIC.id) for text in texts])


def damage(path: Path) -> None:
    """Overwrite the first page of a file that a server has open."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # or the page would be read from the WAL
    with path.open("r+b") as file:
        file.write(b"no database at all " * 200)


@pytest.mark.anyio
@pytest.mark.parametrize("model", [[], ["--model", SYMMETRIC.id]], ids=["all", "one model"])
@pytest.mark.parametrize("damaged", [False, True], ids=["sound", "damaged"])
async def test_a_running_server_does_not_return_cleared_vectors(
    cache: Cache, tmp_path: Path, model: list[str], damaged: bool
) -> None:
    async with stand_in() as nim, server(nim, tmp_path) as http:
        await embedded(http, "a")
        if damaged:
            damage(tmp_path / FILE)
            await embedded(http, "a")  # which is cached in memory only
        before = len(nim.seen)
        swap(nim)
        output = "0 vectors removed\n" if damaged else "1 vectors removed\n"
        assert cache("clear", "--cache", tmp_path, *model) == output
        for _ in range(2):
            np.testing.assert_array_equal(await embedded(http, "a", "b"), vectors_of(nim, "a", "b"))
        assert [seen.json["input"] for seen in nim.seen[before:]] == [["a", "b"]]


@pytest.mark.anyio
async def test_rows_computed_while_the_cache_is_cleared_are_not_found(cache: Cache, tmp_path: Path) -> None:
    event = anyio.Event()
    async with stand_in(faults=iter([None, held(event)])) as nim, server(nim, tmp_path) as http:
        await embedded(http, "a")
        async with anyio.create_task_group() as callers:
            callers.start_soon(embedded, http, "b")
            await nim.received(len(nim.seen) + 1)
            swap(nim)
            cache("clear", "--cache", tmp_path, "--model", SYMMETRIC.id)
            np.testing.assert_array_equal(await embedded(http, "b"), vectors_of(nim, "b"))
            event.set()
        async with server(nim, tmp_path) as other_server:
            for client in (http, other_server):
                np.testing.assert_array_equal(await embedded(client, "a", "b"), vectors_of(nim, "a", "b"))


@pytest.mark.anyio
async def test_clearing_one_model_keeps_the_vectors_of_others(cache: Cache, tmp_path: Path) -> None:
    async with stand_in() as nim, server(nim, tmp_path) as http:
        await embedded(http, "a", model=ASYMMETRIC.id)
        cache("clear", "--cache", tmp_path, "--model", SYMMETRIC.id)
        await embedded(http, "a", model=ASYMMETRIC.id)
        assert len([seen for seen in nim.seen if seen.body]) == 1


def test_clear_releases_the_disk_space(cache: Cache, tmp_path: Path) -> None:
    async def fill_cache() -> None:
        embedder = on_disk(TextByText(), DiskStore(tmp_path, 100 * MB))
        await ask(embedder, [str(number) for number in range(10_000)])
        await embedder.aclose()

    anyio.run(fill_cache)
    assert (tmp_path / FILE).stat().st_size > MB
    cache("clear", "--cache", tmp_path)
    assert (tmp_path / FILE).stat().st_size < MB // 10


@pytest.mark.parametrize("model", [[], ["--model", ASYMMETRIC.id]], ids=["all", "one model"])
def test_servers_can_write_while_a_large_cache_is_cleared(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: list[str]
) -> None:
    rows = {number.to_bytes(32, "big"): Row(bytes(32), 3) for number in range(2_500)}
    left: list[int] = []

    def store_row(_pause: float) -> None:
        with closing(Database(tmp_path / FILE)) as server:
            server.put(
                {(10_000 + len(left)).to_bytes(32, "big"): Row(bytes(32), 3)}, model=ASYMMETRIC.id, origin="local"
            )
            left.append(sum(holding.vectors for holding in server.holdings()) - len(left) - 1)

    with closing(Database(tmp_path / FILE)) as database:
        database.put(rows, model=ASYMMETRIC.id, origin="local")
    monkeypatch.setattr("embeddings_mcp.embedders.cache.database.time.sleep", store_row)
    monkeypatch.setattr("embeddings_mcp.embedders.cache.database._LOCK_TIMEOUT_SECONDS", 0)
    assert cache("clear", "--cache", tmp_path, *model) == "2,500 vectors removed\n"
    assert left[:3] == [1_500, 500, 0]
    assert vectors_by_model(cache("info", "--cache", tmp_path, "--json")) == {ASYMMETRIC.id: len(left)}


def test_a_folder_without_a_cache_is_empty_and_stays_unchanged(cache: Cache, tmp_path: Path) -> None:
    assert vectors_by_model(cache("info", "--cache", tmp_path / "none", "--json")) == {}
    assert cache("clear", "--cache", tmp_path / "none") == "0 vectors removed\n"
    assert list(tmp_path.iterdir()) == []


def test_a_cache_without_a_folder_is_refused(cache: Cache, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    error = (
        "embeddings-mcp: the cache has no folder: set one with --cache DIR or EMBEDDINGS_MCP_CACHE; a cache in memory "
        "is cleared by restarting the server\n"
    )
    assert cache("info") == cache("clear", "--cache", "off") == error
    monkeypatch.setenv("EMBEDDINGS_MCP_CACHE", str(folder))
    assert "test/hash" in cache("info")


def test_a_damaged_file_is_reported_and_removed_by_clear(cache: Cache, folder: Path) -> None:
    (folder / FILE).write_bytes(b"no database at all " * 1000)
    assert "file is not a database: `embeddings-mcp cache clear` removes it" in cache("info", "--cache", folder)
    assert cache("clear", "--cache", folder) == "0 vectors removed\n"
    assert list(folder.iterdir()) == []


def test_a_file_with_a_damaged_schema_is_removed_too(cache: Cache, folder: Path) -> None:
    path = folder / FILE
    path.write_bytes(path.read_bytes().replace(b"NOT NULL", b"NOT NUL\xff"))
    assert "malformed database schema: `embeddings-mcp cache clear` removes it" in cache("info", "--cache", folder)
    cache("clear", "--cache", folder)
    assert "no vectors are cached there yet" in cache("info", "--cache", folder)


def test_a_read_only_file_is_left_unchanged_with_an_error_of_one_line(cache: Cache) -> None:
    # Not in tmp_path, which only its owner can access.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        anyio.run(fill, folder)
        cache("info", "--cache", folder)  # imports what the commands need, which another user may not be able to read
        with read_only(folder):
            for action, verb in (("info", "used"), ("clear", "cleared")):
                output = cache(action, "--cache", folder)
                assert output.startswith(f"embeddings-mcp: the cache {folder / FILE} cannot be {verb}: ")
                assert output.count("\n") == 1
        (folder / FILE).write_bytes(b"no database at all " * 1000)
        with read_only(folder):
            error = f"embeddings-mcp: the cache {folder / FILE} cannot be cleared: Permission denied\n"
            assert cache("clear", "--cache", folder) == error


def test_other_files_next_to_a_damaged_one_are_left_alone(cache: Cache, folder: Path) -> None:
    others = [folder / f"{FILE}.backup-2026", folder / f"{FILE}-walnuts"]
    for path in (folder / FILE, *others):
        path.write_bytes(b"no database at all " * 1000)
    assert json.loads(cache("clear", "--cache", folder, "--json")) == {"removed": 0}
    assert sorted(folder.iterdir()) == sorted(others)


def test_a_server_uses_the_cache_again_once_a_damaged_file_was_cleared(
    cache: Cache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("embeddings_mcp.embedders.cache.disk.time", clock)
    (folder / FILE).write_bytes(b"no database at all " * 1000)
    source = TextByText()
    embedder = on_disk(source, DiskStore(folder, MB))

    async def use() -> None:
        await ask(embedder, ["a"])

    anyio.run(use)
    cache("clear", "--cache", folder)
    clock.now += 60
    for _ in range(2):
        anyio.run(use)
    anyio.run(embedder.aclose)
    assert source.counts == {"a": 2}
    assert vectors_by_model(cache("info", "--cache", folder, "--json")) == {ASYMMETRIC.id: 1}


def test_a_file_of_another_application_is_left_alone(cache: Cache, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.execute("CREATE TABLE vector (key)")
    before = (tmp_path / FILE).read_bytes()
    for action, verb in (("info", "used"), ("clear", "cleared")):
        error = (
            f"embeddings-mcp: the cache {tmp_path / FILE} cannot be {verb}: it is the database of another application\n"
        )
        assert cache(action, "--cache", tmp_path) == error
    assert (tmp_path / FILE).read_bytes() == before

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
from embeddings_mcp.embedders.cache.database import FILE
from embeddings_mcp.faces.cli import commands
from embeddings_mcp.settings import EndpointSettings, Settings
from embeddings_mcp.vectors import FloatMatrix
from tests.cache.support import ASYMMETRIC, MB, TextByText, ask, on_disk, only_reading
from tests.nim.standin import SYMMETRIC, StandIn, held, stand_in
from tests.support import SECONDS, Clock, HashEmbedder, served

Cache = Callable[..., str]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cache:
    """Runs ``embeddings-mcp cache`` and gives what it says, or the one line with which it refuses."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["embeddings-mcp", "cache", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        captured = capsys.readouterr()
        return captured.err if ended.value.code else captured.out

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds three vectors of one model, and two of another."""
    anyio.run(remember, tmp_path)
    return tmp_path


async def remember(folder: Path) -> None:
    for embedder, texts in ((TextByText(), ["a", "b", "c"]), (HashEmbedder(), ["a", "b"])):
        behind = on_disk(embedder, DiskStore(folder, MB))
        await ask(behind, texts)
        await behind.aclose()


def vectors_by_model(said: str) -> dict[str, Any]:
    return {holding["model"]: holding["vectors"] for holding in json.loads(said)["holdings"]}


def test_info_says_what_of_which_model_is_there(cache: Cache, folder: Path) -> None:
    told = json.loads(cache("info", "--cache", folder, "--json"))
    assert told["path"] == str(folder / FILE)
    assert told["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert [(it["model"], it["origin"], it["vectors"], it["bytes"]) for it in told["holdings"]] == [
        (ASYMMETRIC.id, "local", 3, 96),
        ("test/hash", "local", 2, 64),
    ]
    table = cache("info", "--cache", folder)
    assert all(name in table for name in (ASYMMETRIC.id, "test/hash"))


def test_clear_forgets_one_model_or_all(cache: Cache, folder: Path) -> None:
    assert cache("clear", "--cache", folder, "--model", "test/none") == (
        f"0 vectors forgotten: the cache has none of test/none, only of {ASYMMETRIC.id}, test/hash\n"
    )
    assert cache("clear", "--cache", folder, "--model", "test/hash") == "2 vectors forgotten\n"
    assert vectors_by_model(cache("info", "--cache", folder, "--json")) == {ASYMMETRIC.id: 3}
    assert json.loads(cache("clear", "--cache", folder, "--json")) == {"forgotten": 3}
    assert vectors_by_model(cache("info", "--cache", folder, "--json")) == {}


def test_clear_knows_a_model_by_its_other_names(cache: Cache, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDINGS_MCP_CARDS", '[{"id": "test/hash", "aliases": ["hash"]}]')
    assert cache("clear", "--cache", folder, "--model", "HASH") == "2 vectors forgotten\n"


def test_what_a_server_uses_can_be_looked_into_and_cleared(cache: Cache, tmp_path: Path) -> None:
    source = TextByText()
    embedder = on_disk(source, DiskStore(tmp_path, MB))

    async def use() -> None:
        await ask(embedder, ["a", "b"])

    for _ in range(2):
        anyio.run(use)
        assert vectors_by_model(cache("info", "--cache", tmp_path, "--json")) == {ASYMMETRIC.id: 2}
        assert cache("clear", "--cache", tmp_path) == "2 vectors forgotten\n"
    anyio.run(embedder.aclose)
    assert source.made == {"a": 2, "b": 2}


@asynccontextmanager
async def server(standing: StandIn, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server of ours, whose cache is in the folder and whose models are the stand-in's."""
    settings = Settings(endpoints=(EndpointSettings(url=standing.url),), cache=str(folder))
    with served(build_service(settings)) as url, anyio.fail_after(SECONDS):
        async with httpx.AsyncClient(base_url=url, timeout=SECONDS) as http:
            yield http


async def embedded(http: httpx.AsyncClient, *texts: str, model: str = SYMMETRIC.id) -> FloatMatrix:
    """The vectors that the server answers with."""
    body = {"model": model, "input": texts, "input_type": "passage"}
    answer = await http.post("/v1/embeddings", json=body)
    return np.array([row["embedding"] for row in answer.raise_for_status().json()["data"]], np.float32)


def swap(standing: StandIn) -> None:
    """Another model from now on, under the same id."""
    standing.models = {**standing.models, SYMMETRIC.id: replace(SYMMETRIC, default_prompt="another model: ")}


def vectors_of(standing: StandIn, *texts: str) -> FloatMatrix:
    """The vectors that the model makes now."""
    return np.stack([standing.vector(text, SYMMETRIC.id) for text in texts])


def damage(path: Path) -> None:
    """Garbage over the first page of a file that a server has open."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # or it would be read from the log
    with path.open("r+b") as file:
        file.write(b"no database at all " * 200)


@pytest.mark.anyio
@pytest.mark.parametrize("model", [[], ["--model", SYMMETRIC.id]], ids=["all", "one model"])
@pytest.mark.parametrize("damaged", [False, True], ids=["sound", "damaged"])
async def test_a_running_server_forgets_what_is_cleared(
    cache: Cache, tmp_path: Path, model: list[str], damaged: bool
) -> None:
    async with stand_in() as standing, server(standing, tmp_path) as http:
        await embedded(http, "a")
        if damaged:
            damage(tmp_path / FILE)
            await embedded(http, "a")  # which is remembered in memory only
        before = len(standing.seen)
        swap(standing)
        said = "0 vectors forgotten\n" if damaged else "1 vectors forgotten\n"
        assert cache("clear", "--cache", tmp_path, *model) == said
        for _ in range(2):
            np.testing.assert_array_equal(await embedded(http, "a", "b"), vectors_of(standing, "a", "b"))
        assert [seen.json["input"] for seen in standing.seen[before:]] == [["a", "b"]]


@pytest.mark.anyio
async def test_what_is_made_while_it_is_cleared_is_not_kept(cache: Cache, tmp_path: Path) -> None:
    event = anyio.Event()
    async with stand_in(faults=iter([None, held(event)])) as standing, server(standing, tmp_path) as http:
        await embedded(http, "a")
        async with anyio.create_task_group() as callers:
            callers.start_soon(embedded, http, "b")
            await standing.received(len(standing.seen) + 1)
            swap(standing)
            cache("clear", "--cache", tmp_path, "--model", SYMMETRIC.id)
            np.testing.assert_array_equal(await embedded(http, "b"), vectors_of(standing, "b"))
            event.set()
        async with server(standing, tmp_path) as another:
            for client in (http, another):
                np.testing.assert_array_equal(await embedded(client, "a", "b"), vectors_of(standing, "a", "b"))


@pytest.mark.anyio
async def test_a_running_server_keeps_what_other_models_made(cache: Cache, tmp_path: Path) -> None:
    async with stand_in() as standing, server(standing, tmp_path) as http:
        await embedded(http, "a", model=ASYMMETRIC.id)
        cache("clear", "--cache", tmp_path, "--model", SYMMETRIC.id)
        await embedded(http, "a", model=ASYMMETRIC.id)
        assert len([seen for seen in standing.seen if seen.body]) == 1


def test_clear_gives_the_disk_its_space_back(cache: Cache, tmp_path: Path) -> None:
    async def fill() -> None:
        embedder = on_disk(TextByText(), DiskStore(tmp_path, 100 * MB))
        await ask(embedder, [str(number) for number in range(10_000)])
        await embedder.aclose()

    anyio.run(fill)
    assert (tmp_path / FILE).stat().st_size > MB
    cache("clear", "--cache", tmp_path)
    assert (tmp_path / FILE).stat().st_size < MB // 10


def test_a_folder_without_a_cache_holds_nothing_and_stays_as_it_is(cache: Cache, tmp_path: Path) -> None:
    assert vectors_by_model(cache("info", "--cache", tmp_path / "none", "--json")) == {}
    assert cache("clear", "--cache", tmp_path / "none") == "0 vectors forgotten\n"
    assert list(tmp_path.iterdir()) == []


def test_a_cache_without_a_folder_is_refused(cache: Cache, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    lesson = (
        "embeddings-mcp: the cache has no folder: give it with --cache DIR, or in EMBEDDINGS_MCP_CACHE; what a server "
        "remembers in memory only is forgotten when it is restarted\n"
    )
    assert cache("info") == cache("clear", "--cache", "off") == lesson
    monkeypatch.setenv("EMBEDDINGS_MCP_CACHE", str(folder))
    assert "test/hash" in cache("info")


def test_a_damaged_file_is_named_and_clear_removes_it(cache: Cache, folder: Path) -> None:
    (folder / FILE).write_bytes(b"no database at all " * 1000)
    assert "file is not a database: `embeddings-mcp cache clear` removes it" in cache("info", "--cache", folder)
    assert cache("clear", "--cache", folder) == "0 vectors forgotten\n"
    assert list(folder.iterdir()) == []


def test_a_file_whose_tables_have_damaged_names_is_removed_too(cache: Cache, folder: Path) -> None:
    path = folder / FILE
    path.write_bytes(path.read_bytes().replace(b"NOT NULL", b"NOT NUL\xff"))
    assert "malformed database schema: `embeddings-mcp cache clear` removes it" in cache("info", "--cache", folder)
    cache("clear", "--cache", folder)
    assert "nothing is remembered there yet" in cache("info", "--cache", folder)


def test_what_may_only_be_read_is_left_as_it_is_in_one_line(cache: Cache) -> None:
    # Not in tmp_path, into which only its owner may look.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        anyio.run(remember, folder)
        cache("info", "--cache", folder)  # so that what the commands need is imported, which may be its owner's too
        with only_reading(folder):
            for action, verb in (("info", "used"), ("clear", "cleared")):
                said = cache(action, "--cache", folder)
                assert said.startswith(f"embeddings-mcp: the cache {folder / FILE} cannot be {verb}: ")
                assert said.count("\n") == 1
        (folder / FILE).write_bytes(b"no database at all " * 1000)
        with only_reading(folder):
            lesson = f"embeddings-mcp: the cache {folder / FILE} cannot be cleared: Permission denied\n"
            assert cache("clear", "--cache", folder) == lesson


def test_what_lies_beside_a_damaged_file_is_left_alone(cache: Cache, folder: Path) -> None:
    beside = [folder / f"{FILE}.backup-2026", folder / f"{FILE}-walnuts"]
    for path in (folder / FILE, *beside):
        path.write_bytes(b"no database at all " * 1000)
    assert json.loads(cache("clear", "--cache", folder, "--json")) == {"forgotten": 0}
    assert sorted(folder.iterdir()) == sorted(beside)


def test_a_server_remembers_again_once_a_damaged_file_was_cleared(
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
    assert source.made == {"a": 2}
    assert vectors_by_model(cache("info", "--cache", folder, "--json")) == {ASYMMETRIC.id: 1}


def test_a_file_of_something_else_is_left_alone(cache: Cache, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.execute("CREATE TABLE vector (key)")
    before = (tmp_path / FILE).read_bytes()
    for action, verb in (("info", "used"), ("clear", "cleared")):
        lesson = f"embeddings-mcp: the cache {tmp_path / FILE} cannot be {verb}: it is a database of something else\n"
        assert cache(action, "--cache", tmp_path) == lesson
    assert (tmp_path / FILE).read_bytes() == before

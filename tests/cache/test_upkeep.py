"""The commands ``cache info`` and ``cache clear``."""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import pytest

from embeddings_mcp.embedders.cache import DiskStore
from embeddings_mcp.embedders.cache.database import FILE
from embeddings_mcp.faces import cli
from tests.cache.support import ASYMMETRIC, MB, TextByText, ask, on_disk
from tests.support import HashEmbedder

Cache = Callable[..., str]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cache:
    """Runs ``embeddings-mcp cache`` and gives what it says, or the one line with which it refuses."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["embeddings-mcp", "cache", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return captured.err if ended.value.code else captured.out

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds three vectors of one model, and two of another."""

    async def fill() -> None:
        for embedder, texts in ((TextByText(), ["a", "b", "c"]), (HashEmbedder(), ["a", "b"])):
            behind = on_disk(embedder, DiskStore(tmp_path, MB))
            await ask(behind, texts)
            await behind.aclose()

    anyio.run(fill)
    return tmp_path


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
    lesson = "embeddings-mcp: the cache has no folder: give it with --cache DIR, or in EMBEDDINGS_MCP_CACHE\n"
    assert cache("info") == cache("clear", "--cache", "off") == lesson
    monkeypatch.setenv("EMBEDDINGS_MCP_CACHE", str(folder))
    assert "test/hash" in cache("info")


def test_a_damaged_file_is_named_and_clear_removes_it(cache: Cache, folder: Path) -> None:
    (folder / FILE).write_bytes(b"no database at all " * 1000)
    assert "file is not a database: `embeddings-mcp cache clear` removes it" in cache("info", "--cache", folder)
    assert cache("clear", "--cache", folder) == "0 vectors forgotten\n"
    assert list(folder.iterdir()) == []


def test_a_file_of_something_else_is_left_alone(cache: Cache, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.execute("CREATE TABLE vector (key)")
    before = (tmp_path / FILE).read_bytes()
    for action, verb in (("info", "used"), ("clear", "cleared")):
        lesson = f"embeddings-mcp: the cache {tmp_path / FILE} cannot be {verb}: it is a database of something else\n"
        assert cache(action, "--cache", tmp_path) == lesson
    assert (tmp_path / FILE).read_bytes() == before

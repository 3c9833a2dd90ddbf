"""Whatever happens to a cache, an answer is what the embedder alone would give: against a plain dict as the model."""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from embeddings_mcp.embedders.cache import Cache, CachedEmbedder, DiskStore, MemoryStore, cached
from embeddings_mcp.embedders.cache.database import FILE
from embeddings_mcp.errors import ModelUnavailable
from embeddings_mcp.models import InputType, Truncate
from tests.cache.support import ASYMMETRIC, MB, TextByText, ask, expected

Way = tuple[str, InputType | None, Truncate]
"""Which model, and how it is asked."""

texts = st.lists(st.sampled_from(["", "a", "b", "A", "a b", "b a", "ä", "a\n", "a ", " a"]), min_size=1, max_size=12)
ways = st.tuples(
    st.sampled_from(["one", "two"]), st.sampled_from([None, *get_args(InputType)]), st.sampled_from(get_args(Truncate))
)


class CacheMachine(RuleBasedStateMachine):
    """Two models share a cache: they are asked, fail, and start again; the file is damaged, memory is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.remembered: set[tuple[Way, str]] = set()
        # The two differ in their vectors too, so that none can pass for the other's.
        self.sources = {
            name: TextByText(replace(ASYMMETRIC, default_prompt=f"{name}: "), identity=name) for name in ("one", "two")
        }

    def teardown(self) -> None:
        self.runner.run(self.close())
        self.runner.close()
        self.folder.cleanup()

    async def close(self) -> None:
        for embedder in self.embedders.values():
            await embedder.aclose()

    @initialize(memory=st.sampled_from([0, 2000, MB]))
    def start(self, memory: int) -> None:
        self.memory = memory
        cache = Cache(MemoryStore(memory), DiskStore(Path(self.folder.name), MB))
        self.embedders: dict[str, CachedEmbedder] = {
            name: cached(source, cache) for name, source in self.sources.items()
        }

    def expect(self, way: Way, texts: list[str], wanted: list[list[str]]) -> None:
        name, input_type, truncate = way
        source = self.sources[name]
        source.batches.clear()
        made = self.runner.run(ask(self.embedders[name], texts, input_type=input_type, truncate=truncate))
        np.testing.assert_array_equal(made.vectors, expected(source, texts, input_type))
        assert list(made.tokens) == [len(text.split()) + 2 for text in texts]
        assert source.batches == wanted
        self.remembered |= {(way, text) for text in texts}

    def unknown(self, way: Way, texts: list[str]) -> list[str]:
        return [text for text in dict.fromkeys(texts) if (way, text) not in self.remembered]

    @rule(way=ways, texts=texts)
    def embed(self, way: Way, texts: list[str]) -> None:
        unknown = self.unknown(way, texts)
        self.expect(way, texts, [unknown] if unknown else [])

    @rule(way=ways, texts=texts, data=st.data())
    def fail_and_try_again(self, way: Way, texts: list[str], data: st.DataObject) -> None:
        unknown = self.unknown(way, texts)
        if not unknown:
            return
        name, input_type, truncate = way
        failing = data.draw(st.sampled_from(unknown), label="failing at")
        source = self.sources[name]
        source.failures[failing] = ModelUnavailable("for now")
        try:
            self.runner.run(ask(self.embedders[name], texts, input_type=input_type, truncate=truncate))
        except ModelUnavailable:
            source.failures.clear()
        assert not source.failures
        self.expect(way, texts, [unknown[unknown.index(failing) :]])

    @rule(pair=st.tuples(ways, ways), texts=st.tuples(texts, texts))
    def embed_at_the_same_time(self, pair: tuple[Way, Way], texts: tuple[list[str], list[str]]) -> None:
        for source in self.sources.values():
            source.made.clear()
        wanted = {(way, text) for way, some in zip(pair, texts, strict=True) for text in self.unknown(way, some)}

        async def both() -> None:
            async def one(way: Way, some: list[str]) -> None:
                name, input_type, truncate = way
                made = await ask(self.embedders[name], some, input_type=input_type, truncate=truncate)
                np.testing.assert_array_equal(made.vectors, expected(self.sources[name], some, input_type))

            await asyncio.gather(*(one(way, some) for way, some in zip(pair, texts, strict=True)))

        self.runner.run(both())
        made = sum(source.made.total() for source in self.sources.values())
        # Without memory, what one has made may be on its way to the file while the other looks there.
        assert made == len(wanted) if self.memory == MB else made >= len(wanted)
        self.remembered |= wanted

    @rule()
    def start_again(self) -> None:
        self.runner.run(self.close())
        self.start(self.memory)

    @rule(column=st.sampled_from(["tokens", "numbers", "checksum"]))
    def damage_a_row_of_the_file(self, column: str) -> None:
        """All of it, once memory is lost."""
        self.start_again()
        with closing(sqlite3.connect(Path(self.folder.name) / FILE, isolation_level=None)) as connection:
            if connection.execute("PRAGMA user_version").fetchone() == (1,):
                connection.execute(f"UPDATE vector SET {column} = randomblob(8)")  # noqa: S608
        self.remembered.clear()


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)

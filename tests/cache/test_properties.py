"""Property test: whatever happens to a cache, results equal those of the embedder alone. A set models the cache."""

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

Variant = tuple[str, InputType | None, Truncate]
"""Name of the model, input type and truncation of a request."""

texts = st.lists(st.sampled_from(["", "a", "b", "A", "a b", "b a", "ä", "a\n", "a ", " a"]), min_size=1, max_size=12)
variants = st.tuples(
    st.sampled_from(["one", "two"]), st.sampled_from([None, *get_args(InputType)]), st.sampled_from(get_args(Truncate))
)


class CacheMachine(RuleBasedStateMachine):
    """Two models share a cache, with failures, restarts and a damaged file."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.cached: set[tuple[Variant, str]] = set()
        # Their vectors differ too, so that mixing them up is noticed.
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

    def expect(self, variant: Variant, texts: list[str], batches: list[list[str]]) -> None:
        name, input_type, truncate = variant
        source = self.sources[name]
        source.batches.clear()
        result = self.runner.run(ask(self.embedders[name], texts, input_type=input_type, truncate=truncate))
        np.testing.assert_array_equal(result.vectors, expected(source, texts, input_type))
        assert list(result.tokens) == [len(text.split()) + 2 for text in texts]
        assert source.batches == batches
        self.cached |= {(variant, text) for text in texts}

    def missing(self, variant: Variant, texts: list[str]) -> list[str]:
        return [text for text in dict.fromkeys(texts) if (variant, text) not in self.cached]

    @rule(variant=variants, texts=texts)
    def embed(self, variant: Variant, texts: list[str]) -> None:
        missing = self.missing(variant, texts)
        self.expect(variant, texts, [missing] if missing else [])

    @rule(variant=variants, texts=texts, data=st.data())
    def fail_and_retry(self, variant: Variant, texts: list[str], data: st.DataObject) -> None:
        missing = self.missing(variant, texts)
        if not missing:
            return
        name, input_type, truncate = variant
        failing = data.draw(st.sampled_from(missing), label="failing at")
        source = self.sources[name]
        source.failures[failing] = ModelUnavailable("for now")
        try:
            self.runner.run(ask(self.embedders[name], texts, input_type=input_type, truncate=truncate))
        except ModelUnavailable:
            source.failures.clear()
        assert not source.failures
        self.expect(variant, texts, [missing[missing.index(failing) :]])

    @rule(pair=st.tuples(variants, variants), texts=st.tuples(texts, texts))
    def embed_concurrently(self, pair: tuple[Variant, Variant], texts: tuple[list[str], list[str]]) -> None:
        for source in self.sources.values():
            source.counts.clear()
        expected_keys = {
            (variant, text)
            for variant, own_texts in zip(pair, texts, strict=True)
            for text in self.missing(variant, own_texts)
        }

        async def both() -> None:
            async def one(variant: Variant, own_texts: list[str]) -> None:
                name, input_type, truncate = variant
                result = await ask(self.embedders[name], own_texts, input_type=input_type, truncate=truncate)
                np.testing.assert_array_equal(result.vectors, expected(self.sources[name], own_texts, input_type))

            await asyncio.gather(*(one(variant, own_texts) for variant, own_texts in zip(pair, texts, strict=True)))

        self.runner.run(both())
        computed = sum(source.counts.total() for source in self.sources.values())
        # Without memory, one request may read the file before the other has written its rows.
        assert computed == len(expected_keys) if self.memory == MB else computed >= len(expected_keys)
        self.cached |= expected_keys

    @rule()
    def restart(self) -> None:
        self.runner.run(self.close())
        self.start(self.memory)

    @rule(column=st.sampled_from(["tokens", "numbers", "checksum"]))
    def damage_the_rows_of_the_file(self, column: str) -> None:
        """Damage all rows; a restart discards those in memory."""
        self.restart()
        with closing(sqlite3.connect(Path(self.folder.name) / FILE, isolation_level=None)) as connection:
            if connection.execute("PRAGMA user_version").fetchone() == (1,):
                connection.execute(f"UPDATE vector SET {column} = randomblob(8)")  # noqa: S608
        self.cached.clear()


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=40, stateful_step_count=25)

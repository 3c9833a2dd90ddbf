"""A cache before an endpoint that fails: nothing that has come is asked for again."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import anyio
import numpy as np
import pytest
import stamina

from embeddings_mcp.embedders.cache import Cache, CachedEmbedder, MemoryStore, cached
from embeddings_mcp.embedders.nim import Endpoint, EndpointClient, NimEmbedder
from embeddings_mcp.errors import EmbeddingsError
from tests.cache.support import MB
from tests.nim.standin import SYMMETRIC, Fault, Reply, StandIn, stand_in
from tests.support import HashEmbedder

pytestmark = pytest.mark.anyio

SECONDS = 60


@pytest.fixture(autouse=True)
def _without_pauses() -> Iterator[None]:
    with stamina.set_testing(True, attempts=100, cap=True):
        yield


@asynccontextmanager
async def cached_at(standing: StandIn, *, concurrency: int = 8, batch_size: int = 20) -> AsyncIterator[CachedEmbedder]:
    endpoint = Endpoint(url=standing.url, concurrency=concurrency, batch_size=batch_size)
    embedder = cached(NimEmbedder(EndpointClient(endpoint), SYMMETRIC), Cache(MemoryStore(16 * MB)))
    try:
        with anyio.fail_after(SECONDS):
            yield embedder
    finally:
        await embedder.aclose()


async def persist(embedder: CachedEmbedder, texts: list[str]) -> int:
    """Try until it succeeds, as a caller would; how often that was."""
    for attempt in itertools.count(1):
        try:
            made = await embedder.embed(texts, input_type=None, truncate="NONE")
        except EmbeddingsError:
            continue
        np.testing.assert_array_equal(made.vectors, np.stack([HashEmbedder(SYMMETRIC).vector(text) for text in texts]))
        assert made.served_model == SYMMETRIC.id
        return attempt
    raise AssertionError("unreachable")


def refusing(reply: Reply) -> Reply:
    """A refusal for good: nobody tries again by himself."""
    return Reply(422, b'{"detail": "no"}')


def failing(reply: Reply) -> Reply:
    return Reply(503, b"upstream connect error")


@pytest.mark.parametrize("fault", [refusing, failing])
@pytest.mark.parametrize("alike", [True, False], ids=["the same texts", "texts that overlap"])
async def test_a_thousand_texts_of_five_callers_are_each_embedded_once_past_a_failure_in_every_five(
    fault: Fault, alike: bool
) -> None:
    texts = [f"text {number}" for number in range(1000)]
    calls = [texts if alike else (texts * 2)[start : start + 600] for start in range(0, 1000, 200)]
    answered: Counter[str] = Counter()
    failures = itertools.cycle([None, None, None, None, fault])
    async with stand_in(faults=failures) as standing:
        # One request at a time: of several under way, a failure leaves those unfinished that the endpoint has made.
        async with cached_at(standing, concurrency=1) as embedder, anyio.create_task_group() as callers:
            for texts_of_call in calls:
                callers.start_soon(persist, embedder, texts_of_call)
        for seen, failed in zip(standing.seen, itertools.cycle([False] * 4 + [True]), strict=False):
            if not failed:
                answered.update(seen.json["input"])
    assert set(answered) == set(texts)
    assert set(answered.values()) == {1}


async def test_a_call_that_failed_goes_on_where_it_was() -> None:
    texts = [f"text {number}" for number in range(10)]
    async with stand_in(faults=iter([None, None, refusing])) as standing:
        async with cached_at(standing, concurrency=1, batch_size=2) as embedder:
            assert await persist(embedder, texts) == 2
        asked = [seen.json["input"] for seen in standing.seen]
    assert asked == [texts[0:2], texts[2:4], texts[4:6], texts[4:6], texts[6:8], texts[8:10]]


async def test_usage_is_what_the_endpoint_counted_with_and_without_hits() -> None:
    texts = ["one", "two words here", "", "three more words of it"]
    async with stand_in() as standing, cached_at(standing) as embedder:
        first = await embedder.embed(texts, input_type=None, truncate="NONE")
        again = await embedder.embed(texts[::-1], input_type=None, truncate="NONE")
        parts = [await embedder.embed([text], input_type=None, truncate="NONE") for text in texts]
        assert first.prompt_tokens == again.prompt_tokens == sum(part.prompt_tokens for part in parts) == 9
        alone = await embedder.embed(["five words of its own"], input_type=None, truncate="NONE")
        assert alone.prompt_tokens == 5
        assert len(standing.seen) == 2

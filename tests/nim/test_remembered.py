"""An endpoint behind the cache: what it has answered is not asked of it again, however it fails in between."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import numpy as np
import pytest
from pydantic import SecretStr

from embeddings_mcp.caller import with_caller_key
from embeddings_mcp.embedders.cache import Cache, CachedEmbedder, MemoryStore, cached
from embeddings_mcp.embedders.nim import Endpoint, EndpointClient, NimEmbedder
from embeddings_mcp.embedders.nim.throttle import Throttle
from embeddings_mcp.errors import InvalidRequest
from embeddings_mcp.models import ModelCard
from embeddings_mcp.schema import EmbeddingRequest
from embeddings_mcp.serialization import parse
from tests.nim.standin import ASYMMETRIC, SYMMETRIC, Fault, Reply, StandIn, answering, cut, stand_in, truncated
from tests.support import service_of

pytestmark = pytest.mark.anyio

RATE, WINDOW = 40, 0.4
FAILURES: list[Fault] = [answering(429), answering(500, b"failed"), answering(503), answering(504), cut, truncated]
REFUSAL = answering(422, {"detail": "no"})
"""For good: nobody tries again by himself."""


@asynccontextmanager
async def behind_cache(
    standing: StandIn, card: ModelCard = SYMMETRIC, *, throttle: Throttle | None = None, **chosen: Any
) -> AsyncIterator[CachedEmbedder]:
    client = EndpointClient(Endpoint(url=standing.url, **chosen), throttle=throttle)
    embedder = cached(NimEmbedder(client, card), Cache(MemoryStore(1 << 24)))
    try:
        with anyio.fail_after(60):
            yield embedder
    finally:
        await embedder.aclose()


@dataclass
class OneInFive:
    """Fails about every fifth request, none of them more often than it is tried again.

    Attributes:
        answered: how often each text was answered in good order.
        failed: requests that were failed.
    """

    standing: StandIn
    answered: Counter[str] = field(default_factory=Counter)
    failed: set[bytes] = field(default_factory=set)
    chance: random.Random = field(default_factory=lambda: random.Random(5))

    def __call__(self, reply: Reply) -> Reply:
        request = self.standing.seen[-1]
        if request.body not in self.failed and self.chance.random() < 0.25:
            self.failed.add(request.body)
            return self.chance.choice(FAILURES)(reply)
        self.answered.update(request.json["input"])
        return reply


async def test_a_thousand_texts_of_five_callers_are_each_embedded_once_past_a_failure_in_every_five() -> None:
    """Half of the texts are shared: every caller asks for all of those, in an order of his own, and for some alone."""
    shared = [f"shared text {number}" for number in range(500)]
    texts = {
        caller: [f"caller {caller} text {number}" for number in range(100)] + random.Random(caller).sample(shared, 500)
        for caller in range(5)
    }
    throttle = Throttle("the stand-in", concurrency=8, requests=RATE, window=WINDOW)
    async with stand_in() as standing:
        faults = OneInFive(standing)
        standing.faults = itertools.repeat(faults)
        vectors: dict[int, np.ndarray[Any, Any]] = {}

        async with behind_cache(standing, ASYMMETRIC, throttle=throttle, batch_size=10) as embedder:
            service = service_of(embedder)

            async def call(caller: int) -> None:
                body = {"model": "default", "input": texts[caller], "input_type": "passage"}
                response = await service.create_embedding(parse(EmbeddingRequest, body))
                vectors[caller] = np.array([row["embedding"] for row in response["data"]], np.float32)

            async with anyio.create_task_group() as group:
                for caller in texts:
                    group.start_soon(call, caller)
        for caller, own in texts.items():
            expected = np.stack([standing.vector(text, ASYMMETRIC.id, "passage") for text in own])
            np.testing.assert_array_equal(vectors[caller], expected)
        assert len(faults.answered) == 1000
        assert set(faults.answered.values()) == {1}
        assert 0.1 < len(faults.failed) / len(standing.seen) < 0.3
        assert standing.most_at_once <= 8
        arrivals = [seen.at for seen in standing.seen]
        # Departures keep the limit; an arrival may be late, so a window of arrivals may be shorter.
        assert all(later - earlier > 0.5 * WINDOW for earlier, later in zip(arrivals, arrivals[RATE:], strict=False))


async def persist(standing: StandIn, embedder: CachedEmbedder, texts: list[str]) -> int:
    """Try until it succeeds, as a caller would; how often that was."""
    for attempt in itertools.count(1):
        try:
            made = await embedder.embed(texts, input_type=None, truncate="NONE")
        except InvalidRequest:
            continue
        np.testing.assert_array_equal(made.vectors, np.stack([standing.vector(text, SYMMETRIC.id) for text in texts]))
        assert made.served_model == SYMMETRIC.id
        return attempt
    raise AssertionError("unreachable")


@pytest.mark.parametrize("alike", [True, False], ids=["the same texts", "texts that overlap"])
async def test_callers_who_try_again_after_refusals_have_each_text_embedded_once(alike: bool) -> None:
    texts = [f"text {number}" for number in range(1000)]
    calls = [texts if alike else (texts * 2)[start : start + 600] for start in range(0, 1000, 200)]
    answered: Counter[str] = Counter()
    async with stand_in(faults=itertools.cycle([None, None, None, None, REFUSAL])) as standing:
        # One request at a time: of several under way, a refusal leaves those unfinished that the endpoint has made.
        async with (
            behind_cache(standing, concurrency=1, batch_size=20) as embedder,
            anyio.create_task_group() as callers,
        ):
            for texts_of_call in calls:
                callers.start_soon(persist, standing, embedder, texts_of_call)
        for seen, refused in zip(standing.seen, itertools.cycle([False] * 4 + [True]), strict=False):
            if not refused:
                answered.update(seen.json["input"])
    assert set(answered) == set(texts)
    assert set(answered.values()) == {1}


async def test_a_call_that_failed_goes_on_where_it_was() -> None:
    texts = [f"text {number}" for number in range(10)]
    async with stand_in(faults=iter([None, None, REFUSAL])) as standing:
        async with behind_cache(standing, concurrency=1, batch_size=2) as embedder:
            assert await persist(standing, embedder, texts) == 2
        asked = [seen.json["input"] for seen in standing.seen]
    assert asked == [texts[0:2], texts[2:4], texts[4:6], texts[4:6], texts[6:8], texts[8:10]]


async def test_usage_is_what_the_endpoint_counted_with_and_without_hits() -> None:
    texts = ["one", "two words here", "", "three more words of it"]
    async with stand_in() as standing, behind_cache(standing) as embedder:
        first = await embedder.embed(texts, input_type=None, truncate="NONE")
        again = await embedder.embed(texts[::-1], input_type=None, truncate="NONE")
        parts = [await embedder.embed([text], input_type=None, truncate="NONE") for text in texts]
        assert first.prompt_tokens == again.prompt_tokens == sum(part.prompt_tokens for part in parts) == 9
        alone = await embedder.embed(["five words of its own"], input_type=None, truncate="NONE")
        assert alone.prompt_tokens == 5
        assert len(standing.seen) == 2


async def test_what_was_made_with_a_callers_key_is_for_him_alone() -> None:
    async with stand_in() as standing:
        async with behind_cache(standing, caller_keys=True) as embedder:
            for key in ("nvapi-alice", "nvapi-bob", "nvapi-alice"):
                with with_caller_key(SecretStr(key)):
                    await embedder.embed(["a text"], input_type=None, truncate="NONE")
            await embedder.embed(["a text"], input_type=None, truncate="NONE")
        keys = [seen.headers.get("authorization") for seen in standing.seen]
        assert keys == ["Bearer nvapi-alice", "Bearer nvapi-bob", None]

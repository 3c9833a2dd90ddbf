"""An endpoint behind the cache: cached texts are not requested again, whatever failures occur in between."""

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
from embeddings_mcp.errors import InvalidRequest, UpstreamFailed
from embeddings_mcp.models import ModelCard
from embeddings_mcp.schema import EmbeddingRequest, SearchRequest, SearchResponse
from embeddings_mcp.serialization import parse
from embeddings_mcp.service import EmbeddingService
from tests.nim.standin import ASYMMETRIC, SYMMETRIC, Fault, Reply, StandIn, answering, cut, stand_in, truncated
from tests.support import service_of

pytestmark = pytest.mark.anyio

RATE, WINDOW = 40, 0.4
FAILURES: list[Fault] = [answering(429), answering(500, b"failed"), answering(503), answering(504), cut, truncated]
REFUSAL = answering(422, {"detail": "no"})
"""Not retried by the client."""


@asynccontextmanager
async def behind_cache(
    nim: StandIn,
    card: ModelCard = SYMMETRIC,
    *,
    throttle: Throttle | None = None,
    cache: Cache | None = None,
    **chosen: Any,
) -> AsyncIterator[CachedEmbedder]:
    client = EndpointClient(Endpoint(url=nim.url, **chosen), throttle=throttle)
    embedder = cached(NimEmbedder(client, card), cache or Cache(MemoryStore(1 << 24)))
    try:
        with anyio.fail_after(60):
            yield embedder
    finally:
        await embedder.aclose()


@dataclass
class OneInFive:
    """Fails about one request in five, and each request at most once.

    Attributes:
        answered: how often each text was embedded successfully.
        failed: bodies of the failed requests.
    """

    nim: StandIn
    answered: Counter[str] = field(default_factory=Counter)
    failed: set[bytes] = field(default_factory=set)
    rng: random.Random = field(default_factory=lambda: random.Random(5))

    def __call__(self, reply: Reply) -> Reply:
        request = self.nim.seen[-1]
        if request.body not in self.failed and self.rng.random() < 0.25:
            self.failed.add(request.body)
            return self.rng.choice(FAILURES)(reply)
        self.answered.update(request.json["input"])
        return reply


async def test_a_thousand_texts_of_five_callers_are_each_embedded_once_despite_failures() -> None:
    """Half of the texts are shared: each caller requests all of those in a different order, and some of its own."""
    shared = [f"shared text {number}" for number in range(500)]
    texts = {
        caller: [f"caller {caller} text {number}" for number in range(100)] + random.Random(caller).sample(shared, 500)
        for caller in range(5)
    }
    throttle = Throttle("the stand-in", concurrency=8, max_requests=RATE, window=WINDOW)
    async with stand_in() as nim:
        faults = OneInFive(nim)
        nim.faults = itertools.repeat(faults)
        vectors: dict[int, np.ndarray[Any, Any]] = {}

        async with behind_cache(nim, ASYMMETRIC, throttle=throttle, batch_size=10) as embedder:
            service = service_of(embedder)

            async def call(caller: int) -> None:
                body = {"model": "default", "input": texts[caller], "input_type": "passage"}
                response = await service.create_embedding(parse(EmbeddingRequest, body))
                vectors[caller] = np.array([row["embedding"] for row in response["data"]], np.float32)

            async with anyio.create_task_group() as group:
                for caller in texts:
                    group.start_soon(call, caller)
        for caller, own in texts.items():
            expected = np.stack([nim.vector(text, ASYMMETRIC.id, "passage") for text in own])
            np.testing.assert_array_equal(vectors[caller], expected)
        assert len(faults.answered) == 1000
        assert set(faults.answered.values()) == {1}
        assert 0.1 < len(faults.failed) / len(nim.seen) < 0.3
        assert nim.max_in_flight <= 8
        arrivals = [seen.at for seen in nim.seen]
        # The limit holds when requests are sent; delays in transit may shorten a window of arrivals.
        assert all(later - earlier > 0.5 * WINDOW for earlier, later in zip(arrivals, arrivals[RATE:], strict=False))


async def retry_until_done(nim: StandIn, embedder: CachedEmbedder, texts: list[str]) -> int:
    """Repeat a call until it succeeds, as a caller would; return the number of attempts."""
    for attempt in itertools.count(1):
        try:
            made = await embedder.embed(texts, input_type=None, truncate="NONE")
        except InvalidRequest:
            continue
        np.testing.assert_array_equal(made.vectors, np.stack([nim.vector(text, SYMMETRIC.id) for text in texts]))
        assert made.served_model == SYMMETRIC.id
        return attempt
    raise AssertionError("unreachable")


@pytest.mark.parametrize("same", [True, False], ids=["same texts", "overlapping texts"])
async def test_callers_that_retry_after_refusals_have_each_text_embedded_once(same: bool) -> None:
    texts = [f"text {number}" for number in range(1000)]
    calls = [texts if same else (texts * 2)[start : start + 600] for start in range(0, 1000, 200)]
    answered: Counter[str] = Counter()
    async with stand_in(faults=itertools.cycle([None, None, None, None, REFUSAL])) as nim:
        # One request at a time: a refusal would cancel others in flight that the endpoint has already computed.
        async with (
            behind_cache(nim, concurrency=1, batch_size=20) as embedder,
            anyio.create_task_group() as callers,
        ):
            for texts_of_call in calls:
                callers.start_soon(retry_until_done, nim, embedder, texts_of_call)
        for seen, refused in zip(nim.seen, itertools.cycle([False] * 4 + [True]), strict=False):
            if not refused:
                answered.update(seen.json["input"])
    assert set(answered) == set(texts)
    assert set(answered.values()) == {1}


async def test_retrying_a_failed_call_resumes_where_it_stopped() -> None:
    texts = [f"text {number}" for number in range(10)]
    async with stand_in(faults=iter([None, None, REFUSAL])) as nim:
        async with behind_cache(nim, concurrency=1, batch_size=2) as embedder:
            assert await retry_until_done(nim, embedder, texts) == 2
        requested = [seen.json["input"] for seen in nim.seen]
    assert requested == [texts[0:2], texts[2:4], texts[4:6], texts[4:6], texts[6:8], texts[8:10]]


async def test_usage_is_the_endpoints_count_with_and_without_cache_hits() -> None:
    texts = ["one", "two words here", "", "three more words of it"]
    async with stand_in() as nim, behind_cache(nim) as embedder:
        first = await embedder.embed(texts, input_type=None, truncate="NONE")
        again = await embedder.embed(texts[::-1], input_type=None, truncate="NONE")
        parts = [await embedder.embed([text], input_type=None, truncate="NONE") for text in texts]
        assert first.prompt_tokens == again.prompt_tokens == sum(part.prompt_tokens for part in parts) == 9
        alone = await embedder.embed(["five words of its own"], input_type=None, truncate="NONE")
        assert alone.prompt_tokens == 5
        assert len(nim.seen) == 2


async def test_vectors_made_with_a_callers_key_are_cached_for_that_caller_only() -> None:
    async with stand_in() as nim:
        async with behind_cache(nim, caller_keys=True) as embedder:
            for key in ("nvapi-alice", "nvapi-bob", "nvapi-alice"):
                with with_caller_key(SecretStr(key)):
                    await embedder.embed(["a text"], input_type=None, truncate="NONE")
            await embedder.embed(["a text"], input_type=None, truncate="NONE")
        keys = [seen.headers.get("authorization") for seen in nim.seen]
        assert keys == ["Bearer nvapi-alice", "Bearer nvapi-bob", None]


async def search(service: EmbeddingService, *passages: str) -> SearchResponse:
    return await service.search(parse(SearchRequest, {"query": "question", "input": list(passages)}))


async def test_a_cached_query_is_not_compared_with_passages_of_a_newer_model() -> None:
    async with stand_in(served_as="test/v1") as nim, behind_cache(nim, ASYMMETRIC) as embedder:
        service = service_of(embedder)
        await search(service, "old")
        nim.served_as = "test/v2"
        with pytest.raises(UpstreamFailed, match="try again"):
            await search(service, "new")
        assert (await search(service, "new"))["model"] == "test/v2"
        assert [seen.json["input"] for seen in nim.seen] == [["question"], ["old"], ["new"], ["question"]]


async def test_a_query_and_passages_of_different_models_in_the_cache_are_not_compared() -> None:
    cache = Cache(MemoryStore(1 << 24))
    async with stand_in(served_as="test/v1") as nim:
        async with behind_cache(nim, ASYMMETRIC, cache=cache) as embedder:
            await embedder.embed(["passage"], input_type="passage", truncate="NONE")
        nim.served_as = "test/v2"
        async with behind_cache(nim, ASYMMETRIC, cache=cache) as embedder:
            await embedder.embed(["question"], input_type="query", truncate="NONE")
        async with behind_cache(nim, ASYMMETRIC, cache=cache) as embedder:
            assert (await search(service_of(embedder), "passage"))["model"] == "test/v2"
        assert [seen.json["input"] for seen in nim.seen] == [["passage"], ["question"], ["passage"]]

"""An endpoint behind the cache: what it has answered is not asked of it again, however it fails in between."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import anyio
import numpy as np
import pytest
from pydantic import SecretStr

from embeddings_mcp.caller import bringing
from embeddings_mcp.embedders.cache import Cache, CachedEmbedder, MemoryStore, cached
from embeddings_mcp.embedders.nim import Endpoint, EndpointClient, NimEmbedder
from embeddings_mcp.embedders.nim.limits import Turnstile
from embeddings_mcp.errors import InvalidRequest
from embeddings_mcp.schema import EmbeddingRequest
from embeddings_mcp.serialization import parse
from tests.nim.standin import ASYMMETRIC, SYMMETRIC, Fault, Reply, StandIn, answering, cut, stand_in, truncated
from tests.support import service_of

pytestmark = pytest.mark.anyio

RATE, WINDOW = 40, 0.4
FAILURES: list[Fault] = [answering(429), answering(500, b"failed"), answering(503), answering(504), cut, truncated]


def behind_cache(standing: StandIn, **chosen: object) -> CachedEmbedder:
    endpoint = Endpoint(url=standing.url, **chosen)  # type: ignore[arg-type]
    turnstile = Turnstile("the stand-in", concurrency=endpoint.concurrency, requests=RATE, window=WINDOW)
    card = ASYMMETRIC
    return cached(NimEmbedder(EndpointClient(endpoint, turnstile=turnstile), card), Cache(MemoryStore(1 << 24)))


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
    async with stand_in() as standing:
        faults = OneInFive(standing)
        standing.faults = itertools.repeat(faults)
        service = service_of(behind_cache(standing, batch_size=10))
        vectors: dict[int, np.ndarray[Any, Any]] = {}

        async def call(caller: int) -> None:
            body = {"model": "default", "input": texts[caller], "input_type": "passage"}
            response = await service.create_embedding(parse(EmbeddingRequest, body))
            vectors[caller] = np.array([row["embedding"] for row in response["data"]], np.float32)

        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                for caller in texts:
                    group.start_soon(call, caller)
        await service.aclose()
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


async def test_what_succeeded_before_a_request_failed_is_there_for_the_next_try() -> None:
    texts = [f"text {number}" for number in range(50)]
    refusal = answering(400, {"detail": "not today"})
    async with stand_in(faults=itertools.chain([None, None, refusal], itertools.repeat(None))) as standing:
        embedder = behind_cache(standing, batch_size=10, concurrency=1)
        with anyio.fail_after(10):
            with pytest.raises(InvalidRequest, match="not today"):
                await embedder.embed(texts, input_type="query", truncate="NONE")
            made = await embedder.embed(texts, input_type="query", truncate="NONE")
            await embedder.aclose()
        np.testing.assert_array_equal(
            made.vectors, np.stack([standing.vector(text, ASYMMETRIC.id, "query") for text in texts])
        )
        assert [text for seen in standing.seen[3:] for text in seen.json["input"]] == texts[20:]


async def test_what_was_made_with_a_callers_key_is_for_him_alone() -> None:
    async with stand_in() as standing:
        endpoint = Endpoint(url=standing.url, caller_keys=True)
        embedder = cached(NimEmbedder(EndpointClient(endpoint), SYMMETRIC), Cache(MemoryStore(1 << 20)))
        with anyio.fail_after(10):
            for key in ("nvapi-alice", "nvapi-bob", "nvapi-alice"):
                with bringing(SecretStr(key)):
                    await embedder.embed(["a text"], input_type=None, truncate="NONE")
            await embedder.embed(["a text"], input_type=None, truncate="NONE")
            await embedder.aclose()
        keys = [seen.headers.get("authorization") for seen in standing.seen]
        assert keys == ["Bearer nvapi-alice", "Bearer nvapi-bob", None]

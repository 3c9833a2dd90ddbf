"""What `CachedEmbedder` returns, and what it computes with its embedder."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import anyio
import numpy as np
import pytest

from embeddings_mcp.embedders.base import Embeddings, MultiEmbedder
from embeddings_mcp.embedders.cache import CachedEmbedder, MemoryStore
from embeddings_mcp.embedders.cache.rows import Row, keys_of
from embeddings_mcp.errors import InputTooLong, InputUnusable, ModelUnavailable, Overloaded, UpstreamFailed
from embeddings_mcp.models import InputType, ModelCard, Truncate
from embeddings_mcp.schema import EmbeddingRequest
from tests.cache.support import ASYMMETRIC, TextByText, ask, expected, in_memory
from tests.support import SECONDS, HashEmbedder, service_of, wait_until

pytestmark = pytest.mark.anyio

TEXTS = ["one", "two of them", "", "one", "vier äöü €", "two of them", "a\x00b"]


def service_request(texts: list[str]) -> EmbeddingRequest:
    return EmbeddingRequest(model="default", input=texts)


async def checked(embedder: CachedEmbedder, texts: list[str], input_type: InputType | None = None) -> Embeddings:
    """Embed the texts, and check the result."""
    result = await ask(embedder, texts, input_type=input_type)
    source = embedder._embedder
    assert isinstance(source, HashEmbedder)
    np.testing.assert_array_equal(result.vectors, expected(source, texts, input_type))
    assert result.vectors.dtype == np.float32
    assert list(result.tokens) == [len(text.split()) + 2 for text in texts]
    return result


# --- Hits ------------------------------------------------------------------------------------------------------------


async def test_a_text_is_computed_once_and_hits_are_bit_identical() -> None:
    source = TextByText()
    embedder = in_memory(source)
    first = await checked(embedder, TEXTS[:2])
    again = await checked(embedder, TEXTS[:2])
    assert again.vectors.tobytes() == first.vectors.tobytes()
    assert source.batches == [TEXTS[:2]]


async def test_duplicate_texts_are_computed_once_and_counted_twice() -> None:
    source = TextByText()
    result = await checked(in_memory(source), TEXTS)
    assert source.batches == [list(dict.fromkeys(TEXTS))]
    assert result.prompt_tokens == sum(len(text.split()) + 2 for text in TEXTS)


@pytest.mark.parametrize("cached_texts", [["two of them"], ["one", "vier äöü €"], ["a\x00b", ""], TEXTS])
async def test_only_the_missing_texts_of_a_request_are_computed(cached_texts: list[str]) -> None:
    source = TextByText()
    embedder = in_memory(source)
    await checked(embedder, cached_texts)
    del source.batches[:]
    await checked(embedder, TEXTS)
    missing = [text for text in dict.fromkeys(TEXTS) if text not in cached_texts]
    assert source.batches == ([missing] if missing else [])


async def test_requests_that_differ_in_anything_relevant_share_no_vectors() -> None:
    source = TextByText()
    embedder = in_memory(source)
    types: tuple[InputType | None, ...] = (None, "query", "passage")
    truncations: tuple[Truncate, ...] = ("NONE", "START", "END")
    cards = (
        ASYMMETRIC,
        replace(ASYMMETRIC, query_prompt="Query: "),
        replace(ASYMMETRIC, max_tokens=32),
        replace(ASYMMETRIC, query_prompt="", passage_prompt=""),  # an endpoint may have prompts of its own
    )
    variants = list(itertools.product(types, truncations, cards, ("revision 1", "revision 2")))
    for input_type, truncate, source.card, source.identity in [*variants, *reversed(variants)]:
        result = await ask(embedder, ["a b c"], input_type=input_type, truncate=truncate)
        np.testing.assert_array_equal(result.vectors, expected(source, ["a b c"], input_type))
    # Without a type, prompts for queries and passages are irrelevant; none of these cards has a default prompt.
    distinct_cards = {None: 2, "query": 4, "passage": 3}
    assert source.counts["a b c"] == sum(distinct_cards.values()) * len(truncations) * 2


def test_texts_that_differ_in_invalid_unicode_have_different_keys() -> None:
    texts = ["a\ud800", "a\ud801", "a", "A", "a\u0301", "\u00e1"]
    keys = keys_of(texts, identity="", generation="", card=ASYMMETRIC, input_type=None, truncate="NONE")
    assert len(set(keys)) == len(texts)


async def test_input_types_share_vectors_if_the_model_ignores_them() -> None:
    source = TextByText(ModelCard(id="test/symmetric", dimensions=8, query_prompt="unused"))
    embedder = in_memory(source)
    for input_type in (None, "query", "passage"):
        await ask(embedder, ["a"], input_type=input_type)
    assert source.counts == {"a": 1}


async def test_the_least_recently_used_row_is_evicted_first() -> None:
    source = TextByText(replace(ASYMMETRIC, dimensions=100_000))
    embedder = in_memory(source, megabytes=2)
    for text in ("a", "b", "c", "d", "e"):
        await ask(embedder, [text])
    await ask(embedder, ["a"])  # now "b" is the least recently used
    await ask(embedder, ["f"])
    await ask(embedder, ["a", "c", "d", "e", "f"])
    assert set(source.counts.values()) == {1}
    await ask(embedder, ["b"])
    assert source.counts["b"] == 2


async def test_a_stored_row_replaces_the_one_with_the_same_key() -> None:
    store = MemoryStore(10_000)
    keys = [bytes([number]) for number in range(4)]
    for _ in range(100):
        store.put({key: Row(bytes(1000), 1) for key in keys})
    assert set(store.get(keys)) == set(keys)
    store.remove(keys[1:])
    assert len(store) == 1


async def test_returned_vectors_are_read_only() -> None:
    embedder = in_memory(TextByText())
    for _ in range(2):
        result = await checked(embedder, ["a"])
        with pytest.raises(ValueError, match="read-only"):
            result.vectors[0, 0] = 1


async def test_a_large_request_gives_the_same_result_on_a_worker_thread() -> None:
    source = HashEmbedder()
    embedder = in_memory(source)
    texts = [f"text {number % 1500} of many" for number in range(2000)]
    for _ in range(2):
        await checked(embedder, texts)
    assert source.batches == [texts[:1500]]


# --- Failures --------------------------------------------------------------------------------------------------------


async def test_rows_completed_before_a_failure_are_not_computed_again() -> None:
    source = TextByText(failures={"three": ModelUnavailable("broken")})
    embedder = in_memory(source)
    with pytest.raises(ModelUnavailable, match="broken"):
        await ask(embedder, ["one", "two", "three", "four"])
    source.failures.clear()
    await checked(embedder, ["one", "two", "three", "four"])
    assert source.batches[1:] == [["three", "four"]]


async def test_rows_completed_before_a_cancellation_are_not_computed_again() -> None:
    source = TextByText(held={"two": anyio.Event()})
    embedder = in_memory(source)
    async with anyio.create_task_group() as cancelled:
        cancelled.start_soon(ask, embedder, ["one", "two", "three"])
        await wait_until(lambda: source.counts["one"])
        cancelled.cancel_scope.cancel()
    source.held.clear()
    await checked(embedder, ["one", "two", "three"])
    assert source.batches[1:] == [["two", "three"]]


async def test_a_text_that_is_too_long_is_reported_by_its_position_in_the_request() -> None:
    service = service_of(in_memory(HashEmbedder()))
    long = "word " * 70
    await service.create_embedding(service_request(["a", "b"]))
    with pytest.raises(InputTooLong) as caught:
        await service.create_embedding(service_request(["a", "c", "c", "b", long, long, long + "d"]))
    assert caught.value.param == "input[4]"
    assert (caught.value.tokens, caught.value.max_tokens) == (72, 64)
    assert "(too long as well: `input[5]`, `input[6]`)" in caught.value.message


async def test_an_unusable_text_is_reported_by_its_position_in_the_request() -> None:
    source = TextByText(failures={"nothing": InputUnusable("holds nothing", index=1)})
    service = service_of(in_memory(source))
    await service.create_embedding(service_request(["a"]))
    with pytest.raises(InputUnusable) as caught:
        await service.create_embedding(service_request(["a", "b", "a", "nothing"]))
    assert caught.value.message == "`input[3]` holds nothing"


async def test_vectors_that_are_not_finite_are_not_cached() -> None:
    class Broken(HashEmbedder):
        value = math.nan

        def vector(
            self, text: str, input_type: InputType | None = None
        ) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
            return super().vector(text, input_type) * np.float32(self.value)

    source = Broken()
    service = service_of(in_memory(source))
    for value in (math.nan, math.inf, math.nan):
        source.value = value
        with pytest.raises(ModelUnavailable, match="not finite for `input"):
            await service.create_embedding(service_request(["a"]))
    source.value = 1.0
    await service.create_embedding(service_request(["a"]))
    assert len(source.batches) == 4


# --- Concurrent requests ---------------------------------------------------------------------------------------------


async def test_concurrent_requests_for_the_same_texts_compute_them_once() -> None:
    source = TextByText(held={"three": anyio.Event()})
    embedder = in_memory(source)
    async with anyio.create_task_group() as callers:
        for texts in (["one", "two", "three"], ["three", "one"], ["three"], ["two", "four", "three"]):
            callers.start_soon(checked, embedder, texts)
        await wait_until(lambda: source.counts["two"] and source.counts["four"])
        source.held["three"].set()
    assert source.counts == {"one": 1, "two": 1, "three": 1, "four": 1}


async def test_waiting_for_one_text_does_not_mean_waiting_for_the_rest_of_its_call() -> None:
    source = TextByText(held={"one": anyio.Event(), "two": anyio.Event()})
    embedder = in_memory(source)
    async with anyio.create_task_group() as callers:
        callers.start_soon(ask, embedder, ["one", "two"])
        await wait_until(lambda: source.batches)
        async with anyio.create_task_group() as waiting:
            waiting.start_soon(checked, embedder, ["one"])
            await wait_until(lambda: has_waiters(embedder))
            source.held["one"].set()
        assert not source.counts["two"]
        source.held["two"].set()
    assert source.counts == {"one": 1, "two": 1}


def has_waiters(embedder: CachedEmbedder) -> bool:
    """Return whether any request waits for rows that another one is computing."""
    return any(future._callbacks for call in embedder._in_flight.values() for future in call.values())


async def test_when_the_computing_request_is_cancelled_another_one_takes_over() -> None:
    source = TextByText(held={"two": anyio.Event()})
    embedder = in_memory(source)
    async with anyio.create_task_group() as others:
        async with anyio.create_task_group() as cancelled:
            cancelled.start_soon(ask, embedder, ["one", "two", "three"])
            await wait_until(lambda: source.counts["one"])
            for _ in range(3):
                others.start_soon(checked, embedder, ["one", "two", "three"])
            await wait_until(lambda: has_waiters(embedder))
            cancelled.cancel_scope.cancel()
        await wait_until(lambda: len(source.batches) == 2)
        source.held["two"].set()
    assert source.batches == [["one", "two", "three"], ["two", "three"]]
    assert source.counts == {"one": 1, "two": 1, "three": 1}


async def test_cancelling_a_waiting_request_does_not_affect_the_others() -> None:
    source = TextByText(held={"one": anyio.Event()})
    embedder = in_memory(source)
    async with anyio.create_task_group() as others:
        others.start_soon(checked, embedder, ["one", "two"])
        await wait_until(lambda: source.batches)
        async with anyio.create_task_group() as cancelled:
            cancelled.start_soon(ask, embedder, ["one"])
            await wait_until(lambda: has_waiters(embedder))
            cancelled.cancel_scope.cancel()
        others.start_soon(checked, embedder, ["one"])
        await wait_until(lambda: has_waiters(embedder))
        source.held["one"].set()
    assert source.counts == {"one": 1, "two": 1}


async def test_a_failure_of_the_model_fails_all_waiting_requests() -> None:
    source = TextByText(held={"two": anyio.Event()}, failures={"two": UpstreamFailed("down")})
    embedder = in_memory(source)
    messages: list[str] = []

    async def fail() -> None:
        with pytest.raises(UpstreamFailed) as caught:
            await ask(embedder, ["one", "two"])
        messages.append(caught.value.message)

    async with anyio.create_task_group() as callers:
        callers.start_soon(fail)
        await wait_until(lambda: source.counts["one"])
        for _ in range(3):
            callers.start_soon(fail)
        await wait_until(lambda: has_waiters(embedder))
        source.held["two"].set()
    assert messages == ["down"] * 4
    assert source.batches == [["one", "two"]]


@pytest.mark.parametrize(
    "refusal",
    [
        InputTooLong(index=1, tokens=99, max_tokens=64),
        Overloaded("too many texts at once", retry_after=1),
        RuntimeError("a bug"),
    ],
)
async def test_the_refusal_of_one_request_does_not_fail_another(refusal: Exception) -> None:
    source = TextByText(held={"two": anyio.Event()}, failures={"two": refusal})
    embedder = in_memory(source)

    async def fail() -> None:
        with pytest.raises(type(refusal)):
            await ask(embedder, ["one", "two", "three"])

    async with anyio.create_task_group() as callers:
        callers.start_soon(fail)
        await wait_until(lambda: source.counts["one"])
        callers.start_soon(checked, embedder, ["one", "three"])
        await wait_until(lambda: has_waiters(embedder))
        source.held["two"].set()
    assert source.batches == [["one", "two", "three"], ["three"]]


async def test_a_single_text_does_not_wait_for_a_long_call() -> None:
    source = TextByText(held={"0": anyio.Event()})
    embedder = in_memory(source)
    many = [str(number) for number in range(200)]
    async with anyio.create_task_group() as callers:
        callers.start_soon(checked, embedder, many)
        await wait_until(lambda: source.batches)
        callers.start_soon(checked, embedder, many)
        await wait_until(lambda: has_waiters(embedder))
        await checked(embedder, ["77"])
        assert source.counts == {"77": 1}
        source.held["0"].set()
    assert source.batches == [many, ["77"]]


async def test_no_rows_stay_in_flight_after_success_or_failure() -> None:
    source = TextByText(failures={"two": ModelUnavailable("broken")})
    embedder = in_memory(source)
    await ask(embedder, ["one"])
    with pytest.raises(ModelUnavailable):
        await ask(embedder, ["one", "two"])
    assert not embedder._in_flight


# --- Progress --------------------------------------------------------------------------------------------------------


async def progress_of(embedder: CachedEmbedder, texts: list[str]) -> list[int]:
    amounts: list[int] = []

    async def on_progress(done: int) -> None:
        amounts.append(done)

    await ask(embedder, texts, on_progress=on_progress)
    return amounts


async def test_progress_counts_cached_and_duplicate_texts() -> None:
    embedder = in_memory(TextByText())
    assert await progress_of(embedder, ["b", "b", "c"]) == [2, 3]
    assert await progress_of(embedder, ["a", "b", "a", "b", "c", "d"]) == [3, 5, 6]
    assert await progress_of(embedder, ["a", "b", "c", "d"]) == [4]


async def test_progress_never_decreases_even_if_rows_are_dropped() -> None:
    source = TextByText(served_model="v1")
    embedder = in_memory(source)
    await ask(embedder, ["a", "b", "c"])
    source.served_model = "v2"
    assert await progress_of(embedder, ["a", "b", "c", "d"]) == [3, 4, 4, 4, 4]


async def test_progress_counts_what_another_request_completes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embeddings_mcp.embedders.cache.embedder._COLLECT_SECONDS", 0.01)
    source = TextByText(held={"two": anyio.Event(), "three": anyio.Event()})
    embedder = in_memory(source)
    amounts: list[int] = []

    async def on_progress(done: int) -> None:
        amounts.append(done)
        source.held["two" if done == 2 else "three"].set()

    async with anyio.create_task_group() as callers:
        callers.start_soon(ask, embedder, ["two", "three"])
        await wait_until(lambda: source.batches)
        with anyio.fail_after(SECONDS):
            texts = ["one", "two", "one", "three"]
            await embedder.embed(texts, input_type=None, truncate="NONE", on_progress=on_progress)
    assert amounts == [2, 3, 4]


# --- A model that changes behind its name ----------------------------------------------------------------------------


async def test_vectors_of_two_models_behind_one_name_are_never_mixed_in_one_result() -> None:
    source = TextByText(served_model="v1")
    embedder = in_memory(source)
    assert (await checked(embedder, ["one", "two"])).served_model == "v1"
    source.served_model = "v2"
    assert (await checked(embedder, ["one"])).served_model == "v1"  # the change is not visible yet
    assert (await checked(embedder, ["two", "three"])).served_model == "v2"
    assert (await checked(embedder, ["one", "two", "three"])).served_model == "v2"
    assert source.batches == [["one", "two"], ["three"], ["two"], ["one"]]


async def test_a_model_that_keeps_changing_is_an_error() -> None:
    class Changing(TextByText):
        async def embed(self, texts: Sequence[str], **options: Any) -> Embeddings:
            self.served_model = f"v{len(self.batches)}"
            return await super().embed(texts, **options)

    source = Changing()
    embedder = in_memory(source)
    await ask(embedder, ["one"])
    with pytest.raises(UpstreamFailed, match="serves test/asymmetric with different models in turn"):
        await ask(embedder, ["one", "two"])


async def test_cached_rows_of_different_models_are_recomputed() -> None:
    source = TextByText(served_model="v1")
    before = in_memory(source)
    await ask(before, ["one"])
    source.served_model = "v2"
    await ask(before, ["two"])
    after = CachedEmbedder(source, before._cache)
    assert (await checked(after, ["two", "one"])).served_model == "v2"
    assert source.batches[2:] == [["two", "one"]]


# --- The rest of the protocol ----------------------------------------------------------------------------------------


async def test_it_is_a_multi_embedder_if_its_embedder_is_one() -> None:
    class Multi(HashEmbedder):
        async def represent(self, *args: Any, **options: Any) -> Any:
            return args, options

    embedder = in_memory(Multi())
    assert isinstance(embedder, MultiEmbedder)
    options: Any = {"input_type": "query", "truncate": "END", "on_progress": None}
    assert await embedder.represent(["a"], **options) == ((["a"],), options)  # type: ignore[comparison-overlap]
    assert not isinstance(in_memory(HashEmbedder()), MultiEmbedder)


async def test_it_delegates_to_its_embedder() -> None:
    source = TextByText()
    embedder = in_memory(source)
    assert (embedder.card, embedder.origin, await embedder.identify()) == (source.card, source.origin, "test")
    await embedder.check()
    await embedder.aclose()
    assert source.closed
    received: list[tuple[list[int], Embeddings]] = []
    result = await embedder.embed(
        ["a", "b"],
        input_type=None,
        truncate="NONE",
        on_rows=lambda indices, rows: received.append((list(indices), rows)),
    )
    ((indices, rows),) = received
    assert indices == [0, 1]
    assert rows is result

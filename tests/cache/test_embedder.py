"""What a cache before an embedder answers, and what it asks the embedder for."""

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
from tests.support import SECONDS, HashEmbedder, service_of, until

pytestmark = pytest.mark.anyio

TEXTS = ["one", "two of them", "", "one", "vier äöü €", "two of them", "a\x00b"]


def service_request(texts: list[str]) -> EmbeddingRequest:
    return EmbeddingRequest(model="default", input=texts)


async def answers(embedder: CachedEmbedder, texts: list[str], input_type: InputType | None = None) -> Embeddings:
    """What is answered, found to be right."""
    made = await ask(embedder, texts, input_type=input_type)
    source = embedder._embedder
    assert isinstance(source, HashEmbedder)
    np.testing.assert_array_equal(made.vectors, expected(source, texts, input_type))
    assert made.vectors.dtype == np.float32
    assert list(made.tokens) == [len(text.split()) + 2 for text in texts]
    return made


# --- Hits ------------------------------------------------------------------------------------------------------------


async def test_a_text_is_made_once_and_is_the_same_bit_for_bit_ever_after() -> None:
    source = TextByText()
    embedder = in_memory(source)
    first = await answers(embedder, TEXTS[:2])
    again = await answers(embedder, TEXTS[:2])
    assert again.vectors.tobytes() == first.vectors.tobytes()
    assert source.batches == [TEXTS[:2]]


async def test_texts_that_occur_twice_in_a_request_are_made_once_and_counted_twice() -> None:
    source = TextByText()
    made = await answers(in_memory(source), TEXTS)
    assert source.batches == [list(dict.fromkeys(TEXTS))]
    assert made.prompt_tokens == sum(len(text.split()) + 2 for text in TEXTS)


@pytest.mark.parametrize("known", [["two of them"], ["one", "vier äöü €"], ["a\x00b", ""], TEXTS])
async def test_of_a_request_that_is_partly_known_only_the_rest_is_made(known: list[str]) -> None:
    source = TextByText()
    embedder = in_memory(source)
    await answers(embedder, known)
    del source.batches[:]
    await answers(embedder, TEXTS)
    unknown = [text for text in dict.fromkeys(TEXTS) if text not in known]
    assert source.batches == ([unknown] if unknown else [])


async def test_what_decides_about_a_vector_is_never_mixed() -> None:
    source = TextByText()
    embedder = in_memory(source)
    types: tuple[InputType | None, ...] = (None, "query", "passage")
    truncations: tuple[Truncate, ...] = ("NONE", "START", "END")
    cards = (
        ASYMMETRIC,
        replace(ASYMMETRIC, query_prompt="Query: "),
        replace(ASYMMETRIC, max_tokens=32),
        replace(ASYMMETRIC, query_prompt="", passage_prompt=""),  # an endpoint has prompts of its own
    )
    ways = list(itertools.product(types, truncations, cards, ("revision 1", "revision 2")))
    for input_type, truncate, source.card, source.identity in [*ways, *reversed(ways)]:
        made = await ask(embedder, ["a b c"], input_type=input_type, truncate=truncate)
        np.testing.assert_array_equal(made.vectors, expected(source, ["a b c"], input_type))
    # Of texts without a type, the prompts for queries and passages decide nothing; none of the above has a default one.
    cards_that_count = {None: 2, "query": 4, "passage": 3}
    assert source.made["a b c"] == sum(cards_that_count.values()) * len(truncations) * 2


def test_texts_that_differ_in_what_is_no_unicode_have_keys_of_their_own() -> None:
    texts = ["a\ud800", "a\ud801", "a", "A", "a\u0301", "\u00e1"]
    keys = keys_of(texts, identity="", generation="", card=ASYMMETRIC, input_type=None, truncate="NONE")
    assert len(set(keys)) == len(texts)


async def test_where_the_input_type_decides_nothing_all_types_share_their_vectors() -> None:
    source = TextByText(ModelCard(id="test/symmetric", dimensions=8, query_prompt="unused"))
    embedder = in_memory(source)
    for input_type in (None, "query", "passage"):
        await ask(embedder, ["a"], input_type=input_type)
    assert source.made == {"a": 1}


async def test_what_is_not_used_for_longest_is_forgotten_first() -> None:
    source = TextByText(replace(ASYMMETRIC, dimensions=100_000))
    embedder = in_memory(source, megabytes=2)
    for text in ("a", "b", "c", "d", "e"):
        await ask(embedder, [text])
    await ask(embedder, ["a"])  # and with it "b" is the oldest
    await ask(embedder, ["f"])
    await ask(embedder, ["a", "c", "d", "e", "f"])
    assert set(source.made.values()) == {1}
    await ask(embedder, ["b"])
    assert source.made["b"] == 2


async def test_a_row_that_is_made_again_takes_the_place_of_the_one_before() -> None:
    store = MemoryStore(10_000)
    keys = [bytes([number]) for number in range(4)]
    for _ in range(100):
        store.put({key: Row(bytes(1000), 1) for key in keys})
    assert set(store.get(keys)) == set(keys)
    store.drop(keys[1:])
    assert len(store) == 1


async def test_a_vector_cannot_be_changed_from_outside() -> None:
    embedder = in_memory(TextByText())
    for _ in range(2):
        made = await answers(embedder, ["a"])
        with pytest.raises(ValueError, match="read-only"):
            made.vectors[0, 0] = 1


async def test_a_large_request_is_answered_like_a_small_one() -> None:
    source = HashEmbedder()
    embedder = in_memory(source)
    texts = [f"text {number % 1500} of many" for number in range(2000)]
    for _ in range(2):
        await answers(embedder, texts)
    assert source.batches == [texts[:1500]]


# --- Failures --------------------------------------------------------------------------------------------------------


async def test_what_was_made_before_a_failure_is_not_made_again() -> None:
    source = TextByText(failures={"three": ModelUnavailable("broken")})
    embedder = in_memory(source)
    with pytest.raises(ModelUnavailable, match="broken"):
        await ask(embedder, ["one", "two", "three", "four"])
    source.failures.clear()
    await answers(embedder, ["one", "two", "three", "four"])
    assert source.batches[1:] == [["three", "four"]]


async def test_what_was_made_before_the_caller_left_is_not_made_again() -> None:
    source = TextByText(held={"two": anyio.Event()})
    embedder = in_memory(source)
    async with anyio.create_task_group() as leaving:
        leaving.start_soon(ask, embedder, ["one", "two", "three"])
        await until(lambda: source.made["one"])
        leaving.cancel_scope.cancel()
    source.held.clear()
    await answers(embedder, ["one", "two", "three"])
    assert source.batches[1:] == [["two", "three"]]


async def test_an_error_about_a_text_is_about_its_place_in_the_request() -> None:
    service = service_of(in_memory(HashEmbedder()))
    long = "word " * 70
    await service.create_embedding(service_request(["a", "b"]))
    with pytest.raises(InputTooLong) as caught:
        await service.create_embedding(service_request(["a", "c", "c", "b", long, long, long + "d"]))
    assert caught.value.param == "input[4]"
    assert (caught.value.tokens, caught.value.allowed) == (72, 64)
    assert "(too long as well: `input[6]`)" in caught.value.message


async def test_a_text_that_cannot_be_embedded_is_named_by_its_place_in_the_request() -> None:
    source = TextByText(failures={"nothing": InputUnusable("holds nothing", index=1)})
    service = service_of(in_memory(source))
    await service.create_embedding(service_request(["a"]))
    with pytest.raises(InputUnusable) as caught:
        await service.create_embedding(service_request(["a", "b", "a", "nothing"]))
    assert caught.value.message == "`input[3]` holds nothing"


async def test_vectors_that_are_not_numbers_are_not_kept() -> None:
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


# --- Several at once -------------------------------------------------------------------------------------------------


async def test_the_same_texts_asked_for_at_the_same_time_are_made_once() -> None:
    source = TextByText(held={"three": anyio.Event()})
    embedder = in_memory(source)
    async with anyio.create_task_group() as callers:
        for texts in (["one", "two", "three"], ["three", "one"], ["three"], ["two", "four", "three"]):
            callers.start_soon(answers, embedder, texts)
        await until(lambda: source.made["two"] and source.made["four"])
        source.held["three"].set()
    assert source.made == {"one": 1, "two": 1, "three": 1, "four": 1}


async def test_who_waits_for_one_text_does_not_wait_for_the_rest_of_its_call() -> None:
    source = TextByText(held={"one": anyio.Event(), "two": anyio.Event()})
    embedder = in_memory(source)
    async with anyio.create_task_group() as callers:
        callers.start_soon(ask, embedder, ["one", "two"])
        await until(lambda: source.batches)
        async with anyio.create_task_group() as waiting:
            waiting.start_soon(answers, embedder, ["one"])
            await until(lambda: waits(embedder))
            source.held["one"].set()
        assert not source.made["two"]
        source.held["two"].set()
    assert source.made == {"one": 1, "two": 1}


def waits(embedder: CachedEmbedder) -> bool:
    """Whether somebody waits for rows that another request has asked for."""
    return any(future._callbacks for call in embedder._coming.values() for future in call.values())


async def test_when_the_one_who_asked_leaves_another_one_asks() -> None:
    source = TextByText(held={"two": anyio.Event()})
    embedder = in_memory(source)
    async with anyio.create_task_group() as staying:
        async with anyio.create_task_group() as leaving:
            leaving.start_soon(ask, embedder, ["one", "two", "three"])
            await until(lambda: source.made["one"])
            for _ in range(3):
                staying.start_soon(answers, embedder, ["one", "two", "three"])
            await until(lambda: waits(embedder))
            leaving.cancel_scope.cancel()
        await until(lambda: len(source.batches) == 2)
        source.held["two"].set()
    assert source.batches == [["one", "two", "three"], ["two", "three"]]
    assert source.made == {"one": 1, "two": 1, "three": 1}


async def test_who_waits_and_leaves_disturbs_nobody() -> None:
    source = TextByText(held={"one": anyio.Event()})
    embedder = in_memory(source)
    async with anyio.create_task_group() as staying:
        staying.start_soon(answers, embedder, ["one", "two"])
        await until(lambda: source.batches)
        async with anyio.create_task_group() as leaving:
            leaving.start_soon(ask, embedder, ["one"])
            await until(lambda: waits(embedder))
            leaving.cancel_scope.cancel()
        staying.start_soon(answers, embedder, ["one"])
        await until(lambda: waits(embedder))
        source.held["one"].set()
    assert source.made == {"one": 1, "two": 1}


async def test_a_failure_of_the_model_is_told_to_all_who_wait_for_it() -> None:
    source = TextByText(held={"two": anyio.Event()}, failures={"two": UpstreamFailed("down")})
    embedder = in_memory(source)
    told: list[str] = []

    async def fail() -> None:
        with pytest.raises(UpstreamFailed) as caught:
            await ask(embedder, ["one", "two"])
        told.append(caught.value.message)

    async with anyio.create_task_group() as callers:
        callers.start_soon(fail)
        await until(lambda: source.made["one"])
        for _ in range(3):
            callers.start_soon(fail)
        await until(lambda: waits(embedder))
        source.held["two"].set()
    assert told == ["down"] * 4
    assert source.batches == [["one", "two"]]


@pytest.mark.parametrize(
    "refusal",
    [
        InputTooLong(index=1, tokens=99, allowed=64),
        Overloaded("too many texts at once", retry_after=1),
        RuntimeError("a fault of ours"),
    ],
)
async def test_what_one_request_is_refused_for_is_not_told_to_another(refusal: Exception) -> None:
    source = TextByText(held={"two": anyio.Event()}, failures={"two": refusal})
    embedder = in_memory(source)

    async def fail() -> None:
        with pytest.raises(type(refusal)):
            await ask(embedder, ["one", "two", "three"])

    async with anyio.create_task_group() as callers:
        callers.start_soon(fail)
        await until(lambda: source.made["one"])
        callers.start_soon(answers, embedder, ["one", "three"])
        await until(lambda: waits(embedder))
        source.held["two"].set()
    assert source.batches == [["one", "two", "three"], ["three"]]


async def test_a_single_text_does_not_wait_for_its_turn_in_a_long_call() -> None:
    source = TextByText(held={"0": anyio.Event()})
    embedder = in_memory(source)
    many = [str(number) for number in range(200)]
    async with anyio.create_task_group() as callers:
        callers.start_soon(answers, embedder, many)
        await until(lambda: source.batches)
        callers.start_soon(answers, embedder, many)
        await until(lambda: waits(embedder))
        await answers(embedder, ["77"])
        assert source.made == {"77": 1}
        source.held["0"].set()
    assert source.batches == [many, ["77"]]


async def test_it_holds_nothing_once_nobody_waits() -> None:
    source = TextByText(failures={"two": ModelUnavailable("broken")})
    embedder = in_memory(source)
    await ask(embedder, ["one"])
    with pytest.raises(ModelUnavailable):
        await ask(embedder, ["one", "two"])
    assert not embedder._coming


# --- Progress --------------------------------------------------------------------------------------------------------


async def progress_of(embedder: CachedEmbedder, texts: list[str]) -> list[int]:
    amounts: list[int] = []

    async def on_progress(done: int) -> None:
        amounts.append(done)

    await ask(embedder, texts, on_progress=on_progress)
    return amounts


async def test_progress_counts_texts_that_are_known_and_texts_that_come_again() -> None:
    embedder = in_memory(TextByText())
    assert await progress_of(embedder, ["b", "b", "c"]) == [2, 3]
    assert await progress_of(embedder, ["a", "b", "a", "b", "c", "d"]) == [3, 5, 6]
    assert await progress_of(embedder, ["a", "b", "c", "d"]) == [4]


async def test_progress_never_goes_back_even_where_work_does() -> None:
    source = TextByText(served_model="v1")
    embedder = in_memory(source)
    await ask(embedder, ["a", "b", "c"])
    source.served_model = "v2"
    assert await progress_of(embedder, ["a", "b", "c", "d"]) == [3, 4, 4, 4, 4]


async def test_who_waits_for_another_request_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embeddings_mcp.embedders.cache.embedder._SIGN_OF_LIFE", 0.01)
    source = TextByText(held={"two": anyio.Event()})
    embedder = in_memory(source)
    amounts: list[int] = []

    async def on_progress(done: int) -> None:
        amounts.append(done)
        if amounts[-2:] == [2, 2]:
            source.held["two"].set()

    async with anyio.create_task_group() as callers:
        callers.start_soon(ask, embedder, ["two"])
        await until(lambda: source.batches)
        with anyio.fail_after(SECONDS):
            await embedder.embed(["one", "two", "one"], input_type=None, truncate="NONE", on_progress=on_progress)
    assert amounts[0] == 2
    assert amounts[-1] == 3
    assert amounts == sorted(amounts)


# --- A model that is exchanged behind its name -----------------------------------------------------------------------


async def test_vectors_of_two_models_behind_one_name_never_stand_in_one_answer() -> None:
    source = TextByText(served_model="v1")
    embedder = in_memory(source)
    assert (await answers(embedder, ["one", "two"])).served_model == "v1"
    source.served_model = "v2"
    assert (await answers(embedder, ["one"])).served_model == "v1"  # nobody can know yet
    assert (await answers(embedder, ["two", "three"])).served_model == "v2"
    assert (await answers(embedder, ["one", "two", "three"])).served_model == "v2"
    assert source.batches == [["one", "two"], ["three"], ["two"], ["one"]]


async def test_a_model_that_is_exchanged_all_the_time_is_given_up() -> None:
    class Fickle(TextByText):
        async def embed(self, texts: Sequence[str], **options: Any) -> Embeddings:
            self.served_model = f"v{len(self.batches)}"
            return await super().embed(texts, **options)

    source = Fickle()
    embedder = in_memory(source)
    await ask(embedder, ["one"])
    with pytest.raises(UpstreamFailed, match="serves test/asymmetric with different models in turn"):
        await ask(embedder, ["one", "two"])


async def test_rows_of_an_unknown_past_that_do_not_agree_are_made_anew() -> None:
    source = TextByText(served_model="v1")
    before = in_memory(source)
    await ask(before, ["one"])
    source.served_model = "v2"
    await ask(before, ["two"])
    after = CachedEmbedder(source, before._cache)
    assert (await answers(after, ["two", "one"])).served_model == "v2"
    assert source.batches[2:] == [["two", "one"]]


# --- The rest of an embedder -----------------------------------------------------------------------------------------


async def test_it_is_a_multi_embedder_where_its_embedder_is_one() -> None:
    class Multi(HashEmbedder):
        async def represent(self, *args: Any, **options: Any) -> Any:
            return args, options

    embedder = in_memory(Multi())
    assert isinstance(embedder, MultiEmbedder)
    options: Any = {"input_type": "query", "truncate": "END", "on_progress": None}
    assert await embedder.represent(["a"], **options) == ((["a"],), options)  # type: ignore[comparison-overlap]
    assert not isinstance(in_memory(HashEmbedder()), MultiEmbedder)


async def test_it_says_what_its_embedder_says_and_closes_it() -> None:
    source = TextByText()
    embedder = in_memory(source)
    assert (embedder.card, embedder.origin, await embedder.identify()) == (source.card, source.origin, "test")
    await embedder.check()
    await embedder.aclose()
    assert source.closed
    again: list[tuple[list[int], Embeddings]] = []
    made = await embedder.embed(
        ["a", "b"], input_type=None, truncate="NONE", on_rows=lambda places, rows: again.append((list(places), rows))
    )
    ((places, rows),) = again
    assert places == [0, 1]
    assert rows is made

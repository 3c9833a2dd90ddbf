"""The service: which models and requests it accepts, and that every text gets its own vector."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import numpy as np
import numpy.typing as npt
import pytest
from anyio.from_thread import BlockingPortal
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings_mcp.assemble import build_service
from embeddings_mcp.embedders.base import Embeddings
from embeddings_mcp.errors import (
    EmbeddingsError,
    InputTooLong,
    InvalidRequest,
    InvalidSetting,
    ModelUnavailable,
    UnknownModel,
)
from embeddings_mcp.models import DEFAULT_MODEL, InputType, ModelCard
from embeddings_mcp.schema import EmbeddingRequest, SearchRequest, SimilarityRequest
from embeddings_mcp.serialization import parse
from embeddings_mcp.service import MAX_SCORES, EmbeddingService
from embeddings_mcp.settings import Settings
from embeddings_mcp.vectors import normalize
from tests.support import HashEmbedder, wait_until

pytestmark = pytest.mark.anyio

PLAIN = ModelCard(id="Test/Plain", aliases=("plain-alias",), dimensions=8, max_tokens=64)
NESTED = ModelCard(
    id="test/nested",
    dimensions=16,
    matryoshka=(4, 8),
    max_tokens=64,
    input_type="required",
    query_prompt="query: ",
    passage_prompt="passage: ",
)
WIDE = ModelCard(id="test/wide", dimensions=384)

Vectors = npt.NDArray[np.float32]


class NonFiniteEmbedder(HashEmbedder):
    """Returns a vector of NaN for the text ``nan``."""

    def vector(self, text: str, input_type: InputType | None = None) -> Vectors:
        return np.full(8, np.nan, np.float32) if text == "nan" else super().vector(text, input_type)


def service_of(*embedders: HashEmbedder) -> EmbeddingService:
    embedders = embedders or (HashEmbedder(PLAIN), HashEmbedder(NESTED))
    return EmbeddingService(embedders, default_model=embedders[0].card.id)


async def embed(service: EmbeddingService, texts: str | Sequence[str], **fields: Any) -> Any:
    fields = {"model": "default", "input": texts, **fields}
    return await service.create_embedding(parse(EmbeddingRequest, fields))


async def compare(service: EmbeddingService, texts: str | Sequence[str], **fields: Any) -> Any:
    return await service.similarity(parse(SimilarityRequest, {"model": "default", "input": texts, **fields}))


async def search(service: EmbeddingService, query: str | list[str], texts: str | Sequence[str], **fields: Any) -> Any:
    return await service.search(parse(SearchRequest, {"query": query, "input": texts, **fields}))


def vectors_of(answer: Any) -> Vectors:
    assert [item["index"] for item in answer["data"]] == list(range(len(answer["data"])))
    return np.stack([item["embedding"] for item in answer["data"]])


# --- Which model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Test/Plain", "test/plain", "plain-alias", "PLAIN-ALIAS", "default", "Default"])
async def test_a_model_is_found_by_id_alias_or_default_in_any_case(name: str) -> None:
    answer = await embed(service_of(), "a", model=name)
    assert answer["model"] == "Test/Plain"
    np.testing.assert_array_equal(vectors_of(answer)[0], HashEmbedder(PLAIN).vector("a"))


@pytest.mark.parametrize("suffix", ["query", "passage"])
async def test_the_suffix_of_a_model_name_sets_the_input_type(suffix: InputType) -> None:
    expected = HashEmbedder(NESTED).vector("a", suffix)
    for fields in ({"model": f"test/nested-{suffix}"}, {"model": f"TEST/NESTED-{suffix}", "input_type": suffix}):
        answer = await embed(service_of(), "a", **fields)
        assert answer["model"] == "test/nested"
        np.testing.assert_array_equal(vectors_of(answer)[0], expected)


async def test_a_suffix_works_on_aliases_and_on_default() -> None:
    service = service_of(HashEmbedder(NESTED))
    np.testing.assert_array_equal(
        vectors_of(await embed(service, "a", model="default-query"))[0], HashEmbedder(NESTED).vector("a", "query")
    )
    assert (await embed(service_of(), "a", model="plain-alias-query"))["model"] == "Test/Plain"


async def test_a_model_whose_own_name_ends_in_a_suffix_is_matched_exactly() -> None:
    suffixed = ModelCard(id="test/for-query", dimensions=8)
    service = service_of(HashEmbedder(ModelCard(id="test/for", dimensions=8)), HashEmbedder(suffixed))
    assert (await embed(service, "a", model="test/for-query", input_type="passage"))["model"] == "test/for-query"


async def test_a_suffix_that_contradicts_the_input_type_is_rejected() -> None:
    with pytest.raises(InvalidRequest, match="`input_type` is 'passage', but the model name ends in -query") as caught:
        await embed(service_of(), "a", model="test/nested-query", input_type="passage")
    assert caught.value.param == "input_type"


async def test_the_error_for_an_unknown_model_lists_the_served_ones() -> None:
    with pytest.raises(UnknownModel) as caught:
        await embed(service_of(), "a", model="gone" * 1000)
    assert caught.value.param == "model"
    assert "served are: Test/Plain, test/nested (or `default`)" in caught.value.message
    assert len(caught.value.message) < 300


async def test_the_model_name_that_an_endpoint_reports_is_passed_on() -> None:
    class Renamed(HashEmbedder):
        async def embed(self, texts: Sequence[str], **options: Any) -> Embeddings:
            result = await super().embed(texts, **options)
            return Embeddings(result.vectors, result.tokens, served_model="test/plain-v2")

    service = service_of(Renamed(PLAIN))
    assert (await embed(service, "a"))["model"] == "test/plain-v2"
    assert (await compare(service, ["a", "b"]))["model"] == "test/plain-v2"
    assert (await search(service, "a", ["b"]))["model"] == "test/plain-v2"


def test_two_models_with_the_same_name_are_rejected() -> None:
    other = ModelCard(id="test/other", aliases=("PLAIN-alias",))
    with pytest.raises(InvalidSetting, match="two models have the name 'plain-alias'"):
        service_of(HashEmbedder(PLAIN), HashEmbedder(other))


def test_no_model_can_be_named_default() -> None:
    with pytest.raises(InvalidSetting, match="no model can be named 'default'"):
        service_of(HashEmbedder(ModelCard(id="Default")))


def test_a_default_model_that_is_not_served_is_rejected() -> None:
    with pytest.raises(InvalidSetting, match="'gone' is not among the models served: Test/Plain"):
        EmbeddingService([HashEmbedder(PLAIN)], default_model="gone")


# --- What a model allows ---------------------------------------------------------------------------------------------


async def test_an_asymmetric_model_requires_an_input_type() -> None:
    for ask in (embed, compare):
        with pytest.raises(InvalidRequest, match="`input_type` is required by test/nested") as caught:
            await ask(service_of(), ["a"], model="test/nested")
        assert caught.value.param == "input_type"
        assert "'query' for search queries, 'passage' for the texts to search" in caught.value.message


async def test_a_symmetric_model_returns_the_same_vector_for_every_input_type() -> None:
    plain = vectors_of(await embed(service_of(), "a"))
    for input_type in ("query", "passage"):
        np.testing.assert_array_equal(vectors_of(await embed(service_of(), "a", input_type=input_type)), plain)


@pytest.mark.parametrize("dimensions", [4, 8])
async def test_vectors_of_a_matryoshka_model_are_truncated_and_then_normalized(dimensions: int) -> None:
    texts = ["a", "b", "c"]
    whole = vectors_of(await embed(service_of(), texts, model="test/nested-query"))
    cut = vectors_of(await embed(service_of(), texts, model="test/nested-query", dimensions=dimensions))
    assert cut.shape == (3, dimensions)
    np.testing.assert_array_equal(cut, normalize(whole[:, :dimensions]))
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, rtol=1e-6)


async def test_scores_are_those_of_the_shortened_vectors() -> None:
    fields = {"model": "test/nested-passage", "dimensions": 4}
    cut = vectors_of(await embed(service_of(), ["a", "b"], **fields))
    scores = (await compare(service_of(), ["a", "b"], **fields))["scores"]
    np.testing.assert_allclose(scores, cut @ cut.T, atol=5.1e-5)


async def test_passages_are_ranked_by_their_shortened_vectors() -> None:
    (query,) = vectors_of(await embed(service_of(), "q", model="test/nested-query", dimensions=4))
    passages = vectors_of(await embed(service_of(), ["a", "b"], model="test/nested-passage", dimensions=4))
    for hit in (await search(service_of(), "q", ["a", "b"], model="test/nested", dimensions=4))["results"]:
        assert hit["score"] == pytest.approx(passages[hit["index"]] @ query, abs=5.1e-5)


async def test_the_full_length_may_be_requested_explicitly() -> None:
    for model, dimensions in (("default", 8), ("test/nested-query", 16)):
        whole = vectors_of(await embed(service_of(), "a", model=model))
        np.testing.assert_array_equal(
            vectors_of(await embed(service_of(), "a", model=model, dimensions=dimensions)), whole
        )


@pytest.mark.parametrize(
    ("model", "dimensions", "accepted"),
    [
        ("default", 4, "its vectors have 8 and cannot be shortened (it is not a Matryoshka model)"),
        ("test/nested-query", 5, "accepted are 4, 8 and 16"),
        ("test/nested-query", 32, "accepted are 4, 8 and 16"),
        ("test/nested-query", 0, "accepted are 4, 8 and 16"),
        ("test/nested-query", -(10**4000), "accepted are 4, 8 and 16"),
    ],
    ids=["plain", "between", "longer", "none", "endless"],
)
async def test_the_error_for_other_lengths_lists_the_accepted_ones(model: str, dimensions: int, accepted: str) -> None:
    for ask in (embed, compare):
        with pytest.raises(InvalidRequest) as caught:
            await ask(service_of(), ["a"], model=model, dimensions=dimensions)
        assert caught.value.param == "dimensions"
        assert caught.value.message.endswith(accepted)
        assert len(caught.value.message) < 200


async def test_a_model_of_unknown_length_is_checked_before_its_vectors_are_shortened() -> None:
    class LearnsItsLength(HashEmbedder):
        async def check(self) -> None:
            self.card = PLAIN

    unknown = ModelCard(id="test/unknown")
    assert vectors_of(await embed(service_of(LearnsItsLength(unknown)), "a", dimensions=8)).shape == (1, 8)
    with pytest.raises(InvalidRequest, match="is not known here"):
        await embed(service_of(HashEmbedder(unknown)), "a", dimensions=8)


LONG = "word " * 100


@pytest.mark.parametrize(
    ("ask", "texts", "fields", "place"),
    [
        (embed, LONG, {}, "input"),
        (embed, ["a", LONG], {}, "input[1]"),
        (compare, ["a", LONG], {"other": "b"}, "input[1]"),
        (compare, ["a", "b"], {"other": LONG}, "other"),
        (compare, "a", {"other": ["b", "c", LONG]}, "other[2]"),
        (search, "a", {"texts": ["b", LONG]}, "input[1]"),
        (search, LONG, {"texts": ["b"]}, "query"),
    ],
)
async def test_a_text_that_is_too_long_is_named_by_its_field(ask: Any, texts: Any, fields: Any, place: str) -> None:
    with pytest.raises(InputTooLong) as caught:
        await ask(service_of(), texts, **fields)
    assert caught.value.param == place
    assert caught.value.message.startswith(f"`{place}` has 102 tokens, and the model takes 64")
    await ask(service_of(), texts, **fields, truncate="END")


@pytest.mark.parametrize(
    ("ask", "texts", "fields", "place"),
    [
        (embed, "nan", {}, "input"),
        (compare, ["a", "b"], {"other": ["c", "nan"]}, "other[1]"),
        (search, "nan", {"texts": ["b"]}, "query"),
    ],
)
async def test_vectors_that_are_not_finite_are_never_returned(ask: Any, texts: Any, fields: Any, place: str) -> None:
    with pytest.raises(ModelUnavailable, match="not finite") as caught:
        await ask(service_of(NonFiniteEmbedder(PLAIN)), texts, **fields)
    assert f"`{place}`" in caught.value.message


# --- Vectors ---------------------------------------------------------------------------------------------------------


async def test_floats_and_base64_are_the_same_vectors() -> None:
    texts = ["a", "b", "a"]
    floats = vectors_of(await embed(service_of(), texts))
    packed = await embed(service_of(), texts, encoding_format="base64")
    decoded = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in packed["data"]]
    np.testing.assert_array_equal(np.stack(decoded), floats)
    assert packed["usage"] == {"prompt_tokens": 9, "total_tokens": 9}


async def test_a_single_text_gets_a_list_of_one() -> None:
    alone, listed = await embed(service_of(), "a"), await embed(service_of(), ["a"])
    assert alone["object"] == listed["object"] == "list"
    assert [item["object"] for item in alone["data"]] == ["embedding"]
    np.testing.assert_array_equal(vectors_of(alone), vectors_of(listed))


async def test_an_embedder_gets_a_request_as_one_list() -> None:
    embedder = HashEmbedder(PLAIN)
    await compare(service_of(embedder), ["a", "b"], other=["c", "a"])
    assert embedder.batches == [["a", "b", "c", "a"]]


async def test_progress_counts_every_text_of_the_request() -> None:
    done: list[int] = []

    async def on_progress(count: int) -> None:
        done.append(count)

    await service_of().similarity(
        parse(SimilarityRequest, {"model": "default", "input": ["a", "b"], "other": "c"}), on_progress
    )
    assert done == [1, 2, 3]


@pytest.mark.parametrize(("ask", "fields"), [(embed, {}), (compare, {"top_k": 3}), (search, {"query": "a"})])
async def test_large_responses_are_computed_off_the_event_loop(ask: Any, fields: dict[str, Any]) -> None:
    """The embedder never yields, so no other task runs unless the service itself yields to the event loop."""
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take_turns)
        assert await ask(service_of(HashEmbedder(WIDE)), texts=[str(number) for number in range(300)], **fields)
        assert turns
        tasks.cancel_scope.cancel()


# --- The real model --------------------------------------------------------------------------------------------------

POOL = [
    "a",
    "A kitten sleeps on the sofa.",
    "Stock prices fell sharply on Monday.",
    '["a", "b"]',
    "Grüße aus Köln, \N{GREEK SMALL LETTER ALPHA} und \N{CJK UNIFIED IDEOGRAPH-8A9E} \N{CAT FACE}",
    "a " * 200,
    "The quick brown fox jumps over the lazy dog. " * 5,
    " ",
]


@pytest.fixture(scope="module")
def portal() -> Iterator[BlockingPortal]:
    with anyio.from_thread.start_blocking_portal() as portal:
        yield portal


@pytest.fixture(scope="module")
def minilm(portal: BlockingPortal) -> Iterator[EmbeddingService]:
    service = build_service(Settings(models=(DEFAULT_MODEL,)))
    yield service
    portal.call(service.aclose)


@pytest.fixture(scope="module")
def alone(portal: BlockingPortal, minilm: EmbeddingService) -> dict[str, Vectors]:
    """The vector that each text has when it is embedded by itself."""
    return {text: vectors_of(portal.call(embed, minilm, text))[0] for text in POOL}


@settings(max_examples=15)
@given(texts=st.lists(st.sampled_from(POOL), min_size=1, max_size=8))
def test_a_text_gets_its_own_vector_in_any_batch_even_with_duplicates(
    texts: list[str], portal: BlockingPortal, minilm: EmbeddingService, alone: dict[str, Vectors]
) -> None:
    together = vectors_of(portal.call(embed, minilm, texts))
    np.testing.assert_allclose(together, [alone[text] for text in texts], atol=1e-5)


def test_concurrent_callers_get_their_own_vectors(
    portal: BlockingPortal, minilm: EmbeddingService, alone: dict[str, Vectors]
) -> None:
    requests = [POOL[start:] + POOL[:start] for start in range(4)]
    answers: list[Any] = [None] * len(requests)

    async def ask(caller: int) -> None:
        answers[caller] = await embed(minilm, requests[caller])

    async def ask_all() -> None:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as callers:
                for caller in range(len(requests)):
                    callers.start_soon(ask, caller)

    portal.call(ask_all)
    for texts, answer in zip(requests, answers, strict=True):
        np.testing.assert_allclose(vectors_of(answer), [alone[text] for text in texts], atol=1e-5)


# --- Scores ----------------------------------------------------------------------------------------------------------


def expected_scores(left: Vectors, right: Vectors, metric: str) -> npt.NDArray[np.float64]:
    """Computed by definition in float64; the vectors have length 1, so cosine and dot product are the same."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    distances: npt.NDArray[np.float64] = np.sqrt(((a[:, None, :] - b[None, :, :]) ** 2).sum(axis=2))
    return distances if metric == "euclidean" else a @ b.T


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("other", [None, ["d", "a"]])
async def test_similarity_scores_every_input_with_every_other(metric: str, other: list[str] | None) -> None:
    texts = ["a", "b", "c"]
    fields = {"metric": metric} | ({} if other is None else {"other": other})
    answer = await compare(service_of(), texts, **fields)
    rows = vectors_of(await embed(service_of(), texts))
    columns = rows if other is None else vectors_of(await embed(service_of(), other))
    assert (answer["model"], answer["metric"]) == ("Test/Plain", metric)
    assert "pairs" not in answer
    np.testing.assert_allclose(answer["scores"], expected_scores(rows, columns, metric), atol=5.1e-5)
    assert answer["usage"]["prompt_tokens"] == 3 * (len(rows) + (0 if other is None else len(columns)))


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("other", [None, ["d", "a", "b"]])
async def test_the_best_pairs_are_the_best_of_the_full_matrix(metric: str, other: list[str] | None) -> None:
    texts = ["a", "b", "c", "a"]
    fields = {"metric": metric} | ({} if other is None else {"other": other})
    matrix = (await compare(service_of(), texts, **fields))["scores"]
    places = [
        (row, column)
        for row in range(len(texts))
        for column in range(row + 1 if other is None else 0, len(other or texts))
    ]
    ranked = sorted(places, key=lambda place: matrix[place[0]][place[1]] * (1 if metric == "euclidean" else -1))
    for top_k in (1, 3, len(places), len(places) + 5):
        answer = await compare(service_of(), texts, top_k=top_k, **fields)
        assert "scores" not in answer
        found = [(pair["input"], pair["other"]) for pair in answer["pairs"]]
        assert len(found) == min(top_k, len(places))
        assert [pair["score"] for pair in answer["pairs"]] == [matrix[row][column] for row, column in ranked[:top_k]]
        assert len(set(found)) == len(found)
        for pair in answer["pairs"]:
            assert pair["score"] == matrix[pair["input"]][pair["other"]]


async def test_duplicates_are_the_closest_pair() -> None:
    (pair,) = (await compare(service_of(), ["a", "b", "c", "b"], top_k=1))["pairs"]
    assert pair == {"input": 1, "other": 3, "score": 1.0}


async def test_one_text_alone_has_no_pair() -> None:
    assert (await compare(service_of(), ["a"], top_k=3))["pairs"] == []
    assert (await compare(service_of(), ["a"]))["scores"] == [[1.0]]


async def test_scores_are_rounded_and_zero_has_no_sign() -> None:
    class Axes(HashEmbedder):
        def vector(self, text: str, input_type: InputType | None = None) -> Vectors:
            return np.array({"x": [1, 0], "y": [-1e-6, 1]}[text], np.float32)

    scores = (await compare(service_of(Axes(ModelCard(id="test/axes", dimensions=2))), ["x", "y"]))["scores"]
    assert scores == [[1.0, 0.0], [0.0, 1.0]]
    assert math.copysign(1, scores[0][1]) == 1
    for row in (await compare(service_of(), ["a", "b", "c"]))["scores"]:
        assert row == [round(score, 4) for score in row]


async def test_a_matrix_with_too_many_scores_is_rejected() -> None:
    side = math.isqrt(MAX_SCORES)
    texts = [str(number) for number in range(side + 1)]
    assert len((await compare(service_of(), texts[:side]))["scores"]) == side
    for one, fields in ((texts, {}), (texts[:side], {"other": texts})):
        with pytest.raises(InvalidRequest, match="`top_k` is required here") as caught:
            await compare(service_of(), one, **fields)
        assert caught.value.param == "top_k"
    assert len((await compare(service_of(), texts, top_k=MAX_SCORES))["pairs"]) == (side + 1) * side // 2
    with pytest.raises(InvalidRequest, match=f"`top_k` must be at most {MAX_SCORES:,} here") as caught:
        await compare(service_of(), texts, other=texts, top_k=MAX_SCORES + 1)
    assert caught.value.param == "top_k"
    # `top_k` may exceed the number of pairs by any amount.
    assert len((await compare(service_of(), texts, top_k=10 * MAX_SCORES))["pairs"]) == (side + 1) * side // 2


# --- Search ----------------------------------------------------------------------------------------------------------


async def test_search_embeds_the_query_as_a_query_and_the_passages_as_passages() -> None:
    texts = ["a", "b", "c", "d"]
    service = service_of(HashEmbedder(NESTED))
    query = vectors_of(await embed(service, "q", input_type="query"))
    passages = vectors_of(await embed(service, texts, input_type="passage"))
    scores = expected_scores(query, passages, "cosine")[0]
    answer = await search(service, "q", texts)
    assert [hit["index"] for hit in answer["results"]] == np.argsort(-scores).tolist()
    np.testing.assert_allclose([hit["score"] for hit in answer["results"]], sorted(scores, reverse=True), atol=5.1e-5)
    assert answer["usage"] == {"prompt_tokens": 15, "total_tokens": 15}


@pytest.mark.parametrize(("card", "calls"), [(PLAIN, [["q", "r", "a", "b"]]), (NESTED, [["q", "r"], ["a", "b"]])])
async def test_search_calls_a_symmetric_model_once(card: ModelCard, calls: list[list[str]]) -> None:
    embedder, done = HashEmbedder(card), list[int]()

    async def on_progress(count: int) -> None:
        done.append(count)

    request = parse(SearchRequest, {"query": ["q", "r"], "input": ["a", "b"]})
    answer = await service_of(embedder).search(request, on_progress)
    assert embedder.batches == calls
    assert done == [1, 2, 3, 4]
    assert answer["usage"]["prompt_tokens"] == 12


async def test_search_returns_top_k_hits_and_keeps_ties_in_the_order_of_the_passages() -> None:
    texts = ["b", "a", "b", "a"]
    service = service_of()
    everything = [hit["index"] for hit in (await search(service, "a", texts))["results"]]
    assert everything[:2] == [1, 3]
    for top_k in (1, 2, 3):
        hits = (await search(service, "a", texts, top_k=top_k))["results"]
        assert [hit["index"] for hit in hits] == everything[:top_k]
    assert len((await search(service, "a", [str(number) for number in range(20)]))["results"]) == 10


async def test_with_several_wordings_each_passage_is_scored_by_its_closest_one() -> None:
    texts = ["a", "b", "c", "d"]
    service = service_of(HashEmbedder(NESTED))
    wordings = vectors_of(await embed(service, ["q", "r", "s"], input_type="query"))
    passages = vectors_of(await embed(service, texts, input_type="passage"))
    scores = expected_scores(wordings, passages, "cosine").max(axis=0)
    answer = await search(service, ["q", "r", "s"], texts)
    assert [hit["index"] for hit in answer["results"]] == np.argsort(-scores).tolist()
    np.testing.assert_allclose([hit["score"] for hit in answer["results"]], sorted(scores, reverse=True), atol=5.1e-5)


async def test_search_rejects_a_model_suffix() -> None:
    with pytest.raises(InvalidRequest, match="must be without the suffix -query") as caught:
        await search(service_of(), "a", ["b"], model="test/nested-query")
    assert caught.value.param == "model"


# --- The service itself ----------------------------------------------------------------------------------------------


async def test_models_are_listed_with_their_known_properties() -> None:
    service = service_of(HashEmbedder(PLAIN), HashEmbedder(NESTED), HashEmbedder(ModelCard(id="test/unknown")))
    plain, nested, unknown = (await service.list_models())["models"]
    assert (plain["id"], plain["default"], plain["aliases"]) == ("Test/Plain", True, ["plain-alias"])
    assert (plain["dimensions"], plain["allowed_dimensions"], plain["max_tokens"]) == (8, [], 64)
    assert (nested["default"], nested["allowed_dimensions"], nested["input_type"]) == (False, [4, 8], "required")
    assert not unknown.keys() & {"dimensions", "max_tokens", "license"}
    assert await service.describe("PLAIN-ALIAS") == await service.describe("default") == plain
    with pytest.raises(UnknownModel):
        await service.describe("gone")


async def test_closing_the_service_closes_every_embedder_even_if_one_fails() -> None:
    class Stuck(HashEmbedder):
        async def aclose(self) -> None:
            raise OSError("stuck")

    first, last = HashEmbedder(PLAIN), HashEmbedder(NESTED)
    service = service_of(first, Stuck(ModelCard(id="test/stuck")), last)
    with pytest.raises(OSError, match="stuck"):
        await service.aclose()
    assert first.closed
    assert last.closed


async def test_cancelling_a_caller_cancels_its_embedding_and_no_other() -> None:
    slow, quick = HashEmbedder(PLAIN, gate=anyio.Event()), HashEmbedder(NESTED)
    service = service_of(slow, quick)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(embed, service, "a")
            await wait_until(lambda: slow.batches)
            assert await embed(service, "b", model="test/nested-query")
            tasks.cancel_scope.cancel()
    assert slow.cancelled
    assert not quick.cancelled


async def test_the_service_is_ready_when_its_default_model_is() -> None:
    class Unready(HashEmbedder):
        async def check(self) -> None:
            raise ModelUnavailable("its disk is gone")

    await service_of(HashEmbedder(PLAIN), Unready(NESTED)).check()
    with pytest.raises(EmbeddingsError, match="its disk is gone"):
        await service_of(Unready(NESTED), HashEmbedder(PLAIN)).check()

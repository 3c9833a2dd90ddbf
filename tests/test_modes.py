"""BGE-M3's three ways to compare texts, through the service, on the tiny checkpoint with its reference values."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
import pytest

from embeddings_mcp.assemble import build_service
from embeddings_mcp.embedders.base import Representations
from embeddings_mcp.errors import InvalidRequest
from embeddings_mcp.models import ModelCard
from embeddings_mcp.schema import ColbertEmbeddingRequest, SearchRequest, SimilarityRequest, SparseEmbeddingRequest
from embeddings_mcp.serialization import parse
from embeddings_mcp.service import EmbeddingService
from embeddings_mcp.settings import Settings
from tests.support import SECONDS, HashEmbedder, service_of

pytestmark = pytest.mark.anyio

FOLDER = Path(__file__).parent / "golden" / "bge-m3"
GOLDEN = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
# The reference's own scores are of the first six cases, of which one is empty: no request may hold that.
CASES = [case for case in GOLDEN["cases"] if case["max_length"] == GOLDEN["max_tokens"] and case["input"]]
SCORED = [case["id"] for case in CASES if case["id"] < 6]
TEXTS = [case["input"] for case in CASES]
TOLERANCE = GOLDEN["tolerance_abs"]


@pytest.fixture
async def service() -> AsyncIterator[EmbeddingService]:
    made = build_service(Settings(models=(f"bge-m3={FOLDER / 'model'}",)))
    yield made
    await made.aclose()


async def test_the_lexical_weights_of_every_text_are_those_of_the_reference(service: EmbeddingService) -> None:
    request = parse(SparseEmbeddingRequest, {"model": "bge-m3", "input": TEXTS, "truncate": "END"})
    answer = await service.create_sparse_embedding(request)

    for case, found in zip(CASES, answer["data"], strict=True):
        expected = {int(token): weight for token, weight in case["lexical_weights"].items()}
        assert found["token_ids"].tolist() == sorted(expected), case["name"]
        weights = [expected[token] for token in found["token_ids"].tolist()]
        assert found["weights"] == pytest.approx(weights, abs=TOLERANCE), case["name"]


async def test_the_token_vectors_of_every_text_are_those_of_the_reference(service: EmbeddingService) -> None:
    request = parse(ColbertEmbeddingRequest, {"model": "bge-m3", "input": TEXTS, "truncate": "END"})
    answer = await service.create_colbert_embedding(request)

    for case, found in zip(CASES, answer["data"], strict=True):
        expected = np.array(case["colbert_vecs"])
        assert found["shape"] == list(expected.shape), case["name"]
        assert np.abs(found["embedding"] - expected).max() <= TOLERANCE, case["name"]


@pytest.mark.parametrize(("mode", "reference"), [("sparse", "lexical"), ("colbert", "colbert")])
async def test_similarity_scores_as_the_reference_does(service: EmbeddingService, mode: str, reference: str) -> None:
    texts = [GOLDEN["cases"][number]["input"] for number in SCORED]
    request = parse(SimilarityRequest, {"model": "bge-m3", "input": texts, "other": texts, "mode": mode})
    answer = await service.similarity(request)

    expected = np.array(GOLDEN["pair_scores_first6"][reference])[np.ix_(SCORED, SCORED)]
    assert np.array(answer["scores"]) == pytest.approx(expected, abs=1e-4)
    assert "metric" not in answer


async def test_hybrid_weighs_the_three_kinds_of_scores(service: EmbeddingService) -> None:
    async def scores(mode: str) -> Any:
        request = parse(SimilarityRequest, {"model": "bge-m3", "input": TEXTS[:4], "mode": mode, "truncate": "END"})
        return np.array((await service.similarity(request))["scores"])

    mixed = 0.4 * await scores("dense") + 0.2 * await scores("sparse") + 0.4 * await scores("colbert")

    assert await scores("hybrid") == pytest.approx(mixed, abs=2e-4)


@pytest.mark.parametrize("mode", ["dense", "sparse", "colbert", "hybrid"])
async def test_search_finds_the_passage_that_says_the_same_in_every_mode(service: EmbeddingService, mode: str) -> None:
    wanted = TEXTS.index("The quick brown fox jumps over the lazy dog.")
    request = parse(
        SearchRequest, {"query": TEXTS[wanted], "input": TEXTS, "mode": mode, "top_k": 1, "truncate": "END"}
    )
    answer = await service.search(request)

    assert answer["results"][0]["index"] == wanted


async def test_top_k_keeps_the_closest_pairs_of_any_mode(service: EmbeddingService) -> None:
    asked = {"model": "bge-m3", "input": TEXTS[:5], "mode": "sparse"}
    every = (await service.similarity(parse(SimilarityRequest, asked)))["scores"]
    best = (await service.similarity(parse(SimilarityRequest, asked | {"top_k": 2})))["pairs"]

    above = sorted((every[row][column] for row in range(5) for column in range(row + 1, 5)), reverse=True)
    assert [pair["score"] for pair in best] == above[:2]


class TokenVector(np.ndarray[Any, Any]):
    """The only one of a text, which says when it is compared, and counts how often."""

    begun = threading.Event()
    times = 0

    def __matmul__(self, other: Any) -> Any:
        TokenVector.times += 1
        TokenVector.begun.set()
        return np.asarray(self) @ other


class TokenEmbedder(HashEmbedder):
    """Makes a vector of each text's only token, too."""

    async def represent(self, texts: Sequence[str], **options: Any) -> Representations:
        made = await self.embed(texts, **options)
        return Representations(
            made.vectors, sparse=(), colbert=[row.view(TokenVector)[None] for row in made.vectors], prompt_tokens=0
        )


async def test_the_comparing_of_token_vectors_ends_with_its_request() -> None:
    service = service_of(TokenEmbedder(ModelCard(id="test/tokens", dimensions=8, modes=("dense", "colbert"))))
    texts = [str(number) for number in range(1_000)]
    request = parse(SimilarityRequest, {"model": "default", "input": texts, "mode": "colbert", "top_k": 1})

    with anyio.fail_after(SECONDS):
        async with anyio.create_task_group() as group:
            group.start_soon(service.similarity, request)
            assert await anyio.to_thread.run_sync(TokenVector.begun.wait, SECONDS)
            group.cancel_scope.cancel()
    assert 0 < TokenVector.times < 1_000 * 1_000


async def test_a_model_without_the_mode_says_which_it_has() -> None:
    service = service_of()
    request = parse(SearchRequest, {"query": "a", "input": ["b"], "mode": "colbert"})

    with pytest.raises(
        InvalidRequest, match="`mode`: test/hash does not make what mode 'colbert' needs; its modes are: dense"
    ):
        await service.search(request)


async def test_a_model_without_the_vectors_that_a_route_is_for_says_what_it_has() -> None:
    service = service_of()
    asked = {"model": "default", "input": ["a"]}

    with pytest.raises(
        InvalidRequest, match="`model`: test/hash does not make what mode 'sparse' needs; its modes are: dense"
    ):
        await service.create_sparse_embedding(parse(SparseEmbeddingRequest, asked))
    with pytest.raises(
        InvalidRequest, match="`model`: test/hash does not make what mode 'colbert' needs; its modes are: dense"
    ):
        await service.create_colbert_embedding(parse(ColbertEmbeddingRequest, asked))


async def test_a_metric_is_refused_where_no_dense_vectors_are_compared(service: EmbeddingService) -> None:
    request = parse(SimilarityRequest, {"model": "bge-m3", "input": ["a", "b"], "mode": "sparse", "metric": "dot"})

    with pytest.raises(InvalidRequest, match="`metric` is for mode 'dense' only"):
        await service.similarity(request)


async def test_without_its_two_small_layers_the_checkpoint_is_dense_only(tmp_path: Path) -> None:
    for file in (FOLDER / "model").iterdir():
        if file.suffix != ".pt":
            (tmp_path / file.name).symlink_to(file)
    service = build_service(Settings(models=(f"bge-m3={tmp_path}",)))

    assert (await service.describe("bge-m3"))["modes"] == ["dense"]

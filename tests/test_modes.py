"""BGE-M3's three comparison modes, through the service, on a tiny checkpoint with reference values."""

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
# The reference has scores for the first six cases, one of which is empty: requests reject empty texts.
CASES = [case for case in GOLDEN["cases"] if case["max_length"] == GOLDEN["max_tokens"] and case["input"]]
SCORED = [case["id"] for case in CASES if case["id"] < 6]
TEXTS = [case["input"] for case in CASES]
TOLERANCE = GOLDEN["tolerance_abs"]


@pytest.fixture
async def service() -> AsyncIterator[EmbeddingService]:
    built = build_service(Settings(models=(f"bge-m3={FOLDER / 'model'}",)))
    yield built
    await built.aclose()


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
async def test_similarity_scores_match_the_reference(service: EmbeddingService, mode: str, reference: str) -> None:
    texts = [GOLDEN["cases"][number]["input"] for number in SCORED]
    request = parse(SimilarityRequest, {"model": "bge-m3", "input": texts, "other": texts, "mode": mode})
    answer = await service.similarity(request)

    expected = np.array(GOLDEN["pair_scores_first6"][reference])[np.ix_(SCORED, SCORED)]
    assert np.array(answer["scores"]) == pytest.approx(expected, abs=1e-4)
    assert "metric" not in answer


async def test_hybrid_scores_are_the_weighted_sum_of_the_three_kinds(service: EmbeddingService) -> None:
    async def scores(mode: str) -> Any:
        request = parse(SimilarityRequest, {"model": "bge-m3", "input": TEXTS[:4], "mode": mode, "truncate": "END"})
        return np.array((await service.similarity(request))["scores"])

    combined = 0.4 * await scores("dense") + 0.2 * await scores("sparse") + 0.4 * await scores("colbert")

    assert await scores("hybrid") == pytest.approx(combined, abs=2e-4)


@pytest.mark.parametrize("mode", ["dense", "sparse", "colbert", "hybrid"])
async def test_search_finds_an_identical_passage_in_every_mode(service: EmbeddingService, mode: str) -> None:
    expected = TEXTS.index("The quick brown fox jumps over the lazy dog.")
    request = parse(
        SearchRequest, {"query": TEXTS[expected], "input": TEXTS, "mode": mode, "top_k": 1, "truncate": "END"}
    )
    answer = await service.search(request)

    assert answer["results"][0]["index"] == expected


async def test_top_k_returns_the_closest_pairs_in_sparse_mode(service: EmbeddingService) -> None:
    fields = {"model": "bge-m3", "input": TEXTS[:5], "mode": "sparse"}
    matrix = (await service.similarity(parse(SimilarityRequest, fields)))["scores"]
    best = (await service.similarity(parse(SimilarityRequest, fields | {"top_k": 2})))["pairs"]

    scores = sorted((matrix[row][column] for row in range(5) for column in range(row + 1, 5)), reverse=True)
    assert [pair["score"] for pair in best] == scores[:2]


async def test_cancelling_the_request_stops_the_comparison_of_token_vectors() -> None:
    compared = threading.Event()
    comparisons = 0

    class TokenVector(np.ndarray[Any, Any]):
        """A text's only token vector; signals its first comparison and counts all of them."""

        def __matmul__(self, other: Any) -> Any:
            nonlocal comparisons
            comparisons += 1
            compared.set()
            return np.asarray(self) @ other

    class TokenEmbedder(HashEmbedder):
        """Also returns a token vector for each text's only token."""

        async def represent(self, texts: Sequence[str], **options: Any) -> Representations:
            result = await self.embed(texts, **options)
            vectors = [row.view(TokenVector)[None] for row in result.vectors]
            return Representations(result.vectors, sparse=(), colbert=vectors, prompt_tokens=0)

    service = service_of(TokenEmbedder(ModelCard(id="test/tokens", dimensions=8, modes=("dense", "colbert"))))
    texts = [str(number) for number in range(1_000)]
    request = parse(SimilarityRequest, {"model": "default", "input": texts, "mode": "colbert", "top_k": 1})

    with anyio.fail_after(SECONDS):
        async with anyio.create_task_group() as group:
            group.start_soon(service.similarity, request)
            assert await anyio.to_thread.run_sync(compared.wait, SECONDS)
            group.cancel_scope.cancel()
    assert 0 < comparisons < 1_000 * 1_000


async def test_the_error_for_an_unsupported_mode_lists_the_supported_ones() -> None:
    service = service_of()
    request = parse(SearchRequest, {"query": "a", "input": ["b"], "mode": "colbert"})

    with pytest.raises(InvalidRequest, match="`mode`: test/hash does not support mode 'colbert'; its modes are: dense"):
        await service.search(request)


async def test_the_error_of_a_route_that_the_model_does_not_support_lists_its_modes() -> None:
    service = service_of()
    fields = {"model": "default", "input": ["a"]}

    with pytest.raises(InvalidRequest, match="`model`: test/hash does not support mode 'sparse'; its modes are: dense"):
        await service.create_sparse_embedding(parse(SparseEmbeddingRequest, fields))
    with pytest.raises(
        InvalidRequest, match="`model`: test/hash does not support mode 'colbert'; its modes are: dense"
    ):
        await service.create_colbert_embedding(parse(ColbertEmbeddingRequest, fields))


async def test_a_metric_is_rejected_outside_dense_mode(service: EmbeddingService) -> None:
    request = parse(SimilarityRequest, {"model": "bge-m3", "input": ["a", "b"], "mode": "sparse", "metric": "dot"})

    with pytest.raises(InvalidRequest, match="`metric` is for mode 'dense' only"):
        await service.similarity(request)


async def test_a_checkpoint_without_the_sparse_and_colbert_layers_is_dense_only(tmp_path: Path) -> None:
    for file in (FOLDER / "model").iterdir():
        if file.suffix != ".pt":
            (tmp_path / file.name).symlink_to(file)
    service = build_service(Settings(models=(f"bge-m3={tmp_path}",)))

    assert (await service.describe("bge-m3"))["modes"] == ["dense"]

"""Token vectors that are looked up: those of sentence-transformers' `StaticEmbedding`, and of model2vec's layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.bulk import encode
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize

from embeddings_mcp.embedders.local.checkpoint import read_checkpoint
from embeddings_mcp.embedders.local.encoder import load_encoder
from embeddings_mcp.errors import InvalidRequest
from embeddings_mcp.models import Precision
from tests.local.checkpoints import (
    WIDTH,
    WORDS,
    Modules,
    assert_as_sentence_transformers_reads_it,
    assert_same,
    edit,
    ours,
    save_static,
    theirs,
)


@pytest.mark.parametrize(
    "stages", [list, lambda: [Normalize()], lambda: [Dense(WIDTH, 8)]], ids=["alone", "normalized", "dense"]
)
def test_token_vectors_may_be_looked_up_without_any_transformer(tmp_path: Path, stages: Modules) -> None:
    prompts = {"query": "the question: ", "document": "the text: "}
    model = save_static(tmp_path, *stages(), prompts=prompts)
    texts = [*WORDS, "water " * 3000]

    assert_same(ours(tmp_path, texts), theirs(model, texts))
    assert_same(ours(tmp_path, texts, "query"), np.asarray(model.encode_query(texts)))


def test_token_vectors_that_are_looked_up_have_the_limit_of_their_tokenizer(tmp_path: Path) -> None:
    save_static(tmp_path)
    cut = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    edit(tmp_path / "tokenizer.json", truncation=cut)

    assert read_checkpoint(tmp_path).max_tokens == 9
    assert_as_sentence_transformers_reads_it(tmp_path, [*WORDS, "the water is very cold in the river " * 3])


def test_a_text_without_any_token_is_refused_where_token_vectors_are_looked_up(tmp_path: Path) -> None:
    save_static(tmp_path)

    with pytest.raises(InvalidRequest, match="`text 1` holds nothing that the model's tokenizer keeps"):
        ours(tmp_path, ["Water.", ""])


def shared(vectors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"embeddings": vectors[:50], "mapping": torch.arange(len(vectors)) % 50}


def weighted(vectors: torch.Tensor) -> dict[str, torch.Tensor]:
    return shared(vectors) | {"weights": torch.rand(len(vectors), dtype=torch.float64)}


def in_half(vectors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"embedding.weight": vectors.half()}


def plain(vectors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"embeddings": vectors}


@pytest.mark.parametrize("rewrite", [plain, shared, weighted, in_half], ids=lambda way: way.__name__)
def test_token_vectors_may_be_laid_out_as_model2vec_does_or_in_half_precision(
    tmp_path: Path, rewrite: Callable[[torch.Tensor], dict[str, torch.Tensor]]
) -> None:
    save_static(tmp_path, Normalize())
    weights = tmp_path / "model.safetensors"
    save_file(rewrite(load_file(weights)["embedding.weight"]), weights)

    model = SentenceTransformer(str(tmp_path), device="cpu").float()
    assert_same(ours(tmp_path, WORDS), theirs(model, WORDS))


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int8"])
def test_token_vectors_are_looked_up_in_float32_whatever_the_precision(
    tmp_path: Path, precision: Precision, caplog: pytest.LogCaptureFixture
) -> None:
    save_static(tmp_path)
    exact = ours(tmp_path, WORDS)
    found = encode(load_encoder("test/static", tmp_path, precision=precision), WORDS).vectors
    assert np.array_equal(found, exact)
    assert not caplog.records

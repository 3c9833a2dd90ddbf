"""Static embeddings: sentence-transformers' `StaticEmbedding`, and model2vec's layout."""

from __future__ import annotations

import json
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
def test_static_embeddings_give_the_vectors_of_sentence_transformers(tmp_path: Path, stages: Modules) -> None:
    prompts = {"query": "the question: ", "document": "the text: "}
    model = save_static(tmp_path, *stages(), prompts=prompts)
    texts = [*WORDS, "water " * 3000]

    assert_same(ours(tmp_path, texts), theirs(model, texts))
    assert_same(ours(tmp_path, texts, "query"), np.asarray(model.encode_query(texts)))


def test_static_embeddings_have_the_limit_of_their_tokenizer(tmp_path: Path) -> None:
    save_static(tmp_path)
    truncation = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    edit(tmp_path / "tokenizer.json", truncation=truncation)

    assert read_checkpoint(tmp_path).max_tokens == 9
    assert_as_sentence_transformers_reads_it(tmp_path, [*WORDS, "the water is very cold in the river " * 3])


def test_static_embeddings_are_looked_up_by_tokenizer_json_alone(tmp_path: Path) -> None:
    save_static(tmp_path)
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "additional_special_tokens": ["Water"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")

    assert_as_sentence_transformers_reads_it(tmp_path, WORDS)


def test_a_text_without_any_token_is_refused_by_static_embeddings(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("rewrite", [plain, shared, weighted, in_half], ids=lambda rewrite: rewrite.__name__)
def test_static_embeddings_may_have_the_layout_of_model2vec_or_half_precision(
    tmp_path: Path, rewrite: Callable[[torch.Tensor], dict[str, torch.Tensor]]
) -> None:
    save_static(tmp_path, Normalize())
    weights = tmp_path / "model.safetensors"
    save_file(rewrite(load_file(weights)["embedding.weight"]), weights)

    model = SentenceTransformer(str(tmp_path), device="cpu").float()
    assert_same(ours(tmp_path, WORDS), theirs(model, WORDS))


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int8"])
def test_static_embeddings_are_float32_whatever_the_precision(
    tmp_path: Path, precision: Precision, caplog: pytest.LogCaptureFixture
) -> None:
    save_static(tmp_path)
    expected = ours(tmp_path, WORDS)
    vectors = encode(load_encoder("test/static", tmp_path, precision=precision), WORDS).vectors
    assert np.array_equal(vectors, expected)
    assert not caplog.records

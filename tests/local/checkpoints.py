"""Tiny checkpoints saved by sentence-transformers itself, ways to edit them, and its vectors to compare with ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.bulk import encode
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding, Transformer
from tokenizers import Tokenizer
from transformers import AutoConfig

from embeddings_mcp.embedders.local.encoder import load_encoder
from embeddings_mcp.models import InputType
from embeddings_mcp.vectors import FloatMatrix
from tests.local.golden import FamilyName, family

WIDTH = 32
"""Hidden size of the golden models that they are built from."""

SMALL = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": WIDTH}
"""Config fields that make a BERT-like model tiny."""

TEXTS = [
    "Water.",
    "",
    "Der Kaffee ist kalt geworden.",
    "猫 and 🙂",
    "The committee reviewed the annual budget in detail.",
]
WORDS = [text for text in TEXTS if text]

Modules = Callable[[], list[torch.nn.Module]]


def theirs(model: SentenceTransformer, texts: list[str], **kw: Any) -> FloatMatrix:
    return np.concatenate([model.encode([text], show_progress_bar=False, **kw) for text in texts])


def ours(folder: Path, texts: list[str], input_type: InputType | None = None) -> FloatMatrix:
    return encode(load_encoder("test/tiny", folder), texts, input_type=input_type, truncate="END").vectors


def assert_same(left: FloatMatrix, right: FloatMatrix) -> None:
    np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)


def save(
    folder: Path, *modules: torch.nn.Module, base: FamilyName = "e5", prompts: dict[str, str] | None = None, **kw: Any
) -> SentenceTransformer:
    """Save a golden model's transformer, followed by these modules; return the model."""
    torch.manual_seed(0)
    for module in modules:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
    transformer = Transformer(str(family(base).folder))
    model = SentenceTransformer(modules=[transformer, *modules], device="cpu", prompts=prompts, **kw)
    model.save(str(folder), create_model_card=False)
    return model


def save_plain(folder: Path, kind: str, architecture: Any, *, more_tokens: int = 0, **config: Any) -> None:
    """Save a tiny model with random weights in transformers' own layout.

    Args:
        folder: destination.
        kind: model type.
        architecture: one of transformers' ``AutoModel`` classes.
        more_tokens: number of embeddings beyond the tokenizer's vocabulary.
        config: config fields of the model.
    """
    source = family("e5").folder
    vocabulary_size = json.loads((source / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    torch.manual_seed(0)
    model = architecture.from_config(AutoConfig.for_model(kind, vocab_size=vocabulary_size + more_tokens, **config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    shutil.copy(source / "tokenizer.json", folder)
    inputs = ["input_ids", "attention_mask"]
    tokenizer_config = {"tokenizer_class": "BertTokenizer", "pad_token": "[PAD]", "model_input_names": inputs}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config), encoding="utf-8")


def save_static(folder: Path, *modules: torch.nn.Module, prompts: dict[str, str] | None = None) -> SentenceTransformer:
    """Save a static embedding model, followed by these modules; return the model."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(family("e5").folder / "tokenizer.json"))
    static = StaticEmbedding(tokenizer, torch.randn(tokenizer.get_vocab_size(), WIDTH))
    model = SentenceTransformer(modules=[static, *modules], device="cpu", prompts=prompts)
    model.save(str(folder), create_model_card=False)
    return model


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON object."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def assert_as_sentence_transformers_reads_it(folder: Path, texts: list[str] = TEXTS) -> None:
    assert_same(ours(folder, texts), theirs(SentenceTransformer(str(folder), device="cpu"), texts))

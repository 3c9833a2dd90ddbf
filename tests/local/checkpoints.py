"""Tiny checkpoints of sentence-transformers' own making, ways to change them, and its vectors beside ours."""

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
"""Length of the token vectors of the families that they are built from."""

SMALL = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": WIDTH}
"""As much of a config as makes a model of BERT's family tiny."""

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
    """Save a golden model's transformer with these modules behind it; gives the model itself."""
    torch.manual_seed(0)
    for module in modules:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
    transformer = Transformer(str(family(base).folder))
    model = SentenceTransformer(modules=[transformer, *modules], device="cpu", prompts=prompts, **kw)
    model.save(str(folder), create_model_card=False)
    return model


def save_plain(folder: Path, kind: str, architecture: Any, *, more_tokens: int = 0, **config: Any) -> None:
    """Save a tiny model of an architecture of transformers, with random weights, as transformers itself saves it.

    Args:
        folder: where.
        kind: its model type.
        architecture: one of transformers' ``AutoModel`` classes.
        more_tokens: that it has vectors for, beyond those of its tokenizer.
        config: of the model.
    """
    source = family("e5").folder
    vocabulary = json.loads((source / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    torch.manual_seed(0)
    model = architecture.from_config(AutoConfig.for_model(kind, vocab_size=vocabulary + more_tokens, **config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    shutil.copy(source / "tokenizer.json", folder)
    inputs = ["input_ids", "attention_mask"]
    said = {"tokenizer_class": "BertTokenizer", "pad_token": "[PAD]", "model_input_names": inputs}
    (folder / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")


def save_static(folder: Path, *modules: torch.nn.Module, prompts: dict[str, str] | None = None) -> SentenceTransformer:
    """Save token vectors that are looked up, with these modules behind them; gives the model itself."""
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

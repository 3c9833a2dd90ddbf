"""Checkpoints with real shapes and random weights, for models whose weights are not available: the speed is the same.

Each is a folder in the sentence-transformers layout, so that peers load the same files. Its tokenizer maps each word of
`workloads` to one token, and adds one special token before and one after a text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel

from benchmarks.workloads import WORDS

_SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")

_SPREAD = 0.02
"""Standard deviation of the weights, as in their usual initialization."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A transformer without its weights.

    Attributes:
        name: in tables.
        config: of transformers.
        max_tokens: longest text.
    """

    name: str
    config: Mapping[str, Any]
    max_tokens: int = 512

    def flops(self, tokens: int) -> int:
        """Additions and multiplications for a text of so many tokens, without what padding would add."""
        width, inner = self.config["hidden_size"], self.config["intermediate_size"]
        heads = self.config["num_attention_heads"]
        shared = width * self.config.get("num_key_value_heads", heads) // heads
        causal = self.config["model_type"] == "llama"
        # Llama's gate is a third product of the larger kind; under its mask a token sees half of the others.
        products = 2 * width * width + 2 * width * shared + (3 if causal else 2) * width * inner
        seen = tokens // 2 if causal else tokens
        return int(self.config["num_hidden_layers"] * tokens * (2 * products + 4 * seen * width))


def bert(name: str, *, width: int, layers: int, heads: int, vocabulary_size: int = 30522) -> Shape:
    """A BERT with the usual proportions."""
    config = {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary_size,
        "max_position_embeddings": 512,
    }
    return Shape(name, config)


def llama(
    name: str, *, width: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary_size: int = 128256
) -> Shape:
    """A Llama with its causal mask, since sentence-transformers supports no other without code from the hub."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaModel"],
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary_size,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }
    return Shape(name, config)


MINILM = Shape(
    "MiniLM",
    {
        "model_type": "bert",
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
    },
)
BERT_SMALL = bert("BERT of 6 layers (all-MiniLM-L6-v2)", width=384, layers=6, heads=12)
BERT_LARGE = bert("BERT-large (E5-large, nv-embedqa-e5-v5)", width=1024, layers=24, heads=16)
LLAMA_1B = llama("Llama 1B (llama-nemotron-embed-1b)", width=2048, inner=8192, layers=16, heads=32, key_heads=8)

TINY_BERT = bert("tiny BERT", width=64, layers=2, heads=4, vocabulary_size=1000)
TINY_LLAMA = llama("tiny Llama", width=64, inner=128, layers=2, heads=4, key_heads=2, vocabulary_size=1000)


def write(shape: Shape, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint of this shape, with the same weights every time."""
    folder.mkdir(parents=True)
    config = AutoConfig.for_model(**shape.config)
    with torch.device("meta"):
        model = AutoModel.from_config(config)  # type: ignore[no-untyped-call]  # transformers lacks the annotation
    generator = torch.Generator().manual_seed(0)

    def weights(name: str, like: torch.Tensor) -> torch.Tensor:
        if "norm" in name.lower() and name.endswith("weight"):
            return torch.ones(like.shape, dtype=dtype)
        return (torch.randn(like.shape, generator=generator) * _SPREAD).to(dtype)

    tensors = {name: weights(name, like) for name, like in model.state_dict().items() if not name.startswith("pooler.")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    files: dict[str, object] = {
        "config.json": {**config.to_dict(), "dtype": str(dtype).removeprefix("torch."), "pad_token_id": 0},
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ],
        "sentence_bert_config.json": {"max_seq_length": shape.max_tokens},
        "1_Pooling/config.json": {
            "word_embedding_dimension": shape.config["hidden_size"],
            "pooling_mode_mean_tokens": True,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "model_max_length": shape.max_tokens,
        },
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    _tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def _tokenizer() -> Tokenizer:
    vocabulary_size = {word: number for number, word in enumerate((*_SPECIAL, *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary_size, unk_token="<unk>"))  # noqa: S106 - a token of text
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", vocabulary_size["<s>"]), ("</s>", vocabulary_size["</s>"])]
    )
    return tokenizer

"""Tiny checkpoints of sentence-transformers' own making, and ways to change them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer

from tests.local.golden import FamilyName, family

WIDTH = 32
"""Length of the token vectors of the families that they are built from."""


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


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON object."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})

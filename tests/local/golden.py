"""The reference vectors in tests/golden, and the encoders that must reproduce them."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from embeddings_mcp.embedders.local.encoder import Encoder, load_encoder
from embeddings_mcp.embedders.local.locate import locate
from embeddings_mcp.models import DEFAULT_MODEL, InputType, Truncate, find_card
from embeddings_mcp.vectors import FloatMatrix

GOLDEN = Path(__file__).parents[1] / "golden"

FamilyName = Literal["minilm", "bge-m3", "e5", "llama-nemotron-embed", "nemotron-3-embed", "nv-embed-v1", "nv-embed-v2"]

MODELS: dict[FamilyName, str] = {
    "minilm": DEFAULT_MODEL,
    "bge-m3": "baai/bge-m3",
    "e5": "nvidia/nv-embedqa-e5-v5",
    "llama-nemotron-embed": "nvidia/llama-nemotron-embed-1b-v2",
    "nemotron-3-embed": "nvidia/nemotron-3-embed-1b",
    "nv-embed-v1": "nvidia/nv-embed-v1",
    "nv-embed-v2": "nvidia/nv-embed-v2",
}
"""The model in each folder of tests/golden: the original, or a tiny imitation with random weights."""


@dataclass(frozen=True, slots=True)
class Case:
    """A text, and the reference output for it when embedded alone."""

    name: str
    text: str
    input_type: InputType | None
    dimensions: int | None
    truncate: Truncate
    max_length: int
    ids: list[int]
    untruncated_tokens: int
    pool_from: int
    vector: FloatMatrix


@dataclass(frozen=True, slots=True)
class Family:
    """One folder of tests/golden."""

    name: FamilyName
    max_tokens: int
    matryoshka: tuple[int, ...]
    tolerance: float
    cases: tuple[Case, ...]
    batches: tuple[tuple[Case, ...], ...]

    @property
    def model(self) -> str:
        """Name of the model that it holds or imitates."""
        return MODELS[self.name]

    @property
    def folder(self) -> Path:
        """Folder of the checkpoint."""
        return locate(DEFAULT_MODEL, None) if self.name == "minilm" else GOLDEN / self.name / "model"


@functools.cache
def family(name: FamilyName) -> Family:
    """Read the folder of this name."""
    expected = json.loads((GOLDEN / name / "expected.json").read_text(encoding="utf-8"))
    cases = tuple(_case(case) for case in expected["cases"])
    return Family(
        name=name,
        max_tokens=expected["max_tokens"],
        matryoshka=tuple(expected["matryoshka_dims"] or ()),
        tolerance=expected["tolerance_abs"],
        cases=cases,
        batches=tuple(tuple(cases[index] for index in batch) for batch in expected["batches"]),
    )


def _case(fields: dict[str, Any]) -> Case:
    return Case(
        name=fields["name"],
        text=fields["input"],
        input_type=fields["input_type"],
        dimensions=fields["dimensions"],
        truncate=cast("Truncate", fields["truncate"]),
        max_length=fields["max_length"],
        ids=fields["input_ids"],
        untruncated_tokens=fields["untruncated_tokens"],
        pool_from=fields.get("pool_from", 0),
        vector=np.array(fields["embedding"], dtype=np.float32),
    )


@functools.cache
def encoder(name: FamilyName, max_tokens: int | None = None) -> Encoder:
    """Load the family's checkpoint in float32 on any device; `max_tokens` defaults to the reference's limit."""
    golden = family(name)
    return load_encoder(
        golden.model,
        golden.folder,
        builtin_card=find_card(golden.model),
        precision="float32",
        max_tokens=max_tokens or golden.max_tokens,
    )

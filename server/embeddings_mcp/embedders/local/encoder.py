"""The encoder: a loaded checkpoint, from texts to vectors. Synchronous: it computes on the thread that calls it.

texts -> Tokenizer -> rows of token ids -> Backbone -> token vectors -> pool -> stages -> vectors
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file

from embeddings_mcp.embedders.base import Embeddings
from embeddings_mcp.embedders.local.backbone import Backbone, load_backbone
from embeddings_mcp.embedders.local.checkpoint import Checkpoint, Dense, LayerNorm, Stage, read_checkpoint
from embeddings_mcp.embedders.local.pooling import pool
from embeddings_mcp.embedders.local.tokenizer import Tokenizer
from embeddings_mcp.errors import CheckpointInvalid, InvalidRequest
from embeddings_mcp.models import InputType, ModelCard, Truncate
from embeddings_mcp.vectors import FloatMatrix

Precision = Literal["auto", "float32", "bfloat16", "float16"]

_TOKENS_PER_BATCH = {"cpu": 2048, "mps": 8192, "cuda": 32768}
"""Tokens that go through the model at once: enough to fill the device, few enough to stay in its caches or memory."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokenized texts.

    Attributes:
        rows: token ids of each text.
        skip: how many tokens at each start belong to a prompt that is not pooled.
    """

    rows: list[list[int]]
    skip: int

    @property
    def count(self) -> int:
        """Tokens of all the texts."""
        return sum(map(len, self.rows))


class Encoder:
    """A loaded model.

    Attributes:
        card: what it takes and gives.
        dimensions: length of its vectors.
    """

    def __init__(
        self,
        card: ModelCard,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        backbone: Backbone,
        stages: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    ) -> None:
        self.card = card
        self.dimensions = checkpoint.dimensions
        self._checkpoint = checkpoint
        self._tokenizer = tokenizer
        self._backbone = backbone
        self._stages = stages

    def encode(
        self, texts: Sequence[str], *, input_type: InputType | None = None, truncate: Truncate = "NONE"
    ) -> Embeddings:
        """Embed texts from the first to the last step.

        Raises:
            InputTooLong: a text is too long and `truncate` is NONE.
        """
        tokens = self.tokenize(texts, input_type=input_type, truncate=truncate)
        vectors = np.empty((len(texts), self.dimensions), dtype=np.float32)
        for batch in self.batches(tokens):
            vectors[batch] = self.forward(tokens, batch)
        return Embeddings(vectors, prompt_tokens=tokens.count)

    def tokenize(self, texts: Sequence[str], *, input_type: InputType | None, truncate: Truncate) -> Tokens:
        """The first step: token ids, with the prompt of this input type.

        Raises:
            InputTooLong: a text is too long and `truncate` is NONE.
            InvalidRequest: nothing of a text is left to pool.
        """
        prompt = self.card.prompt(input_type)
        rows = self._tokenizer.encode(texts, prompt=prompt, truncate=truncate)
        skip = 0 if self._checkpoint.pool_prompt else self._tokenizer.prompt_length(prompt)
        for index, row in enumerate(rows):
            if len(row) <= skip:
                raise InvalidRequest(f"text {index} has no tokens of its own behind the prompt of {skip} tokens")
        return Tokens(rows, skip)

    def batches(self, tokens: Tokens) -> list[list[int]]:
        """Which texts go through the model together: neighbours in length, within the device's token budget.

        Longest first, so that what does not fit into memory shows at once.
        """
        budget = _TOKENS_PER_BATCH.get(self._backbone.device.type, 2048)
        order = sorted(range(len(tokens.rows)), key=lambda index: len(tokens.rows[index]), reverse=True)
        batches: list[list[int]] = []
        spent = budget
        for index in order:
            # Padded, every text of a batch costs as much as its longest, which is its first.
            longest = len(tokens.rows[index if self._backbone.packed or not batches else batches[-1][0]])
            if spent + longest > budget:
                batches.append([])
                longest, spent = len(tokens.rows[index]), 0
            batches[-1].append(index)
            spent += longest
        return batches

    @torch.inference_mode()
    def forward(self, tokens: Tokens, batch: Sequence[int]) -> FloatMatrix:
        """The vectors, float32 ``[len(batch), d]``, of the texts at these positions."""
        hidden, packing = self._backbone.hidden_states([tokens.rows[index] for index in batch])
        vectors = pool(hidden, packing, self._checkpoint.pooling, skip=tokens.skip)
        for stage in self._stages:
            vectors = stage(vectors)
        result: FloatMatrix = vectors.cpu().numpy()
        return result


def load_encoder(
    name: str,
    folder: Path,
    *,
    device: str = "auto",
    precision: Precision = "auto",
    max_tokens: int | None = None,
) -> Encoder:
    """Load a checkpoint.

    Args:
        name: the model's name, which may bring a card of the table with it.
        folder: the checkpoint.
        device: ``auto`` (cuda, then mps, then cpu), or a torch device such as ``cuda:1``.
        precision: number format of the weights; ``auto`` is bfloat16 on cuda and float32 elsewhere.
        max_tokens: a lower limit than the checkpoint's own.

    Raises:
        CheckpointInvalid: something in the folder is missing, damaged or not supported.
    """
    checkpoint = read_checkpoint(folder)
    limit = min(checkpoint.max_tokens, max_tokens or checkpoint.max_tokens)
    where = _device(device)
    dtype = getattr(torch, ("bfloat16" if where.type == "cuda" else "float32") if precision == "auto" else precision)
    tokenizer = Tokenizer.from_folder(checkpoint.backbone, max_tokens=limit, lowercase=checkpoint.lowercase)
    return Encoder(
        checkpoint.card(name),
        checkpoint,
        tokenizer,
        load_backbone(checkpoint, where, dtype),
        [_load_stage(stage, where) for stage in checkpoint.stages],
    )


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _load_stage(stage: Stage, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a stage does, in float32 whatever the transformer's precision is."""
    match stage:
        case Dense():
            linear = torch.nn.Linear(stage.in_features, stage.out_features, bias=stage.bias)
            _load_weights(linear, stage.folder, prefix="linear.")
            return torch.nn.Sequential(linear, getattr(torch.nn, stage.activation)()).eval().to(device)
        case LayerNorm():
            norm = torch.nn.LayerNorm(stage.dimensions)
            _load_weights(norm, stage.folder, prefix="norm.")
            return norm.eval().to(device)
        case _:
            return lambda vectors: torch.nn.functional.normalize(vectors, dim=1)


def _load_weights(module: torch.nn.Module, folder: Path, *, prefix: str) -> None:
    path = folder / "model.safetensors"
    try:
        if path.is_file():
            tensors = load_file(path)
        else:
            path = folder / "pytorch_model.bin"
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict({name.removeprefix(prefix): tensor.float() for name, tensor in tensors.items()})
    except Exception as error:  # a damaged file fails in many ways
        raise CheckpointInvalid(f"{path}: the weights cannot be read: {error}") from error

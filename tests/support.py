"""Pieces that several tests share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import anyio
import numpy as np

from embeddings_mcp.embedders.base import Embeddings, OnProgress
from embeddings_mcp.models import InputType, ModelCard, Truncate


@dataclass
class HashEmbedder:
    """An embedder without a model: every (text, prompt) has one unit vector of its own, drawn from its hash.

    For tests of what lies above the embedder. `gate`, when set, holds every call until the event is set.
    """

    card: ModelCard = field(default_factory=lambda: ModelCard(id="test/hash", dimensions=8, max_tokens=64))
    origin: str = "local"
    gate: anyio.Event | None = None
    cancelled: bool = False
    closed: bool = False
    batches: list[list[str]] = field(default_factory=list)

    async def embed(
        self,
        texts: Sequence[str],
        *,
        input_type: InputType | None,
        truncate: Truncate,
        on_progress: OnProgress | None = None,
    ) -> Embeddings:
        self.batches.append(list(texts))
        if self.gate is not None:
            try:
                await self.gate.wait()
            except BaseException:
                self.cancelled = True
                raise
        vectors = [self.vector(text, input_type) for text in texts]
        for done in range(1, len(texts) + 1):
            if on_progress is not None:
                await on_progress(done)
        return Embeddings(np.stack(vectors), sum(len(text.split()) + 2 for text in texts))

    def vector(self, text: str, input_type: InputType | None = None) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """The vector that this text has."""
        seed = int.from_bytes(hashlib.sha256((self.card.prompt(input_type) + text).encode()).digest()[:8], "little")
        vector = np.random.default_rng(seed).standard_normal(self.card.dimensions or 8).astype(np.float32)
        return vector / np.float32(np.linalg.norm(vector))

    async def check(self) -> None:
        """Always ready."""

    async def aclose(self) -> None:
        self.closed = True

"""A model that computes in this process."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from embeddings_mcp.embedders.local.inputs import Row
from embeddings_mcp.embedders.local.memory import Returning, halving
from embeddings_mcp.embedders.local.replicas import AnyEncoder
from embeddings_mcp.vectors import FloatMatrix, SparseVector


class InThisProcess:
    """A model that computes in this process, by halves of a batch where memory is too little for all of it.

    Args:
        encoder: the model.

    Attributes:
        alive: True: it lives as long as the process.
    """

    alive = True

    def __init__(self, encoder: AnyEncoder) -> None:
        self.card = encoder.card
        self.dimensions = encoder.dimensions
        self.packed = encoder.packed
        self.tokens_per_batch = encoder.tokens_per_batch
        self.least_tokens_per_batch = encoder.least_tokens_per_batch
        self.vocabulary = encoder.vocabulary
        self.workers = encoder.workers
        self.compute_on = encoder.compute_on
        self.tokenize = encoder.tokenize
        self._encoder = encoder
        self._give_back = Returning() if encoder.device.type == "cpu" else None

    def forward(self, rows: Sequence[Row], skip: int) -> FloatMatrix:
        """See `LoadedModel.forward`."""
        parts = halving(lambda some: self._encoder.forward(some, skip), rows)
        self._computed(rows)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def forward_all(self, rows: Sequence[Row], skip: int) -> tuple[FloatMatrix, list[SparseVector], list[FloatMatrix]]:
        """See `LoadedModel.forward_all`."""
        dense, sparse, colbert = zip(*halving(lambda some: self._encoder.forward_all(some, skip), rows), strict=True)
        self._computed(rows)
        return np.concatenate(dense), [*itertools.chain(*sparse)], [*itertools.chain(*colbert)]

    def close(self) -> None:
        """See `LoadedModel.close`: nothing is to be done here."""

    def _computed(self, rows: Sequence[Row]) -> None:
        if self._give_back is not None:
            self._give_back(sum(map(len, rows)))

"""A model that computes in this process, on one device or on several."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from embeddings_mcp.embedders.local.encoder import Encoder
from embeddings_mcp.embedders.local.inputs import Row
from embeddings_mcp.embedders.local.memory import Returning, halving
from embeddings_mcp.vectors import FloatMatrix, SparseVector


class InThisProcess:
    """A model that computes in this process, by halves of a batch where memory is too little for all of it.

    Where it is on several devices, each has all of its weights, and every thread that computes has one of them for
    itself.

    Args:
        encoders: the model on each device; at least one, which differ in their device only.

    Attributes:
        alive: True: it lives as long as the process.
        facts: what is known of all of them; tokens of a batch are the least of theirs.
    """

    alive = True

    def __init__(self, encoders: Sequence[Encoder]) -> None:
        first = encoders[0]
        self.facts = replace(
            first.facts,
            tokens_per_batch=min(encoder.facts.tokens_per_batch for encoder in encoders),
            least_tokens_per_batch=min(encoder.facts.least_tokens_per_batch for encoder in encoders),
        )
        self.tokenize = first.tokenize
        self._encoders = encoders
        self._turns = itertools.cycle(encoders)
        self._of_thread = threading.local()
        self._give_back = Returning() if first.device.type == "cpu" else None

    def workers(self, cores: int) -> int:
        """As many as all the devices want together; see `Encoder.workers`."""
        share = max(1, cores // len(self._encoders))
        return sum(encoder.workers(share) for encoder in self._encoders)

    def compute_on(self, cores: int) -> None:
        """See `LoadedModel.compute_on`; and let the calling thread compute on the next device in turn."""
        self._of_thread.encoder = encoder = next(self._turns)
        encoder.compute_on(cores)

    def forward(self, rows: Sequence[Row], skip: int) -> FloatMatrix:
        """See `LoadedModel.forward`."""
        encoder = self._mine
        parts = halving(lambda some: encoder.forward(some, skip), rows)
        self._computed(rows)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def forward_all(self, rows: Sequence[Row], skip: int) -> tuple[FloatMatrix, list[SparseVector], list[FloatMatrix]]:
        """See `LoadedModel.forward_all`."""
        encoder = self._mine
        dense, sparse, colbert = zip(*halving(lambda some: encoder.forward_all(some, skip), rows), strict=True)
        self._computed(rows)
        return np.concatenate(dense), [*itertools.chain(*sparse)], [*itertools.chain(*colbert)]

    def close(self) -> None:
        """See `LoadedModel.close`: nothing is to be done here."""

    @property
    def _mine(self) -> Encoder:
        """That of the calling thread."""
        encoder: Encoder = self._of_thread.encoder
        return encoder

    def _computed(self, rows: Sequence[Row]) -> None:
        if self._give_back is not None:
            self._give_back(sum(map(len, rows)))

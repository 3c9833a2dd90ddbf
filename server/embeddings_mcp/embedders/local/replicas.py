"""One model on several devices, each with all of its weights: batches are shared out among them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence

from embeddings_mcp.embedders.local.encoder import Encoder
from embeddings_mcp.embedders.local.inputs import Row, Tokens
from embeddings_mcp.models import InputType, Truncate
from embeddings_mcp.vectors import FloatMatrix, SparseVector


class Replicas:
    """Several encoders of one checkpoint, in their use like one; every thread that computes has one of them for itself.

    Args:
        encoders: at least one, which differ in their device only.

    Attributes:
        card: see `Encoder`.
        device: the first's; see `Encoder`.
        dimensions: see `Encoder`.
        packed: see `Encoder`.
        vocabulary: see `Encoder`.
        tokens_per_batch: see `Encoder`; the least of theirs.
        least_tokens_per_batch: see `Encoder`; likewise.
    """

    def __init__(self, encoders: Sequence[Encoder]) -> None:
        first = encoders[0]
        self.card = first.card
        self.device = first.device
        self.dimensions = first.dimensions
        self.packed = first.packed
        self.vocabulary = first.vocabulary
        self.tokens_per_batch = min(encoder.tokens_per_batch for encoder in encoders)
        self.least_tokens_per_batch = min(encoder.least_tokens_per_batch for encoder in encoders)
        self._encoders = encoders
        self._turns = itertools.cycle(encoders)
        self._of_thread = threading.local()

    def tokenize(self, texts: Sequence[str], *, input_type: InputType | None, truncate: Truncate) -> Iterator[Tokens]:
        """See `Encoder.tokenize`."""
        return self._encoders[0].tokenize(texts, input_type=input_type, truncate=truncate)

    def workers(self, cores: int) -> int:
        """As many as all the devices want together; see `Encoder.workers`."""
        share = max(1, cores // len(self._encoders))
        return sum(encoder.workers(share) for encoder in self._encoders)

    def compute_on(self, cores: int) -> None:
        """Let the calling thread compute on the next device in turn; see `Encoder.compute_on`."""
        self._of_thread.encoder = encoder = next(self._turns)
        encoder.compute_on(cores)

    def forward(self, rows: Sequence[Row], skip: int) -> FloatMatrix:
        """See `Encoder.forward`."""
        return self._mine.forward(rows, skip)

    def forward_all(self, rows: Sequence[Row], skip: int) -> tuple[FloatMatrix, list[SparseVector], list[FloatMatrix]]:
        """See `Encoder.forward_all`."""
        return self._mine.forward_all(rows, skip)

    @property
    def _mine(self) -> Encoder:
        encoder: Encoder = self._of_thread.encoder
        return encoder


AnyEncoder = Encoder | Replicas
"""A model that is loaded, on one device or on several."""

"""The interface of a loaded model, whether it computes in this process or in a subprocess. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from embeddings_mcp.models import InputType, ModelCard, Truncate
from embeddings_mcp.vectors import FloatMatrix, SparseVector

if TYPE_CHECKING:
    from embeddings_mcp.embedders.local.inputs import Row, TokenizedBatch


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Properties of a loaded model.

    Attributes:
        card: its model card.
        dimensions: length of its vectors.
        vocabulary_size: number of token ids that it has embeddings for.
        packed: whether batches are packed, so that a batch costs the sum of its tokens. If not, batches are padded, and
            every text costs as many tokens as the longest one.
        tokens_per_batch: token budget of a batch.
        min_tokens_per_batch: tokens below which a batch is not worth splitting among several workers.
    """

    card: ModelCard
    dimensions: int
    vocabulary_size: int
    packed: bool
    tokens_per_batch: int
    min_tokens_per_batch: int


class LoadedModel(Protocol):
    """A loaded model."""

    @property
    def info(self) -> ModelInfo:
        """Its properties."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it can still compute."""
        ...

    def workers(self, cores: int) -> int:
        """Return the best number of worker threads; each runs a batch at a time, on its share of the cores."""
        ...

    def set_thread_cores(self, cores: int) -> None:
        """Set how many cores the calling thread computes on. Each worker thread must call this before it computes."""
        ...

    def tokenize(
        self, texts: Sequence[str], *, input_type: InputType | None, truncate: Truncate
    ) -> Iterator[TokenizedBatch]:
        """See `InputTokenizer.tokenize`."""
        ...

    def forward(self, rows: Sequence[Row], skip: int) -> FloatMatrix:
        """Return the vectors of one batch of tokenized texts, float32 ``[n, d]``; see `TokenizedBatch`.

        Raises:
            ModelUnavailable: a single text does not fit into memory, or the model's process has ended.
        """
        ...

    def forward_all(self, rows: Sequence[Row], skip: int) -> tuple[FloatMatrix, list[SparseVector], list[FloatMatrix]]:
        """Return the vectors as `forward` does, and the lexical weights and token vectors of the same texts."""
        ...

    def close(self) -> None:
        """Release its resources."""
        ...

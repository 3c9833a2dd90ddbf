"""A loaded model as the server uses it, whether it computes in this process or in another. Without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from embeddings_mcp.models import InputType, ModelCard, Truncate
from embeddings_mcp.vectors import FloatMatrix, SparseVector

if TYPE_CHECKING:
    from embeddings_mcp.embedders.local.inputs import Row, Tokens


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a model once it is loaded.

    Attributes:
        card: what it takes and gives.
        dimensions: length of its vectors.
        vocabulary: tokens that it has vectors for.
        packed: whether a batch costs its tokens; else each of its texts costs as many as the longest.
        tokens_per_batch: tokens that go through it at once.
        least_tokens_per_batch: tokens that are not worth sharing out among several who could compute.
    """

    card: ModelCard
    dimensions: int
    vocabulary: int
    packed: bool
    tokens_per_batch: int
    least_tokens_per_batch: int


class LoadedModel(Protocol):
    """A model that is loaded."""

    @property
    def facts(self) -> Facts:
        """What is known of it."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it can still be asked."""
        ...

    def workers(self, cores: int) -> int:
        """On how many threads batches are best run, of which each computes on its share of the cores."""
        ...

    def compute_on(self, cores: int) -> None:
        """Let what the calling thread computes use so many cores; to be called on each thread before it computes."""
        ...

    def tokenize(self, texts: Sequence[str], *, input_type: InputType | None, truncate: Truncate) -> Iterator[Tokens]:
        """See `InputTokenizer.tokenize`."""
        ...

    def forward(self, rows: Sequence[Row], skip: int) -> FloatMatrix:
        """The vectors, float32 ``[n, d]``, of one batch of tokenized texts; see `Tokens`.

        Raises:
            ModelUnavailable: a text alone needs more memory than there is, or the model has ended.
        """
        ...

    def forward_all(self, rows: Sequence[Row], skip: int) -> tuple[FloatMatrix, list[SparseVector], list[FloatMatrix]]:
        """As `forward`, and the lexical weights and token vectors of the same texts."""
        ...

    def close(self) -> None:
        """Let it go."""
        ...

"""What the transformers of all families have in common once they are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from embeddings_mcp.embedders.local.packing import PackedRow, Packing


class Transformer(Protocol):
    """A loaded transformer."""

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        ...

    @property
    def packed(self) -> bool:
        """Whether texts go through it without padding."""
        ...

    @property
    def vocabulary(self) -> int:
        """Tokens that it has vectors for."""
        ...

    @property
    def first_position(self) -> int:
        """Position id of a text's first token, as `packing.lay_out` wants it."""
        ...

    def hidden_states(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, Packing]:
        """The token vectors of the texts, one text behind the other.

        Args:
            rows: token ids of each text, none of them empty; neighbours of equal length are attended to together.

        Returns:
            ``[tokens, d]``, and where each text lies in it.
        """
        ...

    def forward(self, row: PackedRow) -> torch.Tensor:
        """From a packed row to its token vectors, ``[tokens, d]``; of a transformer that is packed."""
        ...


class Wrapped:
    """What a transformer keeps of another one that it stands before; texts go packed through both."""

    packed = True

    def __init__(self, transformer: Transformer) -> None:
        self._transformer = transformer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._transformer.device

    @property
    def vocabulary(self) -> int:
        """Tokens that it has vectors for."""
        return self._transformer.vocabulary

    @property
    def first_position(self) -> int:
        """Position id of a text's first token."""
        return self._transformer.first_position

    def forward(self, row: PackedRow) -> torch.Tensor:
        """See `Transformer`; this is the other one's own."""
        return self._transformer.forward(row)

"""The interface of a loaded transformer of any family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from embeddings_mcp.embedders.local.packing import PackedRow, Packing


class Transformer(Protocol):
    """A loaded transformer."""

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        ...

    @property
    def packed(self) -> bool:
        """Whether it runs packed batches, without padding."""
        ...

    @property
    def vocabulary_size(self) -> int:
        """Vocabulary size: the number of token ids that it has embeddings for."""
        ...

    @property
    def first_position(self) -> int:
        """Position id of a text's first token; see `packing.lay_out`."""
        ...

    def hidden_states(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, Packing]:
        """Return the token vectors of a batch of texts, concatenated.

        Args:
            rows: token ids of each text, none of them empty. Attention is computed in one call for adjacent texts of
                equal length, so sorting by length makes it faster.

        Returns:
            ``[tokens, d]``, and the boundaries of the texts in it.
        """
        ...

    def forward(self, row: PackedRow) -> torch.Tensor:
        """Return the token vectors of a packed row, ``[tokens, d]``. Only if `packed` is true."""
        ...


class TransformerWrapper:
    """Base class of transformers that wrap another packed one; delegates everything but `hidden_states`."""

    packed = True

    def __init__(self, transformer: Transformer) -> None:
        self._transformer = transformer

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._transformer.device

    @property
    def vocabulary_size(self) -> int:
        """Vocabulary size."""
        return self._transformer.vocabulary_size

    @property
    def first_position(self) -> int:
        """Position id of a text's first token."""
        return self._transformer.first_position

    def forward(self, row: PackedRow) -> torch.Tensor:
        """Return the token vectors of a packed row, by the wrapped transformer."""
        return self._transformer.forward(row)

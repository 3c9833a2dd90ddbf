"""Batches of few different sizes, for CPUs where a size that is new costs more than the batch.

With AMX, oneDNN takes 5 to 25 ms to make a product of bfloat16 ready for a number of rows that it has not met, and 1 to
3 ms to compute it. Batches nearly all differ in their tokens, so that models spent half of their time on that. Here a
batch is filled up to the next of a few sizes, with texts that nobody looks at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from embeddings_mcp.embedders.local.packing import Packing, fill
from embeddings_mcp.embedders.local.transformer import Wrapped

_STEPS = ((32, 1), (128, 16), (256, 32), (512, 64), (2048, 128), (math.inf, 512))
"""Up to so many tokens, the sizes are multiples of this. There are 58 up to 2,048, and four products of BERT in each:
those in use are within what oneDNN keeps (see `linear`). Lone queries have sizes of their own, of which they share
few."""


class Bucketed(Wrapped):
    """A transformer whose batches are filled up."""

    def hidden_states(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, Packing]:
        """See `transformer.Transformer`."""
        tokens, longest = sum(map(len, rows)), max(map(len, rows))
        fillers = [[0] * length for length in fill(bucket_size(tokens) - tokens, longest)]
        hidden, packing = self._transformer.hidden_states([*rows, *fillers])
        return hidden[:tokens], packing.of_first(len(rows))


def bucket_size(tokens: int) -> int:
    """The size that a batch of so many tokens is filled up to."""
    step = next(step for most, step in _STEPS if tokens <= most)
    return -(-tokens // step) * step

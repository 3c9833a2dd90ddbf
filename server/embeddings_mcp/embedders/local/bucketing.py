"""Bucketing of batch sizes, for CPUs where a batch of a new size costs more to prepare than to compute.

With AMX, oneDNN takes 5 to 25 ms to prepare a bfloat16 matrix product for a number of rows that it has not seen before,
and 1 to 3 ms to compute it. Nearly all batches differ in their number of tokens, so models spent half of their time on
preparation. Here filler texts, whose vectors are discarded, pad a batch to the next of a few bucket sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from embeddings_mcp.embedders.local.packing import Packing, filler_lengths
from embeddings_mcp.embedders.local.transformer import TransformerWrapper

_STEPS = ((32, 1), (128, 16), (256, 32), (512, 64), (2048, 128), (math.inf, 512))
"""``(max_tokens, step)``: batches of up to `max_tokens` tokens have sizes that are multiples of `step`.

There are 58 sizes up to 2,048 tokens, with four matrix products of BERT each, so those in use fit into oneDNN's
primitive cache (see `linear`). Up to 32 tokens every size is its own bucket: single queries have few different sizes.
"""


class BucketedTransformer(TransformerWrapper):
    """A transformer whose batches are padded to bucket sizes with filler texts."""

    def hidden_states(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, Packing]:
        """See `transformer.Transformer`."""
        tokens, longest = sum(map(len, rows)), max(map(len, rows))
        fillers = [[0] * length for length in filler_lengths(bucket_size(tokens) - tokens, longest)]
        hidden, packing = self._transformer.hidden_states([*rows, *fillers])
        return hidden[:tokens], packing.first(len(rows))


def bucket_size(tokens: int) -> int:
    """Return the size that a batch of `tokens` tokens is padded to."""
    step = next(step for max_tokens, step in _STEPS if tokens <= max_tokens)
    return -(-tokens // step) * step

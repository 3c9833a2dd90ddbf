"""Pooling: from the token vectors of a packed row to one vector per text.

The modes, and their order when several are concatenated, are those of sentence-transformers (``modules/pooling.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from embeddings_mcp.embedders.local.packing import Packing
from embeddings_mcp.embedders.local.recipes import PoolingMode


def pool(hidden: torch.Tensor, packing: Packing, modes: Sequence[PoolingMode], skip: int = 0) -> torch.Tensor:
    """Pool the token vectors of each text into one vector.

    Args:
        hidden: ``[tokens, d]``, the packed row's token vectors.
        packing: the boundaries of the texts.
        modes: pooling modes; the results of several modes are concatenated.
        skip: number of tokens to ignore at the start of each text (a prompt that is excluded from pooling). The caller
            must ensure that every text is longer.

    Returns:
        float32 ``[n, d * len(modes)]``.
    """
    hidden = hidden.float()
    lengths = packing.cumulative.diff().long()
    if skip:
        hidden, lengths = _without_first(hidden, packing, skip), lengths - skip
    pooled = [_MODES[mode](hidden, lengths, skip) for mode in modes]
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)


def _without_first(hidden: torch.Tensor, packing: Packing, skip: int) -> torch.Tensor:
    """Return the row without the first `skip` tokens of each text."""
    kept = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    kept[(packing.cumulative[:-1, None] + torch.arange(skip, device=hidden.device)).flatten().long()] = False
    return hidden[kept]


def _sum(hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    if hidden.is_cuda:
        # Deterministic, unlike index_add_, which on CUDA adds in the order in which threads arrive.
        return torch.segment_reduce(hidden, "sum", lengths=lengths, axis=0, unsafe=True)
    sums = hidden.new_zeros(len(lengths), hidden.shape[1])
    return sums.index_add_(0, torch.arange(len(lengths)).repeat_interleave(lengths), hidden)


def _cls(hidden: torch.Tensor, lengths: torch.Tensor, _skipped: int) -> torch.Tensor:
    return hidden[lengths.cumsum(0) - lengths]


def _last(hidden: torch.Tensor, lengths: torch.Tensor, _skipped: int) -> torch.Tensor:
    return hidden[lengths.cumsum(0) - 1]


def _max(hidden: torch.Tensor, lengths: torch.Tensor, _skipped: int) -> torch.Tensor:
    return torch.segment_reduce(hidden, "max", lengths=lengths, axis=0, unsafe=True)


def _mean(hidden: torch.Tensor, lengths: torch.Tensor, _skipped: int) -> torch.Tensor:
    return _sum(hidden, lengths) / lengths[:, None]


def _mean_sqrt_len(hidden: torch.Tensor, lengths: torch.Tensor, _skipped: int) -> torch.Tensor:
    return _sum(hidden, lengths) / lengths[:, None].sqrt()


def _weighted_mean(hidden: torch.Tensor, lengths: torch.Tensor, skipped: int) -> torch.Tensor:
    """Weight each token by its position in the text, counted from 1, skipped tokens included."""
    starts = lengths.cumsum(0) - lengths
    positions = torch.arange(len(hidden), device=hidden.device) - starts.repeat_interleave(lengths) + 1 + skipped
    weights = positions.to(hidden.dtype)[:, None]
    return _sum(hidden * weights, lengths) / _sum(weights, lengths)


_MODES: dict[PoolingMode, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "cls": _cls,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}

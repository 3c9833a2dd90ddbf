"""Attention over a packed row: many texts in one row of tokens, no padding, each text blind to the others.

transformers lets a model look its attention function up by name. `packed_attention` is registered there, so every
family that uses that interface runs unpadded, as its own unmodified class. How a model masks (causal or not, a sliding
window) reaches the function by the keywords that transformers' flash-attention integration reads, where a window of
``w`` means ``w - 1`` tokens to either side.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from embeddings_mcp.embedders.local.placement import numbers_on

NAME = "embeddings_mcp_packed"
"""The name under which transformers finds the function."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Where each text lies in a packed row.

    Attributes:
        lengths: tokens of each text, in the row's order.
        runs: ``(first token, texts, tokens of each)`` of every run of neighbours of equal length.
        cumulative: int32 ``[n + 1]`` on the model's device, first token of each text and, last, the row's length.
    """

    lengths: tuple[int, ...]
    runs: tuple[tuple[int, int, int], ...]
    cumulative: torch.Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packing:
        """The packing of texts of these lengths, one behind the other."""
        runs, start = [], 0
        for length, same in itertools.groupby(lengths):
            count = len(list(same))
            runs.append((start, count, length))
            start += count * length
        ends = [0, *itertools.accumulate(lengths)]
        return cls(tuple(lengths), tuple(runs), numbers_on(device, ends).int())


class PackingUnsupported(Exception):
    """The model asks its attention for something that the packed function cannot do."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,  # noqa: ARG001 - always 0 when a model is not being trained
    **unsupported: Any,  # noqa: ANN401 - whatever a family passes on
) -> tuple[torch.Tensor, None]:
    """Attend within each text of a packed row.

    Args:
        module: the attention layer; says whether it is causal where the call does not.
        query: ``[1, heads, tokens, d]``.
        key: ``[1, key heads, tokens, d]``; fewer heads than `query` are shared by groups of query heads.
        value: as `key`.
        attention_mask: None, since transformers makes no mask for an attention function without a mask function.
        packing: where each text lies, handed through the model as a keyword.
        scaling: factor on the scores; 1/sqrt(d) when None.
        is_causal: whether a token sees only itself and what lies before it.
        sliding_window: how far a token sees, itself counted; None for the whole text.
        dropout: ignored.
        unsupported: what else the model passes; anything that would change the scores is refused.

    Returns:
        ``[1, tokens, heads, d]``, and None for the weights.

    Raises:
        PackingUnsupported: the keyword did not come through, or the model needs more than this function does.
    """
    if packing is None or attention_mask is not None:
        raise PackingUnsupported("the model does not pass the packing on to its attention")
    for name in ("softcap", "s_aux", "position_bias"):
        if unsupported.get(name) is not None:
            raise PackingUnsupported(f"the model's attention uses {name}")
    attended = attend(
        # Each [tokens, heads, d], which is how the projections wrote them.
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        packing,
        scaling=scaling,
        causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        reach=None if sliding_window is None else sliding_window - 1,
    )
    return attended.unsqueeze(0), None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    *,
    scaling: float | None = None,
    causal: bool = False,
    reach: int | None = None,
) -> torch.Tensor:
    """Attend within each text of a packed row.

    Args:
        query: ``[tokens, heads, d]``.
        key: ``[tokens, key heads, d]``.
        value: as `key`.
        packing: where each text lies.
        scaling: factor on the scores; 1/sqrt(d) when None.
        causal: whether a token sees only itself and what lies before it.
        reach: how many tokens away a token sees; None for the whole text.

    Returns:
        ``[tokens, heads, d]``.
    """
    varlen_attn = _kernel_for(query)
    if varlen_attn is None:
        return _attend_by_runs(query, key, value, packing, scaling, causal=causal, reach=reach)
    side = -1 if reach is None else reach
    longest = max(packing.lengths)
    attended: torch.Tensor = varlen_attn(
        query,
        key,
        value,
        packing.cumulative,
        packing.cumulative,
        longest,
        longest,
        scale=scaling,
        window_size=(side, 0 if causal else side),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return attended


def _kernel_for(query: torch.Tensor) -> Callable[..., Any] | None:
    """The packed kernel, where there is one for such tensors: on CUDA, in 16 bits."""
    return _varlen_attn() if query.is_cuda and query.dtype in {torch.bfloat16, torch.float16} else None


@functools.cache
def _varlen_attn() -> Callable[..., Any] | None:
    """PyTorch's own attention over packed rows; None before version 2.10. Half of torch is imported with it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _attend_by_runs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scaling: float | None,
    *,
    causal: bool,
    reach: int | None,
) -> torch.Tensor:
    """One dense attention for each run of texts of equal length; every tensor ``[tokens, heads, d]``."""
    out = query.new_empty(query.shape)
    grouped = key.shape[1] != query.shape[1]
    for start, count, length in packing.runs:
        window = None if reach is None or reach >= length - 1 else _band(length, reach, causal=causal, like=query)
        # Each [texts, heads, tokens of each, d], a view.
        texts = [
            tensor[start : start + count * length].view(count, length, -1, tensor.shape[-1]).transpose(1, 2)
            for tensor in (query, key, value, out)
        ]
        attended = scaled_dot_product_attention(
            texts[0],
            texts[1],
            texts[2],
            attn_mask=window,
            is_causal=causal and window is None,
            scale=scaling,
            enable_gqa=grouped,
        )
        texts[3].copy_(attended)
    return out


def _band(length: int, reach: int, *, causal: bool, like: torch.Tensor) -> torch.Tensor:
    """Which token sees which, bool ``[length, length]``: those at most `reach` away, behind only when causal."""
    positions = torch.arange(length, device=like.device)
    distance = positions[:, None] - positions[None, :]
    return (distance <= reach) & (distance >= (0 if causal else -reach))

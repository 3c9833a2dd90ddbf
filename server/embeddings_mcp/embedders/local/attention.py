"""Varlen attention: attention within each text of a packed row, without padding.

transformers lets a model look up its attention function by name. `packed_attention` is registered there, so every
family that uses this interface runs on packed batches with its own unmodified class. The model's mask (causal, sliding
window) reaches the function through the keywords that transformers' flash-attention integration reads, where a window
of ``w`` means ``w - 1`` tokens to either side.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch.nn.functional import scaled_dot_product_attention

from embeddings_mcp.embedders.local.hardware import is_ampere_or_newer
from embeddings_mcp.embedders.local.packing import Packing, PackingUnsupported

NAME = "embeddings_mcp_packed"
"""The name under which `packed_attention` is registered with transformers."""

_flash = torch.ops.aten._flash_attention_forward  # noqa: SLF001 - see `_attend_flash`
_efficient = torch.ops.aten._efficient_attention_forward  # noqa: SLF001 - there is no public API

_MAX_HEAD_SIZE = 256
"""Largest head dimension that the varlen kernels support."""

_ALIGNMENT = 16
"""The varlen kernels require the size of a head's vector in bytes to be a multiple of this."""

_MIN_WINDOW_BLOCK = 64
"""Minimum number of query tokens per call in windowed attention: smaller blocks cost more calls than they save work."""

SHORT = 64
"""Longest text, in tokens, for which the memory-efficient kernel is faster: it works on blocks of 64 tokens, flash
attention on blocks of 128. On an H100, it takes half of the time for texts of 5 to 30 tokens."""


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
    dropout: float = 0.0,  # noqa: ARG001 - always 0 in inference
    **others: Any,  # noqa: ANN401 - depends on the model family
) -> tuple[torch.Tensor, None]:
    """Compute attention within each text of a packed row; the attention function that transformers calls.

    Args:
        module: the attention layer; its `is_causal` applies if the argument is None.
        query: ``[1, heads, tokens, d]``.
        key: ``[1, key heads, tokens, d]``; fewer heads than `query` for grouped-query attention.
        value: as `key`.
        attention_mask: None, since transformers creates no mask for an attention function without a mask function.
        packing: the boundaries of the texts, passed through the model as a keyword.
        scaling: factor on the scores; 1/sqrt(d) if None.
        is_causal: whether a token attends only to itself and earlier tokens.
        sliding_window: window size in tokens, the token itself included; None for the whole text.
        dropout: ignored.
        others: all other keywords of the model; those that would change the scores are refused.

    Returns:
        ``[1, tokens, heads, d]``, and None for the attention weights.

    Raises:
        PackingUnsupported: the model did not pass on `packing`, or needs a feature that is not supported here.
    """
    if packing is None or attention_mask is not None:
        raise PackingUnsupported("the model does not pass the packing on to its attention")
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise PackingUnsupported(f"the model's attention uses {name}")
    attended = attend(
        # Each [tokens, heads, d], the memory layout in which the projections wrote them.
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
    """Compute attention within each text of a packed row, with the fastest kernel available.

    Args:
        query: ``[tokens, heads, d]``.
        key: ``[tokens, key heads, d]``.
        value: as `key`.
        packing: the boundaries of the texts.
        scaling: factor on the scores; 1/sqrt(d) if None.
        causal: whether a token attends only to itself and earlier tokens.
        reach: largest distance in tokens at which a token attends to another; None for the whole text.

    Returns:
        ``[tokens, heads, d]``.
    """
    match _select_kernel(query, key, packing.longest, reach):
        case "flash":
            return _attend_flash(query, key, value, packing, scaling, causal=causal, reach=reach)
        case "efficient":
            return _attend_efficient(query, key, value, packing, scaling, causal=causal)
        case "runs":
            return _attend_runs(query, key, value, packing, scaling, causal=causal, reach=reach)


_Kernel = Literal["flash", "efficient", "runs"]


def _select_kernel(query: torch.Tensor, key: torch.Tensor, longest: int, reach: int | None) -> _Kernel:
    """Return the fastest kernel that supports these tensors, for texts of up to `longest` tokens.

    The conditions are those that PyTorch checks before it selects a kernel itself (``sdp_utils.cpp``). Called directly
    with unsupported tensors, the kernels fail or misbehave.
    """
    head_size = query.shape[-1]
    if not query.is_cuda or head_size > _MAX_HEAD_SIZE or head_size * query.element_size() % _ALIGNMENT:
        return "runs"
    ampere = is_ampere_or_newer(query.device)
    if query.dtype == torch.bfloat16 and not ampere:
        return "runs"
    short = longest <= SHORT and key.shape[1] == query.shape[1]
    if query.dtype != torch.float32 and ampere and not (short and reach is None):
        return "flash"
    return "efficient" if reach is None else "runs"


def _attend_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scaling: float | None,
    *,
    causal: bool,
    reach: int | None,
) -> torch.Tensor:
    """Compute attention with PyTorch's varlen flash attention.

    The public API, ``torch.nn.attention.varlen``, does not support scaling, windows and grouped-query attention in all
    PyTorch versions that are supported here, and the overhead of a call is as long as a small kernel runs.
    """
    side = -1 if reach is None else reach
    attended: torch.Tensor = _flash(
        query,
        key,
        value,
        packing.cumulative,
        packing.cumulative,
        packing.longest,
        packing.longest,
        dropout_p=0.0,
        is_causal=causal and reach is None,
        return_debug_mask=False,
        scale=scaling,
        window_size_left=side,
        window_size_right=0 if causal else side,
    )[0]
    return attended


def _attend_efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scaling: float | None,
    *,
    causal: bool,
) -> torch.Tensor:
    """Compute attention with PyTorch's memory-efficient varlen attention, which supports float32 and older GPUs."""
    group_size = query.shape[1] // key.shape[1]
    if group_size > 1:
        key, value = key.repeat_interleave(group_size, dim=1), value.repeat_interleave(group_size, dim=1)
    attended: torch.Tensor = _efficient(
        query[None],
        key[None],
        value[None],
        None,
        packing.cumulative,
        packing.cumulative,
        packing.longest,
        packing.longest,
        dropout_p=0.0,
        custom_mask_type=int(causal),  # 1: causal, aligned to the upper left corner
        scale=scaling,
    )[0][0]
    return attended


def _attend_runs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scaling: float | None,
    *,
    causal: bool,
    reach: int | None,
) -> torch.Tensor:
    """Compute dense attention for each run of texts of equal length; every tensor is ``[tokens, heads, d]``."""
    out = query.new_empty(query.shape)
    attention = functools.partial(
        scaled_dot_product_attention, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
    )
    for start, count, length in packing.runs:
        # Each a view, [texts, heads, tokens per text, d].
        queries, keys, values, attended = (
            tensor[start : start + count * length].view(count, length, -1, tensor.shape[-1]).transpose(1, 2)
            for tensor in (query, key, value, out)
        )
        if reach is None or reach >= length - 1:
            attended.copy_(attention(queries, keys, values, is_causal=causal))
            continue
        for block, visible in _window_blocks(length, reach, causal=causal):
            mask = _band_mask(block, visible, reach, causal=causal, device=query.device)
            attended[:, :, block].copy_(
                attention(queries[:, :, block], keys[:, :, visible], values[:, :, visible], attn_mask=mask)
            )
    return out


def _window_blocks(length: int, reach: int, *, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of query tokens, each with the range of key tokens that are within the window of any of them.

    Scores outside these ranges are not computed: for 8,192 tokens with a window of 64 to either side, a fortieth of all
    scores remains, which takes an eighteenth of the time on a CPU.
    """
    step = max(_MIN_WINDOW_BLOCK, reach // 4)
    for first in range(0, length, step):
        end = min(first + step, length)
        yield slice(first, end), slice(max(0, first - reach), end if causal else min(length, end + reach))


def _band_mask(block: slice, visible: slice, reach: int, *, causal: bool, device: torch.device) -> torch.Tensor:
    """Return the mask of a sliding window, bool ``[block, visible]``: true up to a distance of `reach` tokens."""
    rows, columns = (torch.arange(tokens.start, tokens.stop, device=device) for tokens in (block, visible))
    distance = rows[:, None] - columns[None, :]
    return (distance <= reach) & (distance >= (0 if causal else -reach))

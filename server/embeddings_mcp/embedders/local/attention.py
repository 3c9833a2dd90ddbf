"""Attention over a packed row: many texts in one row of tokens, no padding, each text blind to the others.

transformers lets a model look its attention function up by name. `packed_attention` is registered there, so every
family that uses that interface runs unpadded, as its own unmodified class. How a model masks (causal or not, a sliding
window) reaches the function by the keywords that transformers' flash-attention integration reads, where a window of
``w`` means ``w - 1`` tokens to either side.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch.nn.functional import scaled_dot_product_attention

from embeddings_mcp.embedders.local.hardware import is_ampere
from embeddings_mcp.embedders.local.packing import Packing, PackingUnsupported

NAME = "embeddings_mcp_packed"
"""The name under which transformers finds the function."""

_flash = torch.ops.aten._flash_attention_forward  # noqa: SLF001 - see `_attend_by_flash`
_efficient = torch.ops.aten._efficient_attention_forward  # noqa: SLF001 - there is no public form

_WIDEST = 256
"""Length of a head's vectors that the packed kernels take at most."""

_ALIGNMENT = 16
"""Bytes of which a head's vectors have to be a multiple, for the same kernels."""

_WINDOW_STEP = 64
"""Tokens that look through their windows together, at least: fewer are more calls than they save."""

SHORT = 64
"""Tokens up to which the memory-efficient kernel is the faster one: it works on blocks of 64 tokens, flash attention on
blocks of 128. On an H100, texts of 5 to 30 tokens take it half of the time."""


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
    match _kernel_for(query, key, packing.longest, reach):
        case "flash":
            return _attend_by_flash(query, key, value, packing, scaling, causal=causal, reach=reach)
        case "efficient":
            return _attend_by_blocks(query, key, value, packing, scaling, causal=causal)
        case "runs":
            return _attend_by_runs(query, key, value, packing, scaling, causal=causal, reach=reach)


_Kernel = Literal["flash", "efficient", "runs"]


def _kernel_for(query: torch.Tensor, key: torch.Tensor, longest: int, reach: int | None) -> _Kernel:
    """The fastest way for such tensors, whose longest text has so many tokens.

    What the kernels take is what PyTorch checks before it chooses one itself (``sdp_utils.cpp``); called by name, they
    fail, or worse.
    """
    width = query.shape[-1]
    if not query.is_cuda or width > _WIDEST or width * query.element_size() % _ALIGNMENT:
        return "runs"
    recent = is_ampere(query.device)
    if query.dtype == torch.bfloat16 and not recent:
        return "runs"
    short = longest <= SHORT and key.shape[1] == query.shape[1]
    if query.dtype != torch.float32 and recent and not (short and reach is None):
        return "flash"
    return "efficient" if reach is None else "runs"


def _attend_by_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scaling: float | None,
    *,
    causal: bool,
    reach: int | None,
) -> torch.Tensor:
    """PyTorch's flash attention, which knows packed rows.

    Its public form, ``torch.nn.attention.varlen``, has neither factor nor window nor grouped heads in all versions that
    are supported here, and takes as long to call as a small kernel to run.
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


def _attend_by_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scaling: float | None,
    *,
    causal: bool,
) -> torch.Tensor:
    """PyTorch's memory-efficient attention, which knows packed rows too: in float32, and on GPUs of any age."""
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
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
        custom_mask_type=int(causal),  # 1: from the upper left corner
        scale=scaling,
    )[0][0]
    return attended


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
    attention = functools.partial(
        scaled_dot_product_attention, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
    )
    for start, count, length in packing.runs:
        # Each [texts, heads, tokens of each, d], a view.
        queries, keys, values, made = (
            tensor[start : start + count * length].view(count, length, -1, tensor.shape[-1]).transpose(1, 2)
            for tensor in (query, key, value, out)
        )
        if reach is None or reach >= length - 1:
            made.copy_(attention(queries, keys, values, is_causal=causal))
            continue
        for here, seen in _windows(length, reach, causal=causal):
            window = _band(here, seen, reach, causal=causal, device=query.device)
            made[:, :, here].copy_(
                attention(queries[:, :, here], keys[:, :, seen], values[:, :, seen], attn_mask=window)
            )
    return out


def _windows(length: int, reach: int, *, causal: bool) -> Iterator[tuple[slice, slice]]:
    """The tokens of a text, some after the other, each time with all that any of them sees.

    What lies beyond costs nothing then: of 8,192 tokens that see 64 to either side, a fortieth of the scores is left,
    which take a CPU an eighteenth of the time.
    """
    step = max(_WINDOW_STEP, reach // 4)
    for first in range(0, length, step):
        end = min(first + step, length)
        yield slice(first, end), slice(max(0, first - reach), end if causal else min(length, end + reach))


def _band(here: slice, seen: slice, reach: int, *, causal: bool, device: torch.device) -> torch.Tensor:
    """Which token sees which, bool ``[here, seen]``: those at most `reach` away, behind only when causal."""
    rows, columns = (torch.arange(tokens.start, tokens.stop, device=device) for tokens in (here, seen))
    distance = rows[:, None] - columns[None, :]
    return (distance <= reach) & (distance >= (0 if causal else -reach))

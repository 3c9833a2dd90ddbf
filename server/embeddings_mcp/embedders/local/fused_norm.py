"""A fused CUDA kernel, in Triton, that adds two tensors and applies a layer norm to the sum; see `norm`."""

# ruff: noqa: ANN001, ANN202, N803, PLR0917 - Triton kernels have no annotations but Triton's own

from __future__ import annotations

import torch
import triton
import triton.language as tl


def add_norm(
    rows: torch.Tensor, others: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """Return the layer norm of ``rows + others``, computed in float32.

    Args:
        rows: ``[tokens, d]`` on CUDA; like all arguments, contiguous.
        others: likewise.
        weight: ``[d]``.
        bias: ``[d]``.
        epsilon: added to the variance.
    """
    tokens, width = rows.shape
    normed = torch.empty_like(rows)
    with torch.cuda.device(rows.device):
        _add_norm[(tokens,)](rows, others, weight, bias, normed, width, epsilon, BLOCK=triton.next_power_of_2(width))
    return normed


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm(rows, others, weight, bias, normed, width, epsilon, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Process one row; `BLOCK` is a power of 2 of at least `width`."""
    first = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    left = tl.load(rows + first + columns, inside, 0).to(tl.float32)
    right = tl.load(others + first + columns, inside, 0).to(tl.float32)
    summed = left + right
    centered = tl.where(inside, summed - tl.sum(summed) / width, 0)
    scale = tl.rsqrt(tl.sum(centered * centered) / width + epsilon)
    factors = tl.load(weight + columns, inside, 0).to(tl.float32)
    offsets = tl.load(bias + columns, inside, 0).to(tl.float32)
    tl.store(normed + first + columns, (centered * scale * factors + offsets).to(normed.dtype.element_ty), inside)

"""The layer norms of BERT's family, each of the sum of a product and what went into it: on CUDA in one kernel.

PyTorch has one kernel that adds and another for the norm, which reads again what the first wrote: a seventh of a large
batch's time in bfloat16, and a third of that in one. The sum is not rounded in between then, so that in half precision
vectors come out half as far from those in float32.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch.nn.functional import layer_norm

from embeddings_mcp.embedders.local.linear import Int8Linear, Linear

_AddNorm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""See `fused_norm.add_norm`."""

_logger = logging.getLogger(__name__)


class Norm:
    """A layer norm over the last dimension.

    Args:
        weight: ``[d]``.
        bias: ``[d]``.
        epsilon: added to the variance.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> None:
        self._weight = weight
        self._bias = bias
        self._epsilon = epsilon
        self._add_norm = _kernel(weight.device, weight.dtype, len(weight)) if weight.is_cuda else None

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """From ``[tokens, d]`` to ``[tokens, d]``."""
        return layer_norm(rows, self._weight.shape, self._weight, self._bias, self._epsilon)

    def after(self, linear: Linear | Int8Linear, rows: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The norm of what `linear` makes of `rows`, which may be overwritten, with `residual` added."""
        if self._add_norm is None:
            return self(linear.plus(rows, residual))
        return self._add_norm(linear(rows), residual, self._weight, self._bias, self._epsilon)


@functools.cache
def _kernel(device: torch.device, dtype: torch.dtype, width: int) -> _AddNorm | None:
    """The kernel for both, where it can be had on this CUDA device, and makes what the two make.

    Triton, which compiles it when it is first used, comes with PyTorch on some systems only, and needs a C compiler.
    """
    try:
        from embeddings_mcp.embedders.local.fused_norm import add_norm

        rows = torch.linspace(-1, 1, 2 * width, device=device, dtype=dtype).view(2, width)
        made = add_norm(rows, rows, rows[0], rows[1], 1e-12)
        torch.testing.assert_close(made, layer_norm(rows + rows, (width,), rows[0], rows[1], 1e-12))
    except Exception as error:  # noqa: BLE001 - it is only faster with it, and a compiler fails in many ways
        _logger.info("on %s residuals are added before the norm, not within it: %s", device, error)
        return None
    return add_norm

"""Linear layers with prepacked weights and fused kernels, in float32, bfloat16 or int8.

On x86 CPUs in float32, PyTorch's own linear layer calls MKL, which repacks the weights at every call and does not use
all instructions of other vendors' CPUs. oneDNN, which is bundled with PyTorch, packs them once and fuses the following
operation (GELU, or adding the residual) into the matrix product. It does so in bfloat16 too, which is several times as
fast on CPUs with AMX. The operators used here are those that torch.compile uses.

With AVX2 only, oneDNN's fused GELU takes four times as long as a separate one by PyTorch (8 ms instead of 2 for 1,024
rows of 1,536), and its fused addition is no faster. MKL multiplies many rows up to 15 % faster there, but not within a
complete model that shares the cache with other processes, and it takes a third longer for few rows.
"""

from __future__ import annotations

import os

import torch

from embeddings_mcp.embedders.local.hardware import has_avx512, has_cublas, has_onednn_for, has_vnni, is_ampere_or_newer

# oneDNN caches the primitives that it compiles for every number of rows, 1,024 of them by default. In a server whose
# batches all differ in size, these take hundreds of megabytes. A smaller cache is still large enough for single
# queries, which are short and have few different lengths. The variables are read at the first matrix product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "128")  # the same for ideep, the layer between oneDNN and PyTorch

GELU_MIN = -0.17
"""Lower bound of GELU, whose minimum is -0.16997, at -0.7518."""

_MIN_ABS_MAX = 1e-12
"""Lower bound for the absolute maximum of a row or column, against division by zero."""

_ROUNDING_SHIFT = 1.5 * 2**23
"""Adding this to a float32 below 2^22 rounds it to an integer, half to even, which is then in the lowest bits."""

_BOUNDED_ZERO_POINT = 32
"""Zero point of inputs with a lower bound: an eighth of the 256 levels is for negative numbers."""

_PACKED_ROWS = 2048
"""Number of rows that the prepacked layout of the weights is optimized for; any other number works too."""


class Linear(torch.nn.Module):
    """A linear layer, ``x W' + b``, with an optional GELU or residual addition after it.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]``, or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._prepacked = has_onednn_for(weight.device, weight.dtype)
        self._fused = self._prepacked and has_avx512()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_ROWS) if self._prepacked else weight  # noqa: SLF001
        self._bias = bias
        self._cublas_gelu = bias is not None and weight.dtype == torch.bfloat16 and _has_cublas_gelu(weight.device)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Apply the layer: ``[..., in]`` to ``[..., out]``."""
        if not self._prepacked:
            return torch.nn.functional.linear(rows, self._weight, self._bias)
        return self._product(rows, "none")

    def gelu(self, rows: torch.Tensor) -> torch.Tensor:
        """Apply the layer to ``[tokens, in]``, then GELU in its exact form (erf), or one as accurate in bfloat16."""
        if self._fused:
            return self._product(rows, "gelu")
        if self._cublas_gelu and self._bias is not None:
            # cuBLAS has only the tanh approximation of GELU, but applies it to sums that are not rounded to bfloat16
            # yet, so that the error is no larger.
            activated: torch.Tensor = torch._addmm_activation(self._bias, rows, self._weight.t(), use_gelu=True)  # noqa: SLF001
            return activated
        result: torch.Tensor = torch.ops.aten.gelu_(self(rows))
        return result

    def add_residual(self, rows: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Apply the layer, then add `residual`, which has the shape of the result; may overwrite `rows`."""
        if self._fused:
            summed: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(  # noqa: SLF001
                rows, residual, self._weight, self._bias, "add"
            )
            return summed
        product: torch.Tensor = self(rows)
        return product.add_(residual)

    def _product(self, rows: torch.Tensor, activation: str) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(  # noqa: SLF001
            rows, self._weight, self._bias, activation, [], "none"
        )
        return product


class Int8Linear(torch.nn.Module):
    """A linear layer quantized to int8, with dynamically quantized inputs. Only for CPUs with oneDNN.

    Weights have a scale per output channel, with 127 levels to either side of 0 (or 63, see `_weight_levels`). Inputs
    have a scale per token, so that the result for a token does not depend on the rest of the batch, as it would with
    one scale per batch.

    Args:
        weight: float32 ``[out, in]``.
        bias: float32 ``[out]``, or None.
        lower_bound: lower bound of the inputs, 0 or slightly negative: fewer levels are then used for negative numbers.
            None if the inputs are symmetric around 0.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, lower_bound: float | None = None) -> None:
        super().__init__()
        abs_max = weight.abs().amax(dim=1).clamp_min_(_MIN_ABS_MAX)
        weight_levels = _weight_levels()
        quantized = torch.round(weight * (weight_levels / abs_max)[:, None]).to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(quantized, [_PACKED_ROWS, weight.shape[1]])
        self._weight_scales = abs_max / weight_levels
        self._weight_zero_points = torch.zeros(len(weight), dtype=torch.int64)
        self._bias = weight.new_zeros(len(weight)) if bias is None else bias
        self._symmetric = lower_bound is None
        self._zero_point = 128 if lower_bound is None else _BOUNDED_ZERO_POINT
        self._levels = 255 - self._zero_point  # for positive numbers
        self._min_abs_max = _MIN_ABS_MAX
        if lower_bound is not None:  # the levels for negative numbers have to reach down to it
            self._min_abs_max = max(_MIN_ABS_MAX, -lower_bound * self._levels / self._zero_point)
        self._shift = weight.new_full((weight.shape[1],), _ROUNDING_SHIFT + self._zero_point)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Apply the layer: ``[..., in]`` to ``[..., out]``."""
        return self._product(rows, overwrite=False)

    def gelu(self, rows: torch.Tensor) -> torch.Tensor:
        """Apply the layer, then GELU in its exact form (erf)."""
        result: torch.Tensor = torch.ops.aten.gelu_(self._product(rows, overwrite=False))
        return result

    def add_residual(self, rows: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Apply the layer, then add `residual`, which has the shape of the result; overwrites `rows`."""
        return self._product(rows, overwrite=True).add_(residual)

    def _product(self, rows: torch.Tensor, *, overwrite: bool) -> torch.Tensor:
        flat = rows.flatten(0, -2)
        abs_max = flat.amax(1, keepdim=True)
        if self._symmetric:
            abs_max = torch.maximum(abs_max, flat.amin(1, keepdim=True).neg_())
        abs_max.clamp_min_(self._min_abs_max)
        # In place, here and below: writing to new memory costs more than the computation.
        shifted = torch.addcmul(self._shift, flat, self._levels / abs_max, out=flat if overwrite else None)
        quantized = shifted.view(torch.int32).to(torch.uint8)
        product = torch.ops.onednn.qlinear_pointwise.default(
            quantized,
            1 / self._levels,
            self._zero_point,
            self._weight,
            self._weight_scales,
            self._weight_zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return torch.addcmul(self._bias, product, abs_max, out=product).view(*rows.shape[:-1], -1)


def make_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, *, quantized: bool, lower_bound: float | None = None
) -> Linear | Int8Linear:
    """Create an `Int8Linear` (see there for `lower_bound`) if `quantized`, else a `Linear` in the dtype of `weight`."""
    return Int8Linear(weight, bias, lower_bound=lower_bound) if quantized else Linear(weight, bias)


def prepack(module: torch.nn.Module, *, quantized: bool = False) -> None:
    """Replace each linear layer within `module` by a `Linear` or `Int8Linear`, where oneDNN supports it."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear) and has_onednn_for(child.weight.device, child.weight.dtype):
                parameters = dict(child.named_parameters())
                bias = parameters.get("bias")
                detached = None if bias is None else bias.detach()
                setattr(parent, name, make_linear(child.weight.detach(), detached, quantized=quantized))


def _has_cublas_gelu(device: torch.device) -> bool:
    """Return whether cuBLAS can fuse GELU into matrix products: on GPUs that compute in bfloat16."""
    return has_cublas(device) and is_ampere_or_newer(device)


def _weight_levels() -> int:
    """Return the number of levels of a weight to either side of 0.

    Without VNNI, pairs of products are accumulated in 16 bits, which 2 * 255 * 127 would overflow.
    """
    return 127 if has_vnni() else 63

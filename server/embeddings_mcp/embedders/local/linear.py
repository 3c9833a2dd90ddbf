"""Linear layers as fast as the processor allows, in float32, bfloat16 or, where that is asked for, in int8.

On x86 processors in float32, PyTorch's own linear layer leaves the work to MKL, which lays out the weights anew at
every call and does not use all that processors of other makers have. oneDNN, which PyTorch brings along, lays them out
once, and does what follows the product (GELU, or adding the residual) on the way; in bfloat16 too, which on processors
with AMX is several times as fast. Its operators are those that torch.compile uses.

With AVX2 alone oneDNN's GELU takes four times as long as PyTorch's after it (8 ms for 1,024 rows of 1,536, and not 2),
and its adding gains nothing. MKL would multiply many rows up to 15 % faster there, but not in a whole model beside
neighbours who use the same cache, and few rows take it a third longer.
"""

from __future__ import annotations

import os

import torch

from embeddings_mcp.embedders.local.hardware import has_avx512, has_cublas, has_onednn_for, has_vnni, is_ampere

# oneDNN keeps what it has compiled for every number of rows that it has met, 1,024 of them if nobody says otherwise:
# for a server whose batches all differ, hundreds of megabytes. Of fewer, lone queries, which are short and few in kind,
# still find their like. It is read at the first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "128")  # the same of ideep, which lies between oneDNN and PyTorch

GELU_LEAST = -0.17
"""GELU is nowhere less: its minimum is -0.16997, at -0.7518."""

_SMALLEST = 1e-12
"""Floor under the largest magnitude of a row or column of zeros."""

_SHIFT = 1.5 * 2**23
"""Added to a float32 below 2^22, it leaves that rounded to a whole number, half to even, in the lowest bits."""

_ZERO_OF_BOUNDED = 32
"""Level of 0 where inputs have a lower bound: an eighth of the 256 levels lies below."""

_ROWS = 2048
"""For how many rows the weights are laid out; fewer or more are computed as well."""


class Linear(torch.nn.Module):
    """``x W' + b``, and what may follow it.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]``, or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._prepacked = has_onednn_for(weight.device, weight.dtype)
        self._fuses = self._prepacked and has_avx512()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS) if self._prepacked else weight  # noqa: SLF001
        self._bias = bias
        self._gelu_within = bias is not None and weight.dtype == torch.bfloat16 and _has_gelu(weight.device)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """From ``[..., in]`` to ``[..., out]``."""
        if not self._prepacked:
            return torch.nn.functional.linear(rows, self._weight, self._bias)
        return self._product(rows, "none")

    def gelu(self, rows: torch.Tensor) -> torch.Tensor:
        """The same, from ``[tokens, in]``, then GELU in its exact form (with erf), as far as the numbers tell."""
        if self._fuses:
            return self._product(rows, "gelu")
        if self._gelu_within and self._bias is not None:
            # cuBLAS has GELU's form with tanh only; but it computes that of sums which are not rounded yet, and comes
            # out no farther from what is exact.
            made: torch.Tensor = torch._addmm_activation(self._bias, rows, self._weight.t(), use_gelu=True)  # noqa: SLF001
            return made
        result: torch.Tensor = torch.ops.aten.gelu_(self(rows))
        return result

    def plus(self, rows: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The same, then `residual` added, of the shape of the result; `rows` may be overwritten."""
        if self._fuses:
            summed: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(  # noqa: SLF001
                rows, residual, self._weight, self._bias, "add"
            )
            return summed
        product: torch.Tensor = self(rows)
        return product.add_(residual)

    def _product(self, rows: torch.Tensor, then: str) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(  # noqa: SLF001
            rows, self._weight, self._bias, then, [], "none"
        )
        return product


class Int8Linear(torch.nn.Module):
    """The same, near enough, with weights and inputs in 8 bits: for CPUs that oneDNN computes on only.

    A weight is rounded to 127ths (or 63ths, see `_weight_levels`) of the largest of its output, an input to levels of
    its token's own size. So a token is rounded alike whatever its neighbours, unlike with one scale for a batch.

    Args:
        weight: float32 ``[out, in]``.
        bias: float32 ``[out]``, or None.
        least: what no input is less than, 0 or a little below: few levels are spent on numbers below 0 then. None where
            inputs are as often below 0 as above.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, least: float | None = None) -> None:
        super().__init__()
        largest = weight.abs().amax(dim=1).clamp_min_(_SMALLEST)
        most = _weight_levels()
        levels = torch.round(weight * (most / largest)[:, None]).to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(levels, [_ROWS, weight.shape[1]])
        self._scales = largest / most
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)
        self._bias = weight.new_zeros(len(weight)) if bias is None else bias
        self._signed = least is None
        self._zero = 128 if least is None else _ZERO_OF_BOUNDED
        self._levels = 255 - self._zero  # to either side of 0, or above it
        self._least_largest = _SMALLEST if least is None else max(_SMALLEST, -least * self._levels / self._zero)
        self._shift = weight.new_full((weight.shape[1],), _SHIFT + self._zero)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """From ``[..., in]`` to ``[..., out]``."""
        return self._product(rows, overwritten=False)

    def gelu(self, rows: torch.Tensor) -> torch.Tensor:
        """The same, then GELU in its exact form (with erf)."""
        result: torch.Tensor = torch.ops.aten.gelu_(self._product(rows, overwritten=False))
        return result

    def plus(self, rows: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The same, then `residual` added, of the shape of the result; `rows` is overwritten."""
        return self._product(rows, overwritten=True).add_(residual)

    def _product(self, rows: torch.Tensor, *, overwritten: bool) -> torch.Tensor:
        flat = rows.flatten(0, -2)
        largest = flat.amax(1, keepdim=True)
        if self._signed:
            largest = torch.maximum(largest, flat.amin(1, keepdim=True).neg_())
        largest.clamp_min_(self._least_largest)
        # In place, here and below: what is written anew costs more than what is computed.
        shifted = torch.addcmul(self._shift, flat, self._levels / largest, out=flat if overwritten else None)
        levels = shifted.view(torch.int32).to(torch.uint8)
        product = torch.ops.onednn.qlinear_pointwise.default(
            levels,
            1 / self._levels,
            self._zero,
            self._weight,
            self._scales,
            self._zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return torch.addcmul(self._bias, product, largest, out=product).view(*rows.shape[:-1], -1)


def make_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, *, quantized: bool, least: float | None = None
) -> Linear | Int8Linear:
    """The layer in int8 if `quantized`, else in the numbers of `weight`; `least` as in `Int8Linear`."""
    return Int8Linear(weight, bias, least=least) if quantized else Linear(weight, bias)


def prepack(module: torch.nn.Module, *, quantized: bool = False) -> None:
    """Put a `Linear`, or an `Int8Linear`, in the place of each linear layer within `module`, where that is faster."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear) and has_onednn_for(child.weight.device, child.weight.dtype):
                parameters = dict(child.named_parameters())
                bias = parameters.get("bias")
                detached = None if bias is None else bias.detach()
                setattr(parent, name, make_linear(child.weight.detach(), detached, quantized=quantized))


def _has_gelu(device: torch.device) -> bool:
    """Whether products on this device can have GELU within them: by cuBLAS, on GPUs that compute in bfloat16."""
    return has_cublas(device) and is_ampere(device)


def _weight_levels() -> int:
    """How many levels a weight has to either side of 0.

    Without VNNI two products are added up in 16 bits, which 255 * 127 twice would overflow.
    """
    return 127 if has_vnni() else 63

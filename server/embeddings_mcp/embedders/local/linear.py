"""Linear layers as fast as the processor allows.

On x86 processors in float32, PyTorch's own linear layer leaves the work to MKL, which lays out the weights anew at
every call and does not use all that processors of other makers have. oneDNN, which PyTorch brings along, lays them out
once, and does what follows the product (GELU, or adding the residual) on the way. Its operators are those that
torch.compile uses.
"""

from __future__ import annotations

import platform

import torch

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
        self.prepacked = _can_prepack(weight)
        self._bias = bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS) if self.prepacked else weight  # noqa: SLF001

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """From ``[..., in]`` to ``[..., out]``."""
        return self._apply_to(rows, "none")

    def gelu(self, rows: torch.Tensor) -> torch.Tensor:
        """The same, then GELU in its exact form (with erf)."""
        return self._apply_to(rows, "gelu")

    def plus(self, rows: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The same, then `residual` added, of the shape of the result."""
        if self.prepacked:
            summed: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(  # noqa: SLF001
                rows, residual, self._weight, self._bias, "add"
            )
            return summed
        return torch.nn.functional.linear(rows, self._weight, self._bias) + residual

    def _apply_to(self, rows: torch.Tensor, then: str) -> torch.Tensor:
        if self.prepacked:
            done: torch.Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001
                rows, self._weight, self._bias, then, [], "none"
            )
            return done
        product = torch.nn.functional.linear(rows, self._weight, self._bias)
        return torch.nn.functional.gelu(product) if then == "gelu" else product


def prepack(module: torch.nn.Module) -> None:
    """Put a `Linear` in the place of each linear layer within `module`, where that is faster."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear) and _can_prepack(child.weight):
                parameters = dict(child.named_parameters())
                bias = parameters.get("bias")
                setattr(parent, name, Linear(child.weight.detach(), None if bias is None else bias.detach()))


def _can_prepack(weight: torch.Tensor) -> bool:
    return bool(
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and platform.machine().lower() in {"x86_64", "amd64"}
    )

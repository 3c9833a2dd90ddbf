"""Where a model computes, and in which numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from embeddings_mcp.embedders.local.fingerprint import number_format
from embeddings_mcp.embedders.local.hardware import has_amx, has_onednn
from embeddings_mcp.errors import ModelUnavailable
from embeddings_mcp.models import Precision

_TOKENS_PER_BATCH = {"cpu": 2048, "mps": 8192, "cuda": 16384}

_LEAST_TOKENS_PER_BATCH = {"cpu": 256, "mps": 8192, "cuda": 4096}

_TOKENS_PER_INT8_BATCH = 1024
"""In int8 the products take a quarter of the time, and reading and writing between them counts: for more tokens than
these the C library asks the system for each tensor anew, which costs a quarter of it all."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model computes, and in which numbers.

    Attributes:
        device: where.
        dtype: of its tensors.
        quantized: whether its linear layers compute in int8.
    """

    device: torch.device
    dtype: torch.dtype
    quantized: bool = False

    @property
    def precision(self) -> str:
        """What is computed in, by the name that the settings have for it."""
        return "int8" if self.quantized else str(self.dtype).removeprefix("torch.")

    @property
    def in_amx(self) -> bool:
        """Whether products are computed by a CPU's AMX in bfloat16: so fast that what is around them counts."""
        return has_onednn(self.device) and self.dtype == torch.bfloat16 and has_amx()

    @property
    def slower_than_float32(self) -> bool:
        """Whether this is an x86 CPU in 16 bits, which only saves memory unless it is in AMX."""
        return has_onednn(self.device) and self.dtype != torch.float32 and not self.in_amx

    @property
    def faster_in_bfloat16(self) -> bool:
        """Whether this is a CPU with AMX in float32; models would take a third of the time."""
        return has_onednn(self.device) and self.precision == "float32" and has_amx()

    @property
    def tokens_per_batch(self) -> int:
        """Tokens that go through a model at once: its device is busy then, and its caches or memory suffice."""
        if self.quantized:
            return _TOKENS_PER_INT8_BATCH
        return _TOKENS_PER_BATCH.get(self.device.type, _TOKENS_PER_BATCH["cpu"])

    @property
    def least_tokens_per_batch(self) -> int:
        """Tokens that are not worth sharing out: the weights are read, and kernels launched, however few there are."""
        return _LEAST_TOKENS_PER_BATCH.get(self.device.type, _LEAST_TOKENS_PER_BATCH["cpu"])


def choose_placement(device: str, precision: Precision) -> Placement:
    """What the settings mean on this machine.

    Args:
        device: ``auto`` (cuda, then mps, then cpu), or a torch device such as ``cuda:1``.
        precision: the number format.

    Raises:
        ModelUnavailable: this machine has no such device, or the device not these numbers.
    """
    where = _device(device)
    number = number_format(precision, where.type)
    if number != "int8":
        return Placement(where, getattr(torch, number))
    if not has_onednn(where):
        raise ModelUnavailable(
            f"int8 is for x86 CPUs, and not for {where}: set another precision (EMBEDDINGS_MCP_PRECISION)"
        )
    return Placement(where, torch.float32, quantized=True)


def numbers_on(device: torch.device, numbers: NDArray[np.int64]) -> torch.Tensor:
    """Integers as a tensor on the device; to a GPU they travel from pinned memory, and nobody waits for them."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _device(name: str) -> torch.device:
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
            reason = str(error).partition("\n")[0]
            if reason.startswith("Expected one of"):  # dozens of kinds follow, few of which anybody has
                reason = "it is none that PyTorch knows, such as cpu, cuda:0 or mps"
            raise ModelUnavailable(
                f"the device {name!r} cannot be used here ({reason}): set another one (--device, or "
                "EMBEDDINGS_MCP_DEVICE), or auto"
            ) from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")

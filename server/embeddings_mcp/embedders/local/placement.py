"""Selection of the device and the number format of a model."""

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

_MIN_TOKENS_PER_BATCH = {"cpu": 256, "mps": 8192, "cuda": 4096}

_TOKENS_PER_INT8_BATCH = 1024
"""In int8, matrix products take a quarter of the time, so that memory traffic between them matters: for larger batches
the C library requests memory from the system for every tensor, which takes a quarter of the total time."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The device and number format of a model.

    Attributes:
        device: the device.
        dtype: dtype of the tensors.
        quantized: whether the linear layers compute in int8.
    """

    device: torch.device
    dtype: torch.dtype
    quantized: bool = False

    @property
    def precision(self) -> str:
        """The number format, by its name in the settings."""
        return "int8" if self.quantized else str(self.dtype).removeprefix("torch.")

    @property
    def in_amx(self) -> bool:
        """Whether matrix products run on AMX in bfloat16: so fast that the work around them matters."""
        return has_onednn(self.device) and self.dtype == torch.bfloat16 and has_amx()

    @property
    def slower_than_float32(self) -> bool:
        """Whether this is a 16-bit format on an x86 CPU without AMX for it, which saves memory but no time."""
        return has_onednn(self.device) and self.dtype != torch.float32 and not self.in_amx

    @property
    def faster_in_bfloat16(self) -> bool:
        """Whether this is float32 on a CPU with AMX, where bfloat16 would take a third of the time."""
        return has_onednn(self.device) and self.precision == "float32" and has_amx()

    @property
    def tokens_per_batch(self) -> int:
        """Token budget of a batch: enough to keep the device busy, and few enough for its caches or memory."""
        if self.quantized:
            return _TOKENS_PER_INT8_BATCH
        return _TOKENS_PER_BATCH.get(self.device.type, _TOKENS_PER_BATCH["cpu"])

    @property
    def min_tokens_per_batch(self) -> int:
        """Tokens below which a batch is not worth splitting: reading weights and launching kernels is a fixed cost."""
        return _MIN_TOKENS_PER_BATCH.get(self.device.type, _MIN_TOKENS_PER_BATCH["cpu"])


def choose_placement(device: str, precision: Precision) -> Placement:
    """Resolve the settings on this machine.

    Args:
        device: ``auto`` (cuda, then mps, then cpu), or a torch device such as ``cuda:1``.
        precision: the number format.

    Raises:
        ModelUnavailable: the device is not available, or does not support the number format.
    """
    resolved = _resolve_device(device)
    number = number_format(precision, resolved.type)
    if number != "int8":
        return Placement(resolved, getattr(torch, number))
    if not has_onednn(resolved):
        raise ModelUnavailable(
            f"int8 is for x86 CPUs, and not for {resolved}: set another precision (EMBEDDINGS_MCP_PRECISION)"
        )
    return Placement(resolved, torch.float32, quantized=True)


def to_device(numbers: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """Copy integers to a device as a tensor; to a GPU asynchronously, from pinned memory."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _resolve_device(name: str) -> torch.device:
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:  # the latter if torch was built without CUDA
            reason = str(error).partition("\n")[0]
            if reason.startswith("Expected one of"):  # followed by dozens of device types, most of them exotic
                reason = "PyTorch has no such device type; it has, for example, cpu, cuda:0 and mps"
            raise ModelUnavailable(
                f"the device {name!r} cannot be used here ({reason}): set another one (--device, or "
                "EMBEDDINGS_MCP_DEVICE), or auto"
            ) from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")

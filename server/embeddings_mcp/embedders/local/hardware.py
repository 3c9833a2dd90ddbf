"""Hardware capabilities that decide which implementation is available, or faster."""

from __future__ import annotations

import platform

import torch

_AMPERE = (8, 0)
"""Lowest CUDA compute capability that supports bfloat16 arithmetic and flash attention."""


def has_onednn(device: torch.device) -> bool:
    """Return whether oneDNN is available for this device."""
    return bool(
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and platform.machine().lower() in {"x86_64", "amd64"}
    )


def has_onednn_for(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether oneDNN has matrix products in `dtype` on this device, fast or slow; see `has_amx`."""
    if not has_onednn(device):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001 - see `linear`
    )


def has_amx() -> bool:
    """Return whether the CPU has AMX, which multiplies bfloat16 tiles many times as fast as float32.

    Without AMX, bfloat16 is slower than float32: it takes 1.4 times as long with AVX-512's bfloat16 instructions, and
    four times as long without them.
    """
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def has_avx512() -> bool:
    """Return whether the CPU has AVX-512."""
    return bool(torch.cpu.get_capabilities().get("avx512_f"))


def has_vnni() -> bool:
    """Return whether the CPU has VNNI: 8-bit dot products accumulated in 32 bits, in one instruction."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))


def is_ampere_or_newer(device: torch.device) -> bool:
    """Return whether a CUDA device is of NVIDIA's Ampere generation or newer, or an AMD GPU of equal capability."""
    return torch.cuda.get_device_capability(device) >= _AMPERE


def has_cublas(device: torch.device) -> bool:
    """Return whether cuBLAS is available for this device."""
    return device.type == "cuda" and torch.version.hip is None

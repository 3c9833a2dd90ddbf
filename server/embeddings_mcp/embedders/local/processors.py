"""What the processors of this machine can do, where it decides which way is possible, or the faster one."""

from __future__ import annotations

import platform

import torch

_AMPERE = (8, 0)
"""Compute capability of NVIDIA's oldest GPUs that compute in bfloat16, and that flash attention runs on."""


def has_onednn(device: torch.device) -> bool:
    """Whether oneDNN computes on this device."""
    return bool(
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and platform.machine().lower() in {"x86_64", "amd64"}
    )


def has_avx512() -> bool:
    """Whether the CPU has AVX-512."""
    return bool(torch.cpu.get_capabilities().get("avx512_f"))


def has_vnni() -> bool:
    """Whether the CPU adds products of 8 bits up in 32, in one instruction."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))


def is_ampere(device: torch.device) -> bool:
    """Whether a CUDA device is of NVIDIA's Ampere generation or newer, or an AMD one that does what those do."""
    return torch.cuda.get_device_capability(device) >= _AMPERE


def has_cublas(device: torch.device) -> bool:
    """Whether cuBLAS computes on this device."""
    return device.type == "cuda" and torch.version.hip is None

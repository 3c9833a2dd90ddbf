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


def has_onednn_for(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies such numbers on this device, be it slowly: see `has_amx`."""
    if not has_onednn(device):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001 - see `linear`
    )


def has_amx() -> bool:
    """Whether the CPU multiplies bfloat16 in tiles, many times as fast as float32.

    Without, bfloat16 takes a CPU longer: with AVX-512's own instruction for it 1.4 times as long as float32, without
    that four times.
    """
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


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

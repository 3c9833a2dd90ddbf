"""Description of the machine. Imports only the standard library."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path

_PACKAGES = ("torch", "transformers", "sentence-transformers", "numpy", "mcp")


def describe() -> str:
    """Machine, load average, versions and date, in a few lines."""
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    versions = ", ".join(f"{package} {version}" for package in _PACKAGES if (version := _version(package)))
    return (
        f"{_processor()}, {cores()} cores, {platform.system()} {platform.machine()}; "
        f"load average before the run {load}\n"
        f"Python {platform.python_version()}, {versions}\n"
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    )


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or "unknown processor"
    text = info.read_text(encoding="utf-8")
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = set(text.partition("\nflags")[2].partition("\n")[0].split())
    widest = next((kind for kind in ("amx_tile", "avx512_vnni", "avx512f", "avx2") if kind in flags), "no AVX2")
    return f"{name[1] if name else platform.machine()} ({widest})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

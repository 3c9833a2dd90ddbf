"""Tuning of glibc's malloc: when it returns free memory to the system, and when it keeps it.

With any other C library, everything here does nothing.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

TOKENS_PER_TRIM = 2 * 1024
"""Number of tokens between two trims of the heap: a full batch in float32."""

_THRESHOLDS = {-1: 128 << 20, -3: 32 << 20}
"""Bytes, for ``M_TRIM_THRESHOLD`` and ``M_MMAP_THRESHOLD`` of malloc.h. Larger allocations are not affected."""


class HeapTrimmer:
    """Returns free heap memory to the system (``malloc_trim``) after every `TOKENS_PER_TRIM` tokens.

    Batches of varying sizes fragment the heap, and glibc keeps the free fragments: a process that used 350 MiB grew to
    800 within some hundred batches. A trim takes 1 ms, for a model whose batches take 100 ms. Counting batches instead
    of tokens would cost a tenth of the time of single queries.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._trim = _glibc_function("malloc_trim")

    def add(self, tokens: int) -> None:
        """Count the tokens of a finished batch, and trim the heap when it is time. May be called from any thread."""
        self._tokens += tokens  # not atomic: a lost update only delays the next trim
        if self._trim is not None and self._tokens >= TOKENS_PER_TRIM:
            self._tokens = 0
            self._trim(0)


def raise_malloc_thresholds() -> None:
    """Have glibc reuse the memory of freed tensors instead of returning it to the system.

    By default, glibc returns free memory at the top of the heap, and requests it again, page by page, for every large
    tensor. That takes up to a fifth of a model's time in int8, and in bfloat16 with AMX. In float32 it takes next to
    none, and higher thresholds only increase fragmentation.
    """
    if (mallopt := _glibc_function("mallopt")) is not None:
        for parameter, value in _THRESHOLDS.items():
            mallopt(parameter, value)


def _glibc_function(name: str) -> Callable[..., int] | None:
    """Return a function of the C library, or None if it is not glibc."""
    if not sys.platform.startswith("linux"):
        return None
    function: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
    return function

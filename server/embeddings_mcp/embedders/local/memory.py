"""When memory runs out: half of a batch needs half of it. And that it does not run out: what is free is given back."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from embeddings_mcp.errors import ModelUnavailable

_KEPT = {-1: 128 << 20, -3: 32 << 20}
"""Bytes, for ``M_TRIM_THRESHOLD`` and ``M_MMAP_THRESHOLD`` of malloc.h: for what is larger, nothing changes."""

_Row = TypeVar("_Row")
_Result = TypeVar("_Result")

TOKENS = 2 * 1024
"""After so many tokens what is free is given back: a full batch in float32."""

_logger = logging.getLogger(__name__)


def halving(make: Callable[[Sequence[_Row]], _Result], rows: Sequence[_Row]) -> list[_Result]:
    """What `make` makes of all rows: in one piece or, where these are too many for the memory, in several.

    Raises:
        ModelUnavailable: a row alone is.
        Exception: whatever else `make` raises.
    """
    try:
        return [make(rows)]
    except Exception as error:
        if not out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
    # Here and not in the handler: as long as the error is alive, its traceback holds on to what filled the memory.
    torch.cuda.empty_cache()  # what is kept for tensors of other sizes; nothing is, where there is no GPU
    if len(rows) == 1:
        raise ModelUnavailable(
            f"a text of this length needs more memory than there is here ({reason}): shorten it, or truncate it"
        )
    _logger.warning("%d texts at once are too many for the memory, half of them are tried: %s", len(rows), reason)
    middle = len(rows) // 2
    return halving(make, rows[:middle]) + halving(make, rows[middle:])


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that there is no memory left, on whatever device.

    PyTorch has a class for it on devices with memory of their own only; of the CPU's it says so in words.
    """
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "not enough memory" in str(error))
    )


class Returning:
    """Gives free memory back to the system after every `TOKENS` tokens.

    Batches of ever other sizes leave holes of ever other sizes behind, which glibc keeps: a process that used 350 MiB
    grew to 800 in some hundred batches. Looking for them takes 1 ms, on a model whose batches take 100; after so many
    batches and not tokens, it would be a tenth of what lone queries take. Where the C library is another one, nothing
    is done.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._trim = _of_glibc("malloc_trim")

    def __call__(self, tokens: int) -> None:
        """To be called after each batch, from any thread, with its tokens."""
        self._tokens += tokens  # what two threads add at the same moment may be lost, and no harm is done
        if self._trim is not None and self._tokens >= TOKENS:
            self._tokens = 0
            self._trim(0)


def keep_freed() -> None:
    """Have glibc keep what one tensor leaves for the next; where the C library is another one, nothing is done.

    Left to itself it gives what is free at the end of its heap back to the system, and asks for it again, page by page,
    with every large tensor. In int8, and in bfloat16 with AMX, that is up to a fifth of the time that a model takes; in
    float32 it is next to nothing, and a process that keeps what is freed has larger holes.
    """
    if (mallopt := _of_glibc("mallopt")) is not None:
        for parameter, value in _KEPT.items():
            mallopt(parameter, value)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where it is not glibc."""
    if not sys.platform.startswith("linux"):
        return None
    function: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
    return function

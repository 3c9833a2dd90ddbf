"""When memory runs out: half of a batch needs half of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from embeddings_mcp.errors import ModelUnavailable

_Row = TypeVar("_Row")
_Result = TypeVar("_Result")

_logger = logging.getLogger(__name__)


def halving(make: Callable[[Sequence[_Row]], Sequence[_Result]], rows: Sequence[_Row]) -> list[_Result]:
    """What `make` makes of all rows, by halves where all at once are too many for the memory.

    Raises:
        ModelUnavailable: a row alone is.
        Exception: whatever else `make` raises.
    """
    try:
        return list(make(rows))
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

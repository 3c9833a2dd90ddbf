"""Splitting a batch in half when it does not fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from embeddings_mcp.errors import ModelUnavailable

_Row = TypeVar("_Row")
_Result = TypeVar("_Result")

_logger = logging.getLogger(__name__)


def split_on_oom(compute: Callable[[Sequence[_Row]], _Result], rows: Sequence[_Row]) -> list[_Result]:
    """Call `compute` with all rows or, if that runs out of memory, with each half of them, recursively.

    Returns:
        The results of the successful calls, in the order of the rows.

    Raises:
        ModelUnavailable: a single row does not fit into memory.
        Exception: any other error that `compute` raises.
    """
    try:
        return [compute(rows)]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
    # Not in the handler: while the error is alive, its traceback keeps references to what filled the memory.
    torch.cuda.empty_cache()  # release cached blocks of other sizes; does nothing without a GPU
    if len(rows) == 1:
        raise ModelUnavailable(
            f"a text of this length needs more memory than is available ({reason}): shorten it, or truncate it"
        )
    _logger.warning("Out of memory with a batch of %d texts, retrying with half of it: %s", len(rows), reason)
    middle = len(rows) // 2
    return split_on_oom(compute, rows[:middle]) + split_on_oom(compute, rows[middle:])


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that memory ran out, on any device.

    PyTorch has an exception class for devices with their own memory only. On the CPU it raises a plain RuntimeError,
    which is recognized by its message.
    """
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "not enough memory" in str(error))
    )

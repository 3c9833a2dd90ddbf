"""When memory runs out, batches are split in half; only a text that does not fit on its own is refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import anyio
import numpy as np
import pytest
import torch

from embeddings_mcp.embedders.local.out_of_memory import is_out_of_memory, split_on_oom
from embeddings_mcp.embedders.local.runtime.in_process import InProcessModel
from embeddings_mcp.embedders.local_embedder import LocalEmbedder
from embeddings_mcp.errors import ModelUnavailable
from tests.test_local_embedder import EXACT, ROUGH, SteppedEncoder

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 10 bytes."),
    MemoryError("Unable to allocate 8.00 EiB for an array"),
]


def with_memory_for(rows_at_once: int, error: Exception, tried: list[int]) -> Callable[[Sequence[int]], list[int]]:
    def compute(rows: Sequence[int]) -> list[int]:
        tried.append(len(rows))
        if len(rows) > rows_at_once:
            raise error
        return [row * 10 for row in rows]

    return compute


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "windows", "numpy"])
def test_a_batch_too_large_for_the_memory_is_computed_in_halves_in_order(error: Exception) -> None:
    tried: list[int] = []
    assert split_on_oom(with_memory_for(2, error, tried), range(7)) == [[0], [10, 20], [30, 40], [50, 60]]
    assert tried == [7, 3, 1, 2, 4, 2, 2]


def test_a_text_too_large_on_its_own_is_refused_with_what_to_do() -> None:
    with pytest.raises(ModelUnavailable, match="shorten it, or truncate it"):
        split_on_oom(with_memory_for(0, ERRORS[0], []), [1, 2])


def test_another_error_is_not_retried() -> None:
    tried: list[int] = []
    with pytest.raises(RuntimeError, match="another"):
        split_on_oom(with_memory_for(0, RuntimeError("another"), tried), [1, 2])
    assert tried == [2]


def test_what_filled_the_memory_is_freed_before_the_halves_are_tried() -> None:
    class Filling:
        """Stands for a large allocation."""

    held: list[weakref.ref[Filling]] = []

    def compute(rows: Sequence[int]) -> list[int]:
        assert all(reference() is None for reference in held)
        filling = Filling()
        held.append(weakref.ref(filling))
        if len(rows) > 1:
            raise MemoryError
        return [*rows]

    gc.disable()  # so that only reference counting frees objects
    try:
        assert split_on_oom(compute, [1, 2, 3]) == [[1], [2], [3]]
    finally:
        gc.enable()


def test_pytorch_s_own_out_of_memory_error_is_recognized() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60)
    assert is_out_of_memory(refused.value)


@pytest.mark.anyio
async def test_a_request_is_answered_although_its_batch_was_too_large() -> None:
    class Small(SteppedEncoder):
        device = torch.device("cpu")

        def forward(self, rows: Sequence[Sequence[int]], skip: int) -> Any:
            if len(rows) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return np.array([[len(row)] for row in rows], np.float32)

    model = InProcessModel([cast("Any", Small())])
    embedder = LocalEmbedder(ROUGH, lambda: model, lambda: ("rough", EXACT))
    with anyio.fail_after(10):
        embedded = await embedder.embed(["x", "xx", "xxx"], input_type=None, truncate="NONE")
    assert embedded.vectors[:, 0].tolist() == [1, 2, 3]
    await embedder.aclose()

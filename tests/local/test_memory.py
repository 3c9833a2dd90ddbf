"""When memory runs out, batches are halved; nobody but who asks for too much alone is refused."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import anyio
import numpy as np
import pytest
import torch

from embeddings_mcp.embedders.local import memory
from embeddings_mcp.embedders.local.memory import Returning, halving, out_of_memory
from embeddings_mcp.embedders.local.running.in_process import InThisProcess
from embeddings_mcp.embedders.local_embedder import LocalEmbedder
from embeddings_mcp.errors import ModelUnavailable
from tests.test_local_embedder import EXACT, ROUGH, SteppedEncoder

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 10 bytes."),
    MemoryError("Unable to allocate 8.00 EiB for an array"),
]


def with_room_for(rows_at_once: int, error: Exception, tried: list[int]) -> Callable[[Sequence[int]], list[int]]:
    def make(rows: Sequence[int]) -> list[int]:
        tried.append(len(rows))
        if len(rows) > rows_at_once:
            raise error
        return [row * 10 for row in rows]

    return make


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "windows", "numpy"])
def test_a_batch_too_large_for_the_memory_is_made_by_halves_in_order(error: Exception) -> None:
    tried: list[int] = []
    assert halving(with_room_for(2, error, tried), range(7)) == [[0], [10, 20], [30, 40], [50, 60]]
    assert tried == [7, 3, 1, 2, 4, 2, 2]


def test_a_text_too_large_alone_is_refused_with_what_to_do() -> None:
    with pytest.raises(ModelUnavailable, match="shorten it, or truncate it"):
        halving(with_room_for(0, ERRORS[0], []), [1, 2])


def test_another_error_is_not_tried_again() -> None:
    tried: list[int] = []
    with pytest.raises(RuntimeError, match="another"):
        halving(with_room_for(0, RuntimeError("another"), tried), [1, 2])
    assert tried == [2]


def test_what_filled_the_memory_is_gone_before_the_halves_are_tried() -> None:
    class Filling:
        """Much memory."""

    held: list[weakref.ref[Filling]] = []

    def make(rows: Sequence[int]) -> list[int]:
        assert all(reference() is None for reference in held)
        filling = Filling()
        held.append(weakref.ref(filling))
        if len(rows) > 1:
            raise MemoryError
        return [*rows]

    gc.disable()  # only what nothing refers to any more is gone
    try:
        assert halving(make, [1, 2, 3]) == [[1], [2], [3]]
    finally:
        gc.enable()


def test_pytorch_is_recognised_when_it_says_so() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60)
    assert out_of_memory(refused.value)


@pytest.mark.anyio
async def test_a_request_is_answered_though_its_batch_was_too_large() -> None:
    class Small(SteppedEncoder):
        device = torch.device("cpu")

        def forward(self, rows: Sequence[Sequence[int]], skip: int) -> Any:
            if len(rows) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return np.array([[len(row)] for row in rows], np.float32)

    model = InThisProcess([cast("Any", Small())])
    embedder = LocalEmbedder(ROUGH, lambda: model, lambda: ("rough", EXACT))
    with anyio.fail_after(10):
        made = await embedder.embed(["x", "xx", "xxx"], input_type=None, truncate="NONE")
    assert made.vectors[:, 0].tolist() == [1, 2, 3]
    await embedder.aclose()


def test_free_memory_is_given_back_after_every_so_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[int] = []
    monkeypatch.setattr(memory, "_of_glibc", {"malloc_trim": trimmed.append}.get)
    give_back = Returning()
    for _ in range(3 * memory.TOKENS // 1024):
        give_back(1024)
    assert trimmed == [0, 0, 0]
    give_back(memory.TOKENS - 1)
    assert trimmed == [0, 0, 0]
    give_back(1)
    assert trimmed == [0, 0, 0, 0]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_what_a_large_tensor_leaves_is_kept_for_the_next() -> None:
    program = """
import resource, torch
from embeddings_mcp.embedders.local.memory import keep_freed
keep_freed()
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(4 * 1024 * 1024)  # 16 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(pages(), [pages() for _ in range(10)][-1])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    first, last = map(int, run.stdout.split())
    assert first > 1000
    assert last < 100


def test_giving_back_goes_with_any_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    Returning()(memory.TOKENS)
    monkeypatch.setattr("sys.platform", "darwin")
    Returning()(memory.TOKENS)
    memory.keep_freed()

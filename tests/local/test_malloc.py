"""Free memory is returned to the system now and then, and kept for the next tensor where that is faster."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from embeddings_mcp.embedders.local import malloc
from embeddings_mcp.embedders.local.malloc import TOKENS_PER_TRIM, HeapTrimmer, raise_malloc_thresholds


def test_the_heap_is_trimmed_after_a_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[int] = []
    monkeypatch.setattr(malloc, "_glibc_function", {"malloc_trim": trimmed.append}.get)
    trimmer = HeapTrimmer()
    for _ in range(3 * TOKENS_PER_TRIM // 1024):
        trimmer.add(1024)
    assert trimmed == [0, 0, 0]
    trimmer.add(TOKENS_PER_TRIM - 1)
    assert trimmed == [0, 0, 0]
    trimmer.add(1)
    assert trimmed == [0, 0, 0, 0]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_the_memory_of_a_freed_large_tensor_is_reused_by_the_next() -> None:
    program = """
import resource, torch
from embeddings_mcp.embedders.local.malloc import raise_malloc_thresholds
raise_malloc_thresholds()
def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(4 * 1024 * 1024)  # 16 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(page_faults(), [page_faults() for _ in range(10)][-1])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    first, last = map(int, run.stdout.split())
    assert first > 1000
    assert last < 100


def test_tuning_malloc_does_no_harm_with_any_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    HeapTrimmer().add(TOKENS_PER_TRIM)
    monkeypatch.setattr("sys.platform", "darwin")
    HeapTrimmer().add(TOKENS_PER_TRIM)
    raise_malloc_thresholds()

"""The in-memory cache stays within its bound, however small its rows are."""

from __future__ import annotations

import tracemalloc

import pytest

from embeddings_mcp.embedders.cache import MemoryStore
from embeddings_mcp.embedders.cache.rows import Row
from tests.cache.support import MB


@pytest.mark.parametrize("length", [32, 1536, 16_384])
def test_the_bound_covers_all_memory_of_a_row_and_not_only_its_vector(length: int) -> None:
    store = MemoryStore(4 * MB)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(8 * MB // (length + 300)):
            store.put({number.to_bytes(32, "big"): Row(bytes(length), 1000 + number)})
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.7 * 4 * MB < used < 1.1 * 4 * MB

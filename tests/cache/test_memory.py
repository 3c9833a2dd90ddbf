"""What is remembered in memory stays within its bound, however little each of it is."""

from __future__ import annotations

import tracemalloc

import pytest

from embeddings_mcp.embedders.cache import MemoryStore
from embeddings_mcp.embedders.cache.rows import Row
from tests.cache.support import MB


@pytest.mark.parametrize("length", [32, 1536, 16_384])
def test_the_bound_is_of_all_that_a_row_takes_and_not_of_its_vector_only(length: int) -> None:
    store = MemoryStore(4 * MB)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(8 * MB // (length + 300)):
            store.put({number.to_bytes(32, "big"): Row(bytes(length), 1000 + number)})
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.7 * 4 * MB < taken < 1.1 * 4 * MB

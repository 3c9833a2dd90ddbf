"""Garbage collection is paused during start-up, and on afterwards."""

from __future__ import annotations

import gc

import pytest

from embeddings_mcp.gc_pause import gc_paused


def test_garbage_is_collected_again_after_the_block_even_if_it_failed() -> None:
    with gc_paused():
        assert not gc.isenabled()
    assert gc.isenabled()

    with pytest.raises(ImportError), gc_paused():
        raise ImportError
    assert gc.isenabled()


def test_objects_made_in_the_block_are_not_scanned_again() -> None:
    with gc_paused():
        made: list[list[int]] = [[] for _ in range(1000)]
    assert gc.get_freeze_count() >= 1000
    tracked = {id(thing) for thing in gc.get_objects()}
    assert not any(id(thing) in tracked for thing in made)
    gc.unfreeze()

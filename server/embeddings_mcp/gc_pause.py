"""Pause garbage collection during start-up: scanning objects that all stay alive takes a fifth of that time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Iterator[None]:
    """Disable garbage collection in this block, and exclude all objects alive at its end from later collections.

    For blocks that import modules and load models. Nesting blocks, or running several on different threads, is
    harmless: the first to end enables collection again.
    """
    if gc.isenabled() and gc.get_freeze_count():
        # After the first time there may be garbage, such as a closed model, which freezing would keep for good.
        gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()

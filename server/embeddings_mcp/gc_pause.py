"""Much is made at a start, and all of it stays: looking through it for garbage takes a fifth of the time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Iterator[None]:
    """Collect no garbage in this block, and never look again at what there is at its end.

    For blocks that import and load. One inside another, or on another thread at the same time, does no harm: the first
    that ends has garbage collected again.
    """
    if gc.isenabled() and gc.get_freeze_count():
        # After the first time there may be garbage, a model that ended for one, which would stay for good as well.
        gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()

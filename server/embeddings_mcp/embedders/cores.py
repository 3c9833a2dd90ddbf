"""How many processor cores there are to compute on."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Those that this process may use, which in a container are often fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

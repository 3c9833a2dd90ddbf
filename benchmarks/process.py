"""CPU time and memory of other processes. Linux only: read from ``/proc``."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def process_tree(pid: int) -> list[int]:
    """A process and its descendants, started by any of their threads."""
    found = [pid]
    for process in found:  # grows during the loop
        for task in Path(f"/proc/{process}/task").glob("*/children"):
            found += map(int, task.read_text(encoding="utf-8").split())
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its descendants, including all threads."""
    return sum(map(_own_cpu_seconds, process_tree(pid)))


def resident_megabytes(pid: int) -> float:
    """Current resident memory of a process and its descendants, in MiB."""
    return sum(map(_own_resident_megabytes, process_tree(pid)))


def _own_cpu_seconds(pid: int) -> float:
    # The name, in parentheses, may contain anything.
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _own_resident_megabytes(pid: int) -> float:
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None, "a running process has VmRSS"
    return int(found[1]) / 1024


def peak_megabytes() -> float:
    """Peak resident memory of this process, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform == "linux" else peak / 1024 / 1024

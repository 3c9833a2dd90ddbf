"""Other processes: what they have used so far, and how they are ended. Linux only, by ``/proc``."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    """A process and those that it has started, whichever of its threads did, and so on."""
    found = [pid]
    for process in found:
        for task in Path(f"/proc/{process}/task").glob("*/children"):
            found += map(int, task.read_text(encoding="utf-8").split())
    return found


def cpu_seconds(pid: int) -> float:
    """Processor time that a process and its family have used, all their threads together."""
    return sum(map(_own_cpu_seconds, family(pid)))


def resident_megabytes(pid: int) -> float:
    """Memory that a process and its family hold now."""
    return sum(map(_own_resident_megabytes, family(pid)))


def _own_cpu_seconds(pid: int) -> float:
    # The name, in brackets, may hold anything.
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _own_resident_megabytes(pid: int) -> float:
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None, "a running process has VmRSS"
    return int(found[1]) / 1024


def peak_megabytes() -> float:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform == "linux" else peak / 1024 / 1024

"""Contenders in separate processes, which take turns at the same work."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.contenders import PEERS

ROOT = Path(__file__).parents[1]

PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
"""Python of the environment that `make bench-peers` creates, for peers that need other versions of our dependencies."""

_TIMEOUT_SECONDS = 600
"""Timeout for a contender to load, and for one job."""


class ContenderMissing(Exception):
    """A contender is not available on this machine."""


@dataclass(frozen=True, slots=True)
class Job:
    """A workload to embed; see `contenders.perform`."""

    workload: str
    count: int
    seed: int = 0
    apart: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """Seconds that a job took, for the median text if the texts were embedded one by one."""

    wall: float
    cpu: float
    peak_megabytes: float


class Contender:
    """A process that embeds.

    Args:
        name: one of `contenders.CONTENDERS`.
        folder: of the model.
        threads: number of compute threads.

    Attributes:
        load_seconds: time to import its libraries and load the model.

    Raises:
        ContenderMissing: it did not start.
    """

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        if name in PEERS and not PEERS_PYTHON.exists():
            raise ContenderMissing(f"{name}: no {PEERS_PYTHON.parent.parent.name}; `make bench-peers` makes it")
        self.name = name
        self._process = subprocess.Popen(
            [
                str(PEERS_PYTHON) if name in PEERS else sys.executable,
                "-m",
                "benchmarks.contenders",
                name,
                str(folder),
                str(threads),
            ],
            cwd=ROOT,
            env=environment(threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._stderr_lines: list[str] = []
        self._stderr_reader = threading.Thread(target=self._read_stderr, daemon=True)
        self._stderr_reader.start()
        try:
            self.load_seconds: float = self._answer()["load"]
        except ContenderMissing:
            self.close()
            raise

    def perform(self, job: Job, *, save: Path | None = None) -> Result:
        """Run a job; its vectors are written to `save`, if given."""
        assert self._process.stdin is not None
        request = {"workload": job.workload, "count": job.count, "seed": job.seed, "apart": job.apart}
        self._process.stdin.write(json.dumps({**request, "save": str(save) if save else None}) + "\n")
        self._process.stdin.flush()
        return Result(**self._answer())

    def close(self) -> None:
        """Kill the process; some would wait forever for their threads."""
        with self._process:
            self._process.kill()
            self._stderr_reader.join()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        watchdog = threading.Timer(_TIMEOUT_SECONDS, self._process.kill)
        watchdog.start()
        line = self._process.stdout.readline()
        watchdog.cancel()
        if not line:
            self._process.wait()
            raise ContenderMissing(
                f"{self.name}: {self._stderr_lines[-1] if self._stderr_lines else 'exited without output'}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        self._stderr_lines.extend(line.strip() for line in self._process.stderr if line.strip())


@contextlib.contextmanager
def contenders(names: Sequence[str], folder: Path, threads: int) -> Iterator[tuple[list[Contender], list[str]]]:
    """Start these contenders; yields those that are available, and for each of the others a reason."""
    present: list[Contender] = []
    missing: list[str] = []
    try:
        for name in names:
            try:
                present.append(Contender(name, folder, threads))
            except ContenderMissing as error:
                missing.append(str(error))
        yield present, missing
    finally:
        for contender in present:
            contender.close()


def take_turns(present: Sequence[Contender], job: Job, rounds: int) -> dict[str, list[Result]]:
    """Run a job with each contender in each round; the first of a round is the last of the next.

    All contenders get the same texts in a round, and different ones in the next.
    """
    for contender in present:
        contender.perform(replace(job, count=max(1, job.count // 8), seed=rounds))  # warm-up
    results: dict[str, list[Result]] = {contender.name: [] for contender in present}
    order = list(present)
    for round_ in range(rounds):
        for contender in order:
            results[contender.name].append(contender.perform(replace(job, seed=round_)))
        order.append(order.pop(0))
    return results


def median(results: Sequence[Result]) -> Result:
    """Medians of the times, and the largest peak of memory."""
    return Result(
        wall=statistics.median(result.wall for result in results),
        cpu=statistics.median(result.cpu for result in results),
        peak_megabytes=max(result.peak_megabytes for result in results),
    )


@dataclass(frozen=True, slots=True)
class SpeedUp:
    """Ratio of our speed to theirs, by wall time and by CPU time."""

    wall: float
    cpu: float


def speed_up(ours: Sequence[Result], theirs: Sequence[Result]) -> SpeedUp:
    """Median of the ratios of each round, in which both had about the same load from others on the machine."""
    pairs = list(zip(ours, theirs, strict=True))
    return SpeedUp(
        wall=statistics.median(their.wall / our.wall for our, their in pairs),
        cpu=statistics.median(their.cpu / our.cpu for our, their in pairs),
    )


def environment(threads: int) -> Mapping[str, str]:
    """Environment variables that set the number of threads, and turn off usage statistics and access to the hub."""
    count = str(threads)
    return {
        **os.environ,
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "RAYON_NUM_THREADS": count,
        "HF_HUB_OFFLINE": "1",
        "INFINITY_ANONYMOUS_USAGE_STATS": "0",
        "DO_NOT_TRACK": "1",
    }


def float32_peak(threads: int, *, square: int) -> float:
    """Highest FLOP/s of this number of threads: all on one matrix product, or each on its own."""
    shared = _total_peak(1, threads, square)
    return max(shared, _total_peak(threads, 1, square)) if threads > 1 else shared


def _total_peak(processes: int, threads: int, square: int) -> float:
    """Total FLOP/s of concurrent processes with this number of threads each."""
    command = [sys.executable, "-m", "benchmarks.peak", str(threads), str(square)]
    running = [
        subprocess.Popen(command, cwd=ROOT, env=environment(threads), stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    return sum(float(process.communicate(timeout=_TIMEOUT_SECONDS)[0]) for process in running)

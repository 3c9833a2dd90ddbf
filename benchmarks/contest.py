"""Contenders in processes of their own, taking turns at the same work."""

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
"""The environment that `make bench-peers` makes, for peers that want other versions of what we use."""

_SECONDS = 600
"""Longest that a contender may take to load, or for one job."""


class ContenderMissing(Exception):
    """A contender cannot be had on this machine."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be embedded; see `contenders.perform`."""

    workload: str
    count: int
    seed: int = 0
    apart: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What a job took: seconds, of the median text where they came apart."""

    wall: float
    cpu: float
    peak_megabytes: float


class Contender:
    """A process that embeds.

    Args:
        name: one of `contenders.CONTENDERS`.
        folder: the model.
        threads: how many it may compute on.

    Attributes:
        load_seconds: how long it took to import and load what it needs.

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
        self._said: list[str] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        try:
            self.load_seconds: float = self._answer()["load"]
        except ContenderMissing:
            self.close()
            raise

    def perform(self, job: Job, *, save: Path | None = None) -> Result:
        """Have a job done, and its vectors written to a file if one is given."""
        assert self._process.stdin is not None
        asked = {"workload": job.workload, "count": job.count, "seed": job.seed, "apart": job.apart}
        self._process.stdin.write(json.dumps({**asked, "save": str(save) if save else None}) + "\n")
        self._process.stdin.flush()
        return Result(**self._answer())

    def close(self) -> None:
        """End the process; some wait at their end for threads that never do."""
        with self._process:
            self._process.kill()
            self._listener.join()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        watchdog = threading.Timer(_SECONDS, self._process.kill)
        watchdog.start()
        line = self._process.stdout.readline()
        watchdog.cancel()
        if not line:
            self._process.wait()
            raise ContenderMissing(f"{self.name}: {self._said[-1] if self._said else 'ended without a word'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _listen(self) -> None:
        assert self._process.stderr is not None
        self._said.extend(line.strip() for line in self._process.stderr if line.strip())


@contextlib.contextmanager
def contenders(names: Sequence[str], folder: Path, threads: int) -> Iterator[tuple[list[Contender], list[str]]]:
    """Those of these contenders that there are, and why there are no others."""
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
    """What the job took each contender in each round; who began a round ends the next.

    All have the same texts in a round, and others in the next.
    """
    for contender in present:
        contender.perform(replace(job, count=max(1, job.count // 8), seed=rounds))  # to warm up
    results: dict[str, list[Result]] = {contender.name: [] for contender in present}
    order = list(present)
    for round_ in range(rounds):
        for contender in order:
            results[contender.name].append(contender.perform(replace(job, seed=round_)))
        order.append(order.pop(0))
    return results


def median(results: Sequence[Result]) -> Result:
    """The median of each figure."""
    return Result(
        wall=statistics.median(result.wall for result in results),
        cpu=statistics.median(result.cpu for result in results),
        peak_megabytes=max(result.peak_megabytes for result in results),
    )


@dataclass(frozen=True, slots=True)
class SpeedUp:
    """How many times our speed is theirs, by the clock on the wall and in processor time."""

    wall: float
    cpu: float


def speed_up(ours: Sequence[Result], theirs: Sequence[Result]) -> SpeedUp:
    """The median over the rounds, in each of which both had the same neighbours on the machine."""
    pairs = list(zip(ours, theirs, strict=True))
    return SpeedUp(
        wall=statistics.median(their.wall / our.wall for our, their in pairs),
        cpu=statistics.median(their.cpu / our.cpu for our, their in pairs),
    )


def environment(threads: int) -> Mapping[str, str]:
    """Environment variables under which a library computes on so many threads, and neither calls home nor a hub."""
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
    """FLOP/s that so many threads reach: sharing one product or, if that is more, each at one of its own."""
    shared = _peaks(1, threads, square)
    return max(shared, _peaks(threads, 1, square)) if threads > 1 else shared


def _peaks(processes: int, threads: int, square: int) -> float:
    """FLOP/s of so many processes at once, each of so many threads."""
    command = [sys.executable, "-m", "benchmarks.peak", str(threads), str(square)]
    running = [
        subprocess.Popen(command, cwd=ROOT, env=environment(threads), stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    return sum(float(process.communicate(timeout=_SECONDS)[0]) for process in running)

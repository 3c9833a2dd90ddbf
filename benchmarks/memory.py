"""Memory use of one call and of a busy server: ``python -m benchmarks.memory``."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import orjson

from benchmarks.contest import ContenderMissing, Job, contenders
from benchmarks.load import post_all
from benchmarks.machine import cores, describe
from benchmarks.process import resident_megabytes
from benchmarks.servers import Server, our_server
from benchmarks.table import number, ratio, show
from benchmarks.workloads import texts
from embeddings_mcp.embedders.local.locate import locate
from embeddings_mcp.models import DEFAULT_MODEL

PEER = "sentence-transformers"

_CALLERS = 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure peak and growth."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="duration of the load on the server (default: 10)")
    parser.add_argument("--tiny", action="store_true", help="only a few texts, to check that it runs")
    options = parser.parse_args(arguments)
    print(f"## Memory\n\n{describe()}")
    _show_peaks(*((["ours, served"], [10, 20]) if options.tiny else (["ours, served", PEER], [1000, 10_000])))
    _show_growth(0.05 if options.tiny else options.minutes)


def _show_peaks(names: Sequence[str], counts: Sequence[int]) -> None:
    """Print the peak memory of new processes for a few texts and for many."""
    folder = locate(DEFAULT_MODEL, DEFAULT_MODEL)
    rows = []
    notes = [
        f"aim: at most 1.30x; texts of mixed length (8-256 tokens), {cores()} cores; a new process for each figure"
    ]
    for name in names:
        peaks = [_peak(name, folder, count) for count in counts]
        rows.append([name, *map(number, peaks), ratio(peaks[-1] / peaks[0])])
    header = ["", *(f"{count:,} texts, MB" for count in counts), "grows by"]
    show("Peak memory of one call with many texts", header, rows, *notes)


def _peak(name: str, folder: Path, count: int) -> float:
    with contenders([name], folder, cores()) as (present, missing):
        if missing:
            raise ContenderMissing(*missing)
        return present[0].perform(Job("mixed", count)).peak_megabytes


def _show_growth(minutes: float) -> None:
    """Print the server's memory under constant load of requests of all sizes, for each sixth of the time."""
    with our_server() as server:
        sizes: list[tuple[float, float]] = []
        started = time.monotonic()
        seed = requests = 0
        while (elapsed := time.monotonic() - started) < minutes * 60:
            seed += 1
            bodies = _bodies(server, seed)
            asyncio.run(post_all(server.url, bodies, _CALLERS))
            requests += len(bodies)
            sizes.append((elapsed / (minutes * 60), resident_megabytes(server.pid)))
    sixths = [[size for at, size in sizes if sixth <= at * 6 < sixth + 1] for sixth in range(6)]
    row = ["resident, MB (median)", *(number(statistics.median(sixth)) if sixth else "-" for sixth in sixths)]
    header = ["", *(f"{sixth}/6" for sixth in range(1, 7))]
    show(
        f"Memory of the server over {minutes:g} minutes",
        header,
        [row],
        f"{requests:,} requests of {_CALLERS} concurrent callers: queries, and 1 to 64 texts of mixed length; never "
        "the same text twice, and no cache",
        "aim: the last no larger than the second",
    )


def _bodies(server: Server, seed: int) -> list[bytes]:
    inputs: list[str | list[str]] = [*texts("query", 32, seed=seed)]
    mixed = texts("mixed", 85, seed=seed)
    inputs += [mixed[:64], mixed[64:80], mixed[80:84], mixed[84:]]
    return [orjson.dumps({"model": server.model, "input": each, "truncate": "END"}) for each in inputs]


if __name__ == "__main__":
    main()

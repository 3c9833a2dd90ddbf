"""Time from the start of a process to its first response: ``python -m benchmarks.start``."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.contest import ROOT, environment
from benchmarks.machine import cores, describe
from benchmarks.table import number, ratio, show
from embeddings_mcp.embedders.local.locate import find_bundled
from embeddings_mcp.models import DEFAULT_MODEL

_TIMEOUT_SECONDS = 120
"""Timeout for a start."""

_TEXT = "How do I reset my password?"

_ENVELOPE = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "benchmark", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}

_SENTENCE_TRANSFORMERS = (
    "import sys; from sentence_transformers import SentenceTransformer; "
    "print(SentenceTransformer(sys.argv[1], device='cpu').encode(sys.argv[2])[0])"
)


@dataclass(frozen=True, slots=True)
class _Start:
    """A program and its first request.

    Attributes:
        name: in tables.
        command: of the program.
        request: written to its stdin; the first line on its stdout is the response.
    """

    name: str
    command: Sequence[str]
    request: str


def _mcp(method: str, **parameters: object) -> str:
    request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {**parameters, "_meta": _ENVELOPE}}
    return json.dumps(request) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Start all programs in turns."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="starts of each program (default: 7)")
    parser.add_argument("--tiny", action="store_true", help="only our own programs, to check that it runs")
    options = parser.parse_args(arguments)
    print(f"## Startup\n\n{describe()}")
    python, ours = sys.executable, [sys.executable, "-m", "embeddings_mcp"]
    _contest(
        "From process start to the response to tools/list, over stdio",
        [
            _Start("ours", [*ours, "serve"], _mcp("tools/list")),
            _Start("a bare mcp server with one tool", [python, "-m", "tests.e2e.bare_server"], _mcp("tools/list")),
        ],
        options.rounds,
        "aim: at most 1.50x",
    )
    call = _mcp("tools/call", name="create_embedding", arguments={"model": "default", "input": _TEXT})
    folder = str(find_bundled(DEFAULT_MODEL))
    peer = _Start("sentence-transformers", [python, "-c", _SENTENCE_TRANSFORMERS, folder, _TEXT], "")
    _contest(
        "From process start to the first vector",
        [
            _Start("ours, MCP over stdio", [*ours, "serve"], call),
            _Start("ours, from the command line", [*ours, "embed", "--json", _TEXT], ""),
            *([] if options.tiny else [peer]),
        ],
        options.rounds,
        "aim: at most 0.50x",
    )


def _contest(title: str, starts: Sequence[_Start], rounds: int, *notes: str) -> None:
    """Compare the programs with the last one."""
    for start in starts:
        _measure(start)  # warm-up: fills the file system cache
    measured: dict[str, list[tuple[float, float]]] = {start.name: [] for start in starts}
    order = list(starts)
    for _ in range(rounds):
        for start in order:
            measured[start.name].append(_measure(start))
        order.append(order.pop(0))
    peer = measured[starts[-1].name]
    rows = []
    for name, times in measured.items():
        wall, cpu = (statistics.median(values) for values in zip(*times, strict=True))
        by_wall, by_cpu = (
            statistics.median(our[kind] / their[kind] for our, their in zip(times, peer, strict=True))
            for kind in (0, 1)
        )
        rows.append([name, number(wall), number(cpu), ratio(by_wall), ratio(by_cpu)])
    header = ["", "wall s", "CPU s", f"x {starts[-1].name}", "in CPU time"]
    show(title, header, rows, *notes, f"medians of {rounds} starts; CPU time also counts the process's end")


def _measure(start: _Start) -> tuple[float, float]:
    """Seconds until the response, and the CPU seconds of the whole process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    with subprocess.Popen(
        start.command,
        cwd=ROOT,
        env={**environment(cores()), "EMBEDDINGS_MCP_CACHE": "off"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        watchdog = threading.Timer(_TIMEOUT_SECONDS, process.kill)
        watchdog.start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(start.request)
        process.stdin.flush()
        answer = process.stdout.readline()
        seconds = time.perf_counter() - started
        process.communicate()
        watchdog.cancel()
    if not answer or '"error"' in answer or '"isError":true' in answer:
        raise RuntimeError(f"{start.name} answered {answer[:500]!r}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()

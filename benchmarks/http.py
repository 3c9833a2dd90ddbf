"""Our HTTP server compared with infinity-emb's, and the overhead of serving: ``python -m benchmarks.http``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from benchmarks import accounting
from benchmarks.contest import PEERS_PYTHON, ContenderMissing
from benchmarks.load import Load, post_all
from benchmarks.machine import describe
from benchmarks.process import cpu_seconds
from benchmarks.servers import Server, infinity_server, our_server
from benchmarks.table import number, ratio, show
from benchmarks.workloads import texts
from embeddings_mcp.embedders.local.locate import locate
from embeddings_mcp.models import DEFAULT_MODEL

CALLERS = 64


@dataclass(frozen=True, slots=True)
class _Round:
    """Result of a load test, and the server's CPU seconds per request."""

    load: Load
    cpu: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure throughput and overhead."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each server (default: 5)")
    parser.add_argument("--tiny", action="store_true", help="only a few requests, to check that it runs")
    options = parser.parse_args(arguments)
    print(f"## Serving over HTTP\n\n{describe()}")
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(our_server())]
        folder = locate(DEFAULT_MODEL, DEFAULT_MODEL)
        missing = []
        for engine in () if options.tiny else ("torch", "optimum"):
            try:
                model = folder if engine == "torch" else PEERS_PYTHON.parents[1] / "minilm-onnx"
                servers.append(stack.enter_context(infinity_server(model, engine)))
            except ContenderMissing as error:
                missing.append(str(error))
        _show_many_callers(servers, missing, options.rounds, 128 if options.tiny else 2000)
    _show_share(options.rounds, requests=2 if options.tiny else 20, at_once=5 if options.tiny else 100)


def _show_many_callers(servers: Sequence[Server], missing: Sequence[str], rounds: int, requests: int) -> None:
    done: dict[str, list[_Round]] = {server.name: [] for server in servers}
    order = list(servers)
    for server in servers:
        _run_round(server, requests // 4, seed=0)  # warm-up
    for seed in range(1, rounds + 1):
        for server in order:
            done[server.name].append(_run_round(server, requests, seed))
        order.append(order.pop(0))
    ours = done[servers[0].name]
    rows = []
    for name, turns in done.items():
        rates = [our.load.rate / their.load.rate for our, their in zip(ours, turns, strict=True)]
        rows.append(
            [
                name,
                number(statistics.median(turn.load.rate for turn in turns)),
                *(number(statistics.median(turn.load.percentile(at) for turn in turns) * 1000) for at in (50, 99)),
                number(statistics.median(turn.cpu for turn in turns) * 1000),
                ratio(statistics.median(rates)),
            ]
        )
    header = ["", "requests/s", "p50 ms", "p99 ms", "CPU ms a request", "ours is faster by"]
    show(
        f"{CALLERS} concurrent callers, each with one short text (6-16 tokens) at a time",
        header,
        rows,
        "aim: at least 2.00x, at no worse p99; the callers run on the same cores as the server",
        *(f"missing: {reason}" for reason in missing),
    )


def _run_round(server: Server, requests: int, seed: int) -> _Round:
    bodies = [orjson.dumps({"model": server.model, "input": text}) for text in texts("query", requests, seed=seed)]
    before = cpu_seconds(server.pid)
    load = asyncio.run(post_all(server.url, bodies, CALLERS))
    return _Round(load, (cpu_seconds(server.pid) - before) / requests)


def _show_share(rounds: int, requests: int, at_once: int) -> None:
    """Measure the server's CPU time that is not spent on tokenizing or encoding."""
    with tempfile.TemporaryDirectory() as folder:
        account = Path(folder) / "account"
        # Tokenize on the thread whose time is counted, and run the model in the server's process.
        settings = {"TOKENIZERS_PARALLELISM": "false", "EMBEDDINGS_MCP_MODEL_PROCESS": "false"}
        command = ("-m", "benchmarks.accounting", str(account))
        rows = []
        with our_server(command=command, settings=settings) as server:
            for workload in ("short", "mixed"):
                for encoding_format in ("base64", "float"):
                    batches = [
                        _bodies(workload, encoding_format, requests, at_once, seed) for seed in range(rounds + 1)
                    ]
                    turns = [_share(server, account, bodies) for bodies in batches][1:]  # the first is the warm-up
                    total, serving, size = (statistics.median(figures) for figures in zip(*turns, strict=True))
                    rows.append(
                        [
                            f"{workload} texts, {encoding_format}",
                            number(total * 1000),
                            number(serving * 1000),
                            f"{serving / total:.1%}",
                            number(size / 1000),
                        ]
                    )
    header = ["", "CPU ms a request", "of it for serving", "share", "answer, kB"]
    show(
        f"Overhead of serving: {at_once} texts of 384 dimensions per request, one request at a time",
        header,
        rows,
        "aim: at most 15 % in either form; serving is all that is neither tokenizing nor encoding",
    )


def _bodies(workload: str, encoding_format: str, requests: int, at_once: int, seed: int) -> list[bytes]:
    flat = texts(workload, requests * at_once, seed=seed)
    inputs = [flat[start : start + at_once] for start in range(0, len(flat), at_once)]
    options = {"model": "default", "encoding_format": encoding_format, "truncate": "END"}
    return [orjson.dumps({**options, "input": batch}) for batch in inputs]


def _share(server: Server, account: Path, bodies: Sequence[bytes]) -> tuple[float, float, float]:
    """Per request: total CPU seconds, CPU seconds of serving, and bytes of the response."""
    before = accounting.read(server.pid, account)
    load = asyncio.run(post_all(server.url, bodies, callers=1))
    after = accounting.read(server.pid, account)
    total, computing = after[0] - before[0], after[1] - before[1]
    requests = len(bodies)
    return total / requests, (total - computing) / requests, load.bytes_ / requests


if __name__ == "__main__":
    main()

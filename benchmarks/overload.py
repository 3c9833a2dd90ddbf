"""Throughput and refusals under overload: ``python -m benchmarks.overload``.

First, a fixed number of callers, each with one request at a time, determine the server's capacity. Then requests arrive
at a constant rate of one, two and ten times the capacity, whether or not earlier ones have completed. Refused callers
retry after the time in Retry-After.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import orjson

from benchmarks.load import percentile, post_all
from benchmarks.machine import describe
from benchmarks.servers import Server, our_server
from benchmarks.table import number, show
from benchmarks.workloads import texts

_TEXTS = 32
"""Texts per request."""

_SETTINGS = {"EMBEDDINGS_MCP_MAX_QUEUED_TOKENS": "10000"}
"""A queue that is full within seconds; with the default, nobody would be refused for minutes."""

_CAPACITY_CALLERS = 8
"""Concurrent callers that determine the capacity."""

_MIN_REQUESTS = 4
"""Minimum number of requests at the slowest rate: ten times as many exceed the queue."""

_TIMEOUT_SECONDS = 600
"""Timeout for all requests of one rate to complete."""

_REFUSED = frozenset({429, 503})


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One attempt at a request.

    Attributes:
        status: of the response.
        began: when it was sent, by the performance counter.
        ended: when the response was complete.
        retry_after: seconds in the response's Retry-After.
    """

    status: int
    began: float
    ended: float
    retry_after: int


@dataclass(slots=True)
class _Arrivals:
    """The requests that arrived at one rate.

    Attributes:
        began: when the first was sent, by the performance counter.
        ended: end of the period in which they arrived.
        attempts: of each request, until it completed.
    """

    began: float
    ended: float
    attempts: list[list[_Attempt]] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the capacity, and the behavior beyond it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload", description=__doc__)
    parser.add_argument("--seconds", type=float, default=6, help="duration of each rate (default: 6)")
    parser.add_argument("--tiny", action="store_true", help="a fraction of a second each, to check that it runs")
    options = parser.parse_args(arguments)
    seconds = 0.3 if options.tiny else options.seconds
    print(f"## Overload\n\n{describe()}")
    with our_server(settings=_SETTINGS) as server:
        bodies = _bodies(server)
        capacity = _capacity(server, bodies, seconds)
        seconds = max(seconds, _MIN_REQUESTS / capacity)
        rows = [
            _row(factor, capacity, asyncio.run(_offer(server, bodies, factor * capacity, seconds)))
            for factor in (1, 2, 10)
        ]
    header = [
        "rate",
        "texts/s offered",
        "throughput",
        "of capacity",
        "requests refused",
        "time to refusal, ms, p50 / p99",
    ]
    header += ["Retry-After", "retries completed"]
    show(
        f"Requests of {_TEXTS} short texts (5-30 tokens), {seconds:g} s at each rate",
        header,
        rows,
        f"capacity: {capacity * _TEXTS:,.0f} texts/s, of {_CAPACITY_CALLERS} callers with one request at a time",
        "aim: at least 90 % of capacity, refused within 50 ms; retries after Retry-After complete",
        "the callers run on the same cores as the server",
    )


def _bodies(server: Server) -> Iterator[bytes]:
    """Endless sequence of requests, each with different texts."""
    for seed in itertools.count():
        many = texts("short", _TEXTS * 64, seed=seed)
        for start in range(0, len(many), _TEXTS):
            yield orjson.dumps(
                {"model": server.model, "encoding_format": "base64", "input": many[start : start + _TEXTS]}
            )


def _capacity(server: Server, bodies: Iterator[bytes], seconds: float) -> float:
    """Capacity in requests per second."""
    asyncio.run(post_all(server.url, list(itertools.islice(bodies, _CAPACITY_CALLERS)), _CAPACITY_CALLERS))  # warm-up
    rates: list[float] = []
    deadline = time.perf_counter() + 3 * seconds
    while time.perf_counter() < deadline:
        batch = list(itertools.islice(bodies, 4 * _CAPACITY_CALLERS))
        rates.append(asyncio.run(post_all(server.url, batch, _CAPACITY_CALLERS)).rate)
    return statistics.median(rates)


async def _offer(server: Server, bodies: Iterator[bytes], per_second: float, seconds: float) -> _Arrivals:
    """Send requests at a constant rate, and retry each until it completes."""
    prepared = list(itertools.islice(bodies, max(1, round(per_second * seconds))))
    began = time.perf_counter()
    arrivals = _Arrivals(began, began + seconds)

    async def send(position: int, body: bytes) -> None:
        await asyncio.sleep(max(0.0, began + position / per_second - time.perf_counter()))
        attempts: list[_Attempt] = []
        arrivals.attempts.append(attempts)
        while not attempts or attempts[-1].status in _REFUSED:
            if attempts:
                await asyncio.sleep(attempts[-1].retry_after)
            attempts.append(await _post(server.url, body))

    async with asyncio.timeout(_TIMEOUT_SECONDS), asyncio.TaskGroup() as requests:
        for position, body in enumerate(prepared):
            requests.create_task(send(position, body))
    return arrivals


async def _post(url: str, body: bytes) -> _Attempt:
    """Send one request on its own connection.

    Raises:
        RuntimeError: the response is neither 200 nor a refusal with a Retry-After.
    """
    target = urlsplit(url)
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(target.hostname, target.port)
    head = f"POST {target.path} HTTP/1.1\r\nHost: {target.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    answer = await reader.read()
    ended = time.perf_counter()
    writer.close()
    lines = answer.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    status = int(lines[0].split(" ")[1])
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    if status != 200 and not (status in _REFUSED and "retry-after" in headers):
        raise RuntimeError(answer[:500].decode(errors="replace"))
    return _Attempt(status, began, ended, int(headers.get("retry-after", 0)))


def _row(factor: int, capacity: float, arrivals: _Arrivals) -> list[str]:
    """The table row of one rate."""
    # A request that ended after the period counts by the fraction of it that lies within.
    within = (
        min(1.0, (arrivals.ended - attempts[-1].began) / (attempts[-1].ended - attempts[-1].began))
        for attempts in arrivals.attempts
    )
    rate = sum(part for part in within if part > 0) / (arrivals.ended - arrivals.began)
    refusals = sorted(
        attempt.ended - attempt.began
        for attempts in arrivals.attempts
        for attempt in attempts
        if attempt.status in _REFUSED
    )
    back = [attempts for attempts in arrivals.attempts if len(attempts) > 1]
    waits = [attempts[0].retry_after for attempts in back]
    return [
        f"{factor} x",
        number(factor * capacity * _TEXTS),
        f"{rate * _TEXTS:,.0f} texts/s",
        f"{rate / capacity:.0%}",
        f"{len(back):,} of {len(arrivals.attempts):,}",
        f"{percentile(refusals, 50) * 1000:.1f} / {percentile(refusals, 99) * 1000:.1f}" if refusals else "-",
        f"after {min(waits)} to {max(waits)} s" if back else "-",
        f"{sum(attempts[1].status == 200 for attempts in back):,} of {len(back):,}" if back else "-",
    ]


if __name__ == "__main__":
    main()

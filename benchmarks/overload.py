"""More than the machine can do: what is still answered, and how the rest is refused: ``python -m benchmarks.overload``.

First as many callers as keep the server busy, each with one request after the other: that is its capacity. Then
requests come in at an even pace, at once, twice and ten times as fast as that, whether or not the others were answered.
Who is refused keeps to the Retry-After that he was given.
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
"""Texts in a request."""

_SETTINGS = {"EMBEDDINGS_MCP_MAX_QUEUED_TOKENS": "10000"}
"""A queue of seconds, where the default is one of minutes, in which nobody would be refused for as long."""

_BUSY = 8
"""Callers that keep the server busy."""

_LEAST = 4
"""Requests, at least, that come in at the slowest pace: ten times as many are more than the queue holds."""

_SECONDS = 600
"""Longest that a pace may take until everybody has his answer."""

_REFUSED = frozenset({429, 503})


@dataclass(frozen=True, slots=True)
class _Try:
    """A request's way to its answer.

    Attributes:
        status: of the answer.
        began: when it was sent, by the performance counter.
        ended: when its answer was there.
        retry_after: seconds that the answer asked for.
    """

    status: int
    began: float
    ended: float
    retry_after: int


@dataclass(slots=True)
class _Pace:
    """What became of the requests that came in at one pace.

    Attributes:
        began: when the first was sent, by the performance counter.
        ended: when the last was due.
        tries: of each request, until it was answered.
    """

    began: float
    ended: float
    tries: list[list[_Try]] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the capacity, and what happens beyond it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=6, help="for which requests come in at each pace; 6 if not set"
    )
    parser.add_argument("--tiny", action="store_true", help="a moment of each, to see that it runs")
    options = parser.parse_args(arguments)
    seconds = 0.3 if options.tiny else options.seconds
    print(f"## More than the machine can do\n\n{describe()}")
    with our_server(settings=_SETTINGS) as server:
        bodies = _bodies(server)
        capacity = _capacity(server, bodies, seconds)
        seconds = max(seconds, _LEAST / capacity)
        rows = [
            _row(factor, capacity, asyncio.run(_come_in(server, bodies, factor * capacity, seconds)))
            for factor in (1, 2, 10)
        ]
    header = ["pace", "texts/s offered", "answered meanwhile", "of capacity", "refused", "within ms, p50 / p99"]
    header += ["asked back", "answered when they came back"]
    show(
        f"Requests of {_TEXTS} short texts (5-30 tokens), {seconds:g} s at each pace",
        header,
        rows,
        f"capacity: {capacity * _TEXTS:,.0f} texts/s, of {_BUSY} callers with one request after the other",
        "aim: at least 90 % of capacity, refused within 50 ms; who keeps to his Retry-After is answered",
        "the callers run on the same cores as the server",
    )


def _bodies(server: Server) -> Iterator[bytes]:
    """Requests without end, each of other texts."""
    for seed in itertools.count():
        many = texts("short", _TEXTS * 64, seed=seed)
        for start in range(0, len(many), _TEXTS):
            yield orjson.dumps(
                {"model": server.model, "encoding_format": "base64", "input": many[start : start + _TEXTS]}
            )


def _capacity(server: Server, bodies: Iterator[bytes], seconds: float) -> float:
    """Requests a second."""
    asyncio.run(post_all(server.url, list(itertools.islice(bodies, _BUSY)), _BUSY))  # to warm up
    rates: list[float] = []
    ends = time.perf_counter() + 3 * seconds
    while time.perf_counter() < ends:
        rates.append(asyncio.run(post_all(server.url, list(itertools.islice(bodies, 4 * _BUSY)), _BUSY)).rate)
    return statistics.median(rates)


async def _come_in(server: Server, bodies: Iterator[bytes], per_second: float, seconds: float) -> _Pace:
    """Send requests at an even pace, and see each of them through to its answer."""
    ready = list(itertools.islice(bodies, max(1, round(per_second * seconds))))
    began = time.perf_counter()
    pace = _Pace(began, began + seconds)

    async def see_through(place: int, body: bytes) -> None:
        await asyncio.sleep(max(0.0, began + place / per_second - time.perf_counter()))
        tries: list[_Try] = []
        pace.tries.append(tries)
        while not tries or tries[-1].status in _REFUSED:
            if tries:
                await asyncio.sleep(tries[-1].retry_after)
            tries.append(await _post(server.url, body))

    async with asyncio.timeout(_SECONDS), asyncio.TaskGroup() as requests:
        for place, body in enumerate(ready):
            requests.create_task(see_through(place, body))
    return pace


async def _post(url: str, body: bytes) -> _Try:
    """One request on a connection of its own.

    Raises:
        RuntimeError: the answer is neither what was asked for nor a refusal with a time to come back.
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
    return _Try(status, began, ended, int(headers.get("retry-after", 0)))


def _row(factor: int, capacity: float, pace: _Pace) -> list[str]:
    """A pace in figures."""
    # What was begun in the rush and ended after it counts by the part that lies in it.
    within = (min(1.0, (pace.ended - tries[-1].began) / (tries[-1].ended - tries[-1].began)) for tries in pace.tries)
    rate = sum(part for part in within if part > 0) / (pace.ended - pace.began)
    refusals = sorted(
        attempt.ended - attempt.began for tries in pace.tries for attempt in tries if attempt.status in _REFUSED
    )
    back = [tries for tries in pace.tries if len(tries) > 1]
    waits = [tries[0].retry_after for tries in back]
    return [
        f"{factor} x",
        number(factor * capacity * _TEXTS),
        f"{rate * _TEXTS:,.0f} texts/s",
        f"{rate / capacity:.0%}",
        f"{len(back):,} of {len(pace.tries):,}",
        f"{percentile(refusals, 50) * 1000:.1f} / {percentile(refusals, 99) * 1000:.1f}" if refusals else "-",
        f"after {min(waits)} to {max(waits)} s" if back else "-",
        f"{sum(tries[1].status == 200 for tries in back):,} of {len(back):,}" if back else "-",
    ]


if __name__ == "__main__":
    main()

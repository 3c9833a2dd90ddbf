"""A minimal HTTP load generator: it shares the machine with the server under test, so it must use little CPU time."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

_TIMEOUT_SECONDS = 300
"""Timeout for all callers together."""


@dataclass(frozen=True, slots=True)
class Load:
    """The result of a load test.

    Attributes:
        seconds: from the first request to the last response.
        latencies: seconds of each request, ascending.
        bytes_: total size of the response bodies.
    """

    seconds: float
    latencies: Sequence[float]
    bytes_: int

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self.latencies) / self.seconds

    def percentile(self, percent: float) -> float:
        """Latency in seconds at this percentile."""
        return percentile(self.latencies, percent)


def percentile(ascending: Sequence[float], percent: float) -> float:
    """The value at this percentile, by the nearest-rank method."""
    return ascending[max(0, math.ceil(len(ascending) * percent / 100) - 1)]


async def post_all(url: str, bodies: Sequence[bytes], callers: int) -> Load:
    """Post JSON bodies; each caller sends the next one as soon as it has a response.

    Args:
        url: an ``http`` address.
        bodies: of the requests; each is sent once.
        callers: number of persistent connections.

    Raises:
        RuntimeError: a response is not 200.
    """
    target = urlsplit(url)
    host, port = target.hostname or "", target.port or 80
    head = f"POST {target.path} HTTP/1.1\r\nHost: {target.netloc}\r\nContent-Type: application/json\r\nContent-Length: "
    requests = [head.encode() + str(len(body)).encode() + b"\r\n\r\n" + body for body in reversed(bodies)]
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(_TIMEOUT_SECONDS):
        connected = [(await loop.create_connection(lambda: _Caller(requests), host, port))[1] for _ in range(callers)]
        started = time.perf_counter()
        for caller in connected:
            caller.next()
        await asyncio.gather(*(caller.done for caller in connected))
        seconds = time.perf_counter() - started
    latencies = sorted(latency for caller in connected for latency in caller.latencies)
    return Load(seconds, latencies, sum(caller.bytes_ for caller in connected))


class _Caller(asyncio.Protocol):
    """One connection. It reads responses with a Content-Length or chunked encoding."""

    def __init__(self, requests: list[bytes]) -> None:
        self.latencies: list[float] = []
        self.bytes_ = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._requests = requests
        self._received = b""
        self._sent_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def next(self) -> None:
        """Send the next request, or close the connection if there is none."""
        if self._requests:
            self._sent_at = time.perf_counter()
            self._transport.write(self._requests.pop())
        else:
            self._transport.close()
            self.done.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        if not blank:
            return
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if len(body) < int(length) if length else not body.endswith(b"0\r\n\r\n"):
            return
        if b" 200 " not in head[:20]:
            self.done.set_exception(RuntimeError(self._received[:500].decode(errors="replace")))
            self._transport.close()
            return
        self.latencies.append(time.perf_counter() - self._sent_at)
        self.bytes_ += len(body)
        self._received = b""
        self.next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or RuntimeError("the server hung up"))

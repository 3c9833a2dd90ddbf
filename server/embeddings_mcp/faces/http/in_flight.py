"""How much may be in flight at once: requests, and the bytes of their bodies."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from http import HTTPStatus

import anyio
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope

from embeddings_mcp import telemetry
from embeddings_mcp.errors import PayloadTooLarge, TooBusy
from embeddings_mcp.reservations import Reservations
from embeddings_mcp.settings import Settings

BODY_SECONDS = 60.0
"""Longest that a request's body may take to arrive: who sends a byte now and then would keep others out for ever."""

_SOON = 1.0
"""Seconds after which it is worth asking again where the bodies are too much together: nobody knows when one ends."""

_COUNTING_SECONDS = 0.5
"""For so long it is counted how many requests end, to tell how fast they do: those of a batch end together."""

_ALIKE = 256
"""Requests refused that may be alike in all by which they are known again."""

_GLANCE_SECONDS = 0.02
"""For so long the beginning of a body is waited for, to know a request again where there is no place for all."""

_GLANCE_BYTES = 1024
"""Length of that beginning; less than arrives in one piece, however it is cut on its way."""


class InFlightLimiter:
    """The places for requests in flight, and what their bodies may have.

    Args:
        settings: read are the limits of requests and bytes in flight, and of one body.
    """

    def __init__(self, settings: Settings) -> None:
        self._max_requests = settings.max_requests_in_flight
        self._max_bytes = settings.max_bytes_in_flight
        self._max_body_bytes = settings.max_body_bytes
        self._requests = self._bytes = 0
        self._turns = Reservations(self._max_requests, alike=_ALIKE)
        self._counted: tuple[float, int] | None = None  # since when, by the monotonic clock, how many requests ended
        self._ends_per_second = 0.0  # 0 until it is known

    def check_length(self, scope: Scope) -> None:
        """Refuse a body that says itself that it is too large.

        Raises:
            PayloadTooLarge: it does.
        """
        if any(_number(value) > self._max_body_bytes for value in values_of(scope, b"content-length")):
            raise self._too_large()

    async def admit(self, scope: Scope, receive: Receive, caller: str | None) -> Receive:
        """Find a request a place among those in flight; returns its `receive`.

        Raises:
            TooBusy: there is none.
        """
        if not self._turns.is_contended(1, used=self._requests):
            return receive
        beginning, receive = await _glance(receive)
        who = (
            caller,
            address_of(scope),
            scope["path"],
            *values_of(scope, b"content-length"),
            hash(beginning),
        )
        if wait := self._turns.wait(who, 1, used=self._requests, per_second=self._ends_per_second):
            raise TooBusy(
                f"{self._requests:,} requests are in flight already: try again in {wait:.0f} s", retry_after=wait
            )
        self._turns.admitted(who)
        return receive

    @contextlib.contextmanager
    def in_flight(self, receive: Receive) -> Iterator[Receive]:
        """Counts a request as in flight, and gives its `receive`, which raises what is wrong with its body.

        That is `PayloadTooLarge` for a body over its limit, `TooBusy` where all bodies in flight are over theirs
        together, and an `HTTPException` where the body does not arrive in time.
        """
        received = 0
        complete = False
        deadline = anyio.current_time() + BODY_SECONDS

        async def limited() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            with anyio.CancelScope(deadline=deadline) as scope:
                message = await receive()
            if scope.cancelled_caught:
                raise HTTPException(
                    HTTPStatus.REQUEST_TIMEOUT, f"the request body did not arrive within {BODY_SECONDS:.0f} s"
                )
            complete = not message.get("more_body", False)
            more = len(message.get("body", b""))
            received += more
            self._bytes += more
            if received > self._max_body_bytes:
                raise self._too_large()
            if self._bytes > self._max_bytes:
                raise TooBusy(
                    f"the requests in flight have {self._max_bytes:,} bytes already: try again in {_SOON:.0f} s",
                    retry_after=_SOON,
                )
            return message

        self._requests += 1
        telemetry.REQUESTS_IN_FLIGHT.inc()
        try:
            yield limited
        finally:
            self._note_end()
            self._requests -= 1
            telemetry.REQUESTS_IN_FLIGHT.dec()
            self._bytes -= received

    def _note_end(self) -> None:
        """Learn how fast requests end, and make room for others."""
        if self._requests * 2 < self._max_requests:  # how fast they do when few come is not how fast they could
            self._counted = None
            return
        now = time.monotonic()
        if self._counted is None:
            self._counted = now, 0
            return
        since, ends = self._counted
        if now - since < _COUNTING_SECONDS:
            self._counted = since, ends + 1
            return
        rate = (ends + 1) / (now - since)
        self._ends_per_second = (self._ends_per_second or rate) * 0.5 + rate * 0.5
        self._counted = now, 0

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(
            f"the request body is over the limit of {self._max_body_bytes:,} bytes: send fewer texts in one request"
        )


async def _glance(receive: Receive) -> tuple[bytes, Receive]:
    """The beginning of a request's body, if it is about to be there, and a `receive` that has it still."""
    with anyio.move_on_after(_GLANCE_SECONDS) as scope:
        first = await receive()
    if scope.cancelled_caught:
        return b"", receive
    seen: list[Message] = [first]

    async def again() -> Message:
        return seen.pop() if seen else await receive()

    return first.get("body", b"")[:_GLANCE_BYTES], again


def address_of(scope: Scope) -> str:
    """Where the request came from; callers behind one proxy are not told apart."""
    host, _port = scope.get("client") or ("", 0)
    return str(host)


def values_of(scope: Scope, name: bytes) -> list[str]:
    """The header's values; latin-1 reads every byte, so no header can fail here."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _number(value: str) -> int:
    """A Content-Length; one that is no number is the HTTP server's to refuse."""
    try:
        return int(value)
    except ValueError:
        return 0

"""Admission control: how many requests, and how many bytes of their bodies, may be in flight at once."""

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
from embeddings_mcp.faces.http.scope import client_address, header_values
from embeddings_mcp.reservations import Reservations
from embeddings_mcp.settings import Settings

BODY_TIMEOUT_SECONDS = 60.0
"""Timeout for a request's whole body; otherwise a client that sends a byte now and then could hold a slot forever."""

_BYTES_RETRY_SECONDS = 1.0
"""Retry-After where the bodies in flight exceed their limit: there is no estimate of when one of them ends."""

_RATE_WINDOW_SECONDS = 0.5
"""Window over which ended requests are counted, to estimate their rate: those of one batch end together."""

_MAX_IDENTICAL = 256
"""Reservations for refused requests that cannot be told apart."""

_PEEK_TIMEOUT_SECONDS = 0.02
"""Timeout for the beginning of a body, which helps to recognize a refused request when it is retried."""

_PEEK_BYTES = 1024
"""Length of that beginning; small enough to arrive in one message, however the network splits the body."""


class InFlightLimiter:
    """Limits the requests in flight, the bytes of their bodies together, and the size of one body.

    Args:
        settings: `max_requests_in_flight`, `max_bytes_in_flight` and `max_body_bytes` are the limits.
    """

    def __init__(self, settings: Settings) -> None:
        self._max_requests = settings.max_requests_in_flight
        self._max_bytes = settings.max_bytes_in_flight
        self._max_body_bytes = settings.max_body_bytes
        self._requests = self._bytes = 0
        self._reservations = Reservations(self._max_requests, max_per_client=_MAX_IDENTICAL)
        self._rate_window: tuple[float, int] | None = None  # its start by the monotonic clock, requests ended since
        self._released_per_second = 0.0  # exponential moving average; 0 until it is known

    def check_length(self, scope: Scope) -> None:
        """Refuse a request whose Content-Length is over the limit of one body.

        Raises:
            PayloadTooLarge: it is.
        """
        if any(_content_length(value) > self._max_body_bytes for value in header_values(scope, b"content-length")):
            raise self._too_large()

    async def admit(self, scope: Scope, receive: Receive, caller: str | None) -> Receive:
        """Admit a request if there is a free slot, or one reserved for it; return the `receive` to go on with.

        Raises:
            TooBusy: there is no slot.
        """
        if not self._reservations.is_contended(1, used=self._requests):
            return receive
        beginning, receive = await _peek_body(receive)
        fingerprint = (
            caller,
            client_address(scope),
            scope["path"],
            *header_values(scope, b"content-length"),
            hash(beginning),
        )
        if retry_after := self._reservations.retry_after(
            fingerprint, 1, used=self._requests, released_per_second=self._released_per_second
        ):
            raise TooBusy(
                f"{self._requests:,} requests are in flight already: try again in {retry_after:.0f} s",
                retry_after=retry_after,
            )
        self._reservations.admitted(fingerprint)
        return receive

    @contextlib.contextmanager
    def track(self, receive: Receive) -> Iterator[Receive]:
        """Count a request as in flight during the block; yield a `receive` that enforces the limits of its body.

        It raises `PayloadTooLarge` for a body over its limit, `TooBusy` where all bodies in flight together are over
        theirs, and an `HTTPException` (408) where the body does not arrive in time.
        """
        received = 0
        complete = False
        deadline = anyio.current_time() + BODY_TIMEOUT_SECONDS

        async def limited() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            with anyio.CancelScope(deadline=deadline) as scope:
                message = await receive()
            if scope.cancelled_caught:
                raise HTTPException(
                    HTTPStatus.REQUEST_TIMEOUT, f"the request body did not arrive within {BODY_TIMEOUT_SECONDS:.0f} s"
                )
            complete = not message.get("more_body", False)
            size = len(message.get("body", b""))
            received += size
            self._bytes += size
            if received > self._max_body_bytes:
                raise self._too_large()
            if self._bytes > self._max_bytes:
                raise TooBusy(
                    f"the requests in flight have {self._max_bytes:,} bytes already: "
                    f"try again in {_BYTES_RETRY_SECONDS:.0f} s",
                    retry_after=_BYTES_RETRY_SECONDS,
                )
            return message

        self._requests += 1
        telemetry.REQUESTS_IN_FLIGHT.inc()
        try:
            yield limited
        finally:
            self._update_release_rate()
            self._requests -= 1
            telemetry.REQUESTS_IN_FLIGHT.dec()
            self._bytes -= received

    def _update_release_rate(self) -> None:
        """Update the estimate of how fast requests end."""
        if self._requests * 2 < self._max_requests:  # under low load the rate says nothing about the capacity
            self._rate_window = None
            return
        now = time.monotonic()
        if self._rate_window is None:
            self._rate_window = now, 0
            return
        start, ended = self._rate_window
        if now - start < _RATE_WINDOW_SECONDS:
            self._rate_window = start, ended + 1
            return
        rate = (ended + 1) / (now - start)
        self._released_per_second = (self._released_per_second or rate) * 0.5 + rate * 0.5
        self._rate_window = now, 0

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(
            f"the request body is over the limit of {self._max_body_bytes:,} bytes: send fewer texts in one request"
        )


async def _peek_body(receive: Receive) -> tuple[bytes, Receive]:
    """Return the beginning of a request's body (empty if it does not arrive in time), and a `receive` to replay it."""
    with anyio.move_on_after(_PEEK_TIMEOUT_SECONDS) as scope:
        first = await receive()
    if scope.cancelled_caught:
        return b"", receive
    peeked: list[Message] = [first]

    async def replaying() -> Message:
        return peeked.pop() if peeked else await receive()

    return first.get("body", b"")[:_PEEK_BYTES], replaying


def _content_length(value: str) -> int:
    """Parse a Content-Length; 0 if it is not a number, which the HTTP server refuses."""
    try:
        return int(value)
    except ValueError:
        return 0

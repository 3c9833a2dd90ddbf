"""Client-side rate limiting of an endpoint: the throttle that all requests of one account pass."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from embeddings_mcp.errors import Overloaded


class Throttle:
    """Limits concurrency and the request rate; requests start in order of arrival.

    The rate is limited over a sliding window, since a token bucket would let twice the limit through in its first
    minute. A request that could not start before the caller's deadline (that of the enclosing cancel scope) is refused
    at once. A caller whose deadline has already passed is not refused here: its cancel scope ends the call.

    Args:
        name: of what is behind the throttle, for error messages.
        concurrency: maximum number of requests in flight.
        max_requests: maximum number of requests in one window; ``inf`` for no limit.
        window: seconds.
    """

    def __init__(self, name: str, *, concurrency: int, max_requests: float, window: float = 60.0) -> None:
        self._name = name
        self._concurrency = concurrency
        self._in_flight = anyio.Semaphore(concurrency)
        self._rate_lock = anyio.Lock()
        self._max_requests = None if math.isinf(max_requests) else max(int(max_requests), 1)
        self._window = window
        self._starts: deque[float] = deque(maxlen=self._max_requests or 0)
        self._paused_until = -math.inf
        self._average_seconds = 0.0  # duration of a request

    def admit(self, requests: int) -> None:
        """Return if this many more requests can all start before the caller's deadline.

        Raises:
            Overloaded: the last of them cannot.
        """
        self._check_deadline(self.estimated_wait(requests), requests)

    def estimated_wait(self, requests: int) -> float:
        """Return the estimated seconds until the last of this many more requests can start."""
        position = requests + self._in_flight.statistics().tasks_waiting
        rate_position = position + self._rate_lock.statistics().tasks_waiting
        return max(
            (position - 1) // self._concurrency * self._average_seconds,
            self._start_time(rate_position) - anyio.current_time(),
        )

    def capacity(self, seconds: float) -> float:
        """Return the maximum number of requests that can start within this time."""
        return math.inf if self._max_requests is None else self._max_requests * (seconds // self._window + 1)

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[None]:
        """Wait until a request may start, and count it as in flight for the duration of the block.

        Raises:
            Overloaded: it could not start before the caller's deadline.
        """
        self.admit(1)
        async with self._in_flight:
            async with self._rate_lock:
                while (start := self._start_time(1)) > (now := anyio.current_time()):
                    self._check_deadline(start - now, 1)
                    await anyio.sleep_until(start)
                self._starts.append(now)
            try:
                yield
            finally:
                # Exponential moving average: recent requests predict best how long the next one will take.
                seconds = anyio.current_time() - now
                self._average_seconds = 0.8 * (self._average_seconds or seconds) + 0.2 * seconds

    def pause_for(self, seconds: float) -> None:
        """Start no request for this long, as the endpoint has asked."""
        self._paused_until = max(self._paused_until, anyio.current_time() + seconds)

    def _start_time(self, nth: int) -> float:
        """Return when the nth request from now may start."""
        earliest = max(anyio.current_time(), self._paused_until)
        if self._max_requests is None:
            return earliest
        # Each start in the window frees one slot a window later, and so do the starts in those slots.
        windows, slot = divmod(nth - 1, self._max_requests)
        previous = slot - (self._max_requests - len(self._starts))
        if previous >= 0:
            earliest = max(earliest, self._starts[previous] + self._window)
        return earliest + windows * self._window

    def _check_deadline(self, wait: float, requests: int) -> None:
        left = anyio.current_effective_deadline() - anyio.current_time()
        if 0 <= left < wait:  # a caller past its deadline or cancelled (-inf) is stopped at its next await
            count = "the request" if requests == 1 else f"the last of {requests:,} requests"
            raise Overloaded(
                f"{self._name} is busy: {count} to it would have to wait {wait:,.0f} s, and only {left:,.0f} s are "
                "left before its deadline; try again later, or with fewer texts at once",
                retry_after=max(wait - left, 1.0),
            )

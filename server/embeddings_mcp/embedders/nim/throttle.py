"""How much is asked of an endpoint at a time: the throttle that all of its requests pass."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from embeddings_mcp.errors import Overloaded


class Throttle:
    """Lets requests through in the order in which they came: so many at the same time, so many in any window of time.

    The window slides: a bucket that refills would let twice the limit through in its first minute. Nobody waits for a
    turn that would come after his deadline (that of the cancel scope he is in): he is told at once. Whose deadline
    is past is told nothing: his scope ends what he does.

    Args:
        name: of what lies behind it, for the error.
        concurrency: most requests at the same time.
        requests: most requests in one window; ``inf`` for no limit.
        window: seconds.
    """

    def __init__(self, name: str, *, concurrency: int, requests: float, window: float = 60.0) -> None:
        self._name = name
        self._concurrency = concurrency
        self._places = anyio.Semaphore(concurrency)
        self._line = anyio.Lock()
        self._requests = None if math.isinf(requests) else max(int(requests), 1)
        self._window = window
        self._begun: deque[float] = deque(maxlen=self._requests or 0)
        self._closed_until = -math.inf
        self._seconds = 0.0  # that a request takes, lately

    def admit(self, requests: int) -> None:
        """Return if this many requests more would have their turn before the caller's deadline.

        Raises:
            Overloaded: the last of them would not.
        """
        self._refuse_late(self.wait(requests), requests)

    def wait(self, requests: int) -> float:
        """Seconds, as far as can be told, until the last of this many requests more has its turn."""
        for_place = requests + self._places.statistics().tasks_waiting
        for_slot = for_place + self._line.statistics().tasks_waiting
        return max(
            (for_place - 1) // self._concurrency * self._seconds,
            self._slot(for_slot) - anyio.current_time(),
        )

    def capacity(self, seconds: float) -> float:
        """Most requests that can begin within this time."""
        return math.inf if self._requests is None else self._requests * (seconds // self._window + 1)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn, and hold a place while the request lasts.

        Raises:
            Overloaded: the turn would come too late.
        """
        self.admit(1)
        async with self._places:
            async with self._line:
                while (slot := self._slot(1)) > (now := anyio.current_time()):
                    self._refuse_late(slot - now, 1)
                    await anyio.sleep_until(slot)
                self._begun.append(now)
            try:
                yield
            finally:
                # A moving average: recent requests tell best how long the next will take.
                taken = anyio.current_time() - now
                self._seconds = 0.8 * self._seconds + 0.2 * taken if self._seconds else taken

    def close_for(self, seconds: float) -> None:
        """Let nobody through for this long: the endpoint has asked for it."""
        self._closed_until = max(self._closed_until, anyio.current_time() + seconds)

    def _slot(self, nth: int) -> float:
        """When the nth request from now on may begin."""
        opens = max(anyio.current_time(), self._closed_until)
        if self._requests is None:
            return opens
        # Each of the requests that still count makes room for one, a window after it; those in turn for the next ones.
        windows, place = divmod(nth - 1, self._requests)
        earlier = place - (self._requests - len(self._begun))
        return (max(opens, self._begun[earlier] + self._window) if earlier >= 0 else opens) + windows * self._window

    def _refuse_late(self, wait: float, requests: int) -> None:
        left = anyio.current_effective_deadline() - anyio.current_time()
        if 0 <= left < wait:  # whose time is over, or who is cancelled (-inf), learns so at his next await
            count = "the request" if requests == 1 else f"the last of {requests:,} requests"
            raise Overloaded(
                f"{self._name} is busy: {count} to it would have to wait {wait:,.0f} s, and has {left:,.0f} s; "
                "try again later, or with fewer texts at once",
                retry_after=max(wait - left, 1.0),
            )

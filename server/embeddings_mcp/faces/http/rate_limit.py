"""Rate limit: how many requests a minute each caller may send."""

from __future__ import annotations

import time

_MIN_PRUNE_SIZE = 1024
"""Callers up to which no entry is pruned."""


class RateLimiter:
    """Allow each caller a burst of `per_minute` requests, and then requests at that rate.

    This is the generic cell rate algorithm (GCRA). Per caller it stores one number: the theoretical arrival time, at
    which all of the caller's requests will be paid off. Entries whose time has passed are pruned once there are many.

    Args:
        per_minute: requests.
    """

    def __init__(self, per_minute: int) -> None:
        self._interval = 60 / per_minute
        self._arrival_times: dict[str, float] = {}
        self._prune_at = _MIN_PRUNE_SIZE

    def retry_after(self, caller: str) -> float:
        """Return in how many seconds the caller may send a request; 0 if it may now, and this request is counted."""
        now = time.monotonic()
        arrival_time = max(self._arrival_times.get(caller, now), now) + self._interval
        if (retry_after := arrival_time - now - 60) > 1e-6:
            return retry_after
        if len(self._arrival_times) >= self._prune_at:
            self._arrival_times = {other: moment for other, moment in self._arrival_times.items() if moment > now}
            self._prune_at = max(_MIN_PRUNE_SIZE, 2 * len(self._arrival_times))
        self._arrival_times[caller] = arrival_time
        return 0.0

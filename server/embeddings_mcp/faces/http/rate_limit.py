"""How often each caller may ask."""

from __future__ import annotations

import time

_FEW = 1024
"""Callers up to which nobody is forgotten."""


class RateLimiter:
    """At most so many requests of each caller at once, and from then on at an even pace.

    This is the generic cell rate algorithm: of each caller it keeps only the moment at which he will have made up for
    all that he has asked; and nothing of those who have, once there are many.

    Args:
        per_minute: requests.
    """

    def __init__(self, per_minute: int) -> None:
        self._interval = 60 / per_minute
        self._made_up: dict[str, float] = {}
        self._many = _FEW

    def wait(self, caller: str) -> float:
        """Seconds until the caller may ask again; 0 where he may now, and then that counts as a request."""
        now = time.monotonic()
        made_up = max(self._made_up.get(caller, now), now) + self._interval
        if (wait := made_up - now - 60) > 1e-6:
            return wait
        if len(self._made_up) >= self._many:
            self._made_up = {other: moment for other, moment in self._made_up.items() if moment > now}
            self._many = max(_FEW, 2 * len(self._made_up))
        self._made_up[caller] = made_up
        return 0.0

"""How often each caller may ask."""

from __future__ import annotations

import time


class Rate:
    """At most so many requests of each caller at once, and from then on at an even pace.

    This is the generic cell rate algorithm: of each caller it keeps only the moment at which he will have made up for
    all that he has asked.

    Args:
        per_minute: requests.
    """

    def __init__(self, per_minute: int) -> None:
        self._interval = 60 / per_minute
        self._made_up: dict[str, float] = {}

    def wait(self, caller: str) -> float:
        """Seconds until the caller may ask again; 0 where he may now, and then that counts as a request."""
        now = time.monotonic()
        made_up = max(self._made_up.get(caller, now), now) + self._interval
        if (wait := made_up - now - 60) > 1e-6:
            return wait
        self._made_up[caller] = made_up
        return 0.0

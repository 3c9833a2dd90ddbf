"""When those who were refused for want of room are asked back."""

from __future__ import annotations

import math
import time

LONGEST_SECONDS = 120.0
"""Beyond the time until there is room at all, after which at most a refused caller is asked back."""

PROMISED = 0.75
"""Part of the room that is promised: newcomers take some too, and how fast it is made is only known of the past."""


class Turns:
    """Asks callers back one behind the other, as fast as room is made.

    If all came at the moment at which there is room for one, all others would be refused again.
    """

    def __init__(self) -> None:
        self._promised = 0.0  # when, by the monotonic clock, the last of them is asked back

    def wait(self, size: float, *, ahead: float, per_second: float) -> float:
        """After how many whole seconds a caller finds room, behind those who were refused before.

        Args:
            size: how much room he wants.
            ahead: how much has to be made until there is any for him.
            per_second: how much is made; 0 where nobody knows yet.
        """
        if not per_second:
            return 1.0
        now = time.monotonic()
        room = now + ahead / per_second
        turn = self._promised + size / (PROMISED * per_second) if self._promised >= now else room
        self._promised = min(max(room, turn), room + LONGEST_SECONDS)
        return float(max(1, math.ceil(self._promised - now)))

"""Who is let in where room is short, and when those who are not are asked back to find some.

Whoever is refused is told a time: behind those who were refused before him, as fast as room is made. For that time a
place is kept for him, and newcomers are let in only as far as there is room besides. A place is kept for moments, and
for all together there is never more than a part of the room, so that those who do not come back cost others little.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left, insort
from collections.abc import Hashable
from dataclasses import dataclass
from operator import attrgetter

LONGEST_SECONDS = 300.0
"""Beyond the time in which all room is made anew, after which at most a refused caller is asked back; for whoever would
have to wait longer no place is kept."""

PROMISED = 0.75
"""Part of the room made that is promised: how fast it is made is only known of the past, and newcomers take some."""

KEPT = 0.75
"""Part of all room that is kept at most for those who are due, and that the largest of callers is taken to need."""

SPARE = 0.25
"""Part of all room that there is besides for those who are due: many may come at one moment."""

LATE_SECONDS = 5.0
"""For so long a place is kept for who does not come when he is due: a request takes its time to get here."""

_EARLY_SECONDS = 0.1
"""Who comes so much before he is due is on time: clocks differ."""

_AHEAD_SECONDS = 1.0
"""So long before they are due places are kept free: since whole seconds are told, as many more may be due at once."""

_MOST_PLACES = 50_000
"""Places kept at the same time, of some 300 bytes each."""


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """What is kept for a caller who was refused.

    Attributes:
        who: he.
        size: how much room he wants.
        due: when he was asked back, by the monotonic clock.
    """

    who: Hashable
    size: float
    due: float


_due = attrgetter("due")


class Reservations:
    """Says of each caller whether there is room for him, and asks those back for whom there is none.

    Args:
        room: how much there is.
        alike: how many may be asked back who cannot be told apart; one more is taken for the last of them, who comes
            before he is due.
    """

    def __init__(self, room: float, *, alike: int = 1) -> None:
        self._room = room
        self._alike = alike
        self._places: list[_Place] = []  # in the order in which they are due
        self._places_of: dict[Hashable, list[_Place]] = {}  # the same, in the same order
        self._promised_size = 0.0  # of all of them

    def wait(self, who: Hashable, size: float, *, used: float, per_second: float) -> float:
        """After how many whole seconds a caller finds room; 0 if there is room for him.

        Args:
            who: what he is known by when he comes again.
            size: how much room he wants. If it is more than there is in all, he finds some once little is used.
            used: how much is taken already, of each as much as is `counted`.
            per_second: how much is made; 0 where nobody knows yet.
        """
        now = time.monotonic()
        self._forget_missed(now)
        size = self.counted(size)
        promised_per_second = PROMISED * per_second
        places = self._places_of.get(who, [])
        if places and places[0].due - _EARLY_SECONDS <= now:
            excess = used + size - (1 + SPARE) * self._room
            if not used or excess <= 0 or not per_second:
                return 0.0
            self._forget(places[0])  # he kept his time, and found no room all the same: he is the next
            return self._ask_back(who, size, now, excess / promised_per_second, promised_per_second)
        if not used or used + size + self._kept(now, promised_per_second) <= self._room:
            return 0.0
        if not per_second:
            return 1.0
        if len(places) >= self._alike:
            return _whole(places[-1].due - now)
        excess = used + self._promised_size + size - self._room
        return self._ask_back(who, size, now, excess / promised_per_second, promised_per_second)

    def counted(self, size: float) -> float:
        """As how much a size counts, wanted or taken: whoever has more than `KEPT` leaves room to the others."""
        return min(size, KEPT * self._room)

    def is_contended(self, size: float, *, used: float) -> bool:
        """Whether it makes a difference who comes: there is too little room, or some is kept."""
        return bool(self._places) or used + size > self._room

    def admitted(self, who: Hashable) -> None:
        """Note that a caller took room; no place is kept for him any longer."""
        if places := self._places_of.get(who):
            self._forget(places[0])

    def _ask_back(self, who: Hashable, size: float, now: float, after: float, promised_per_second: float) -> float:
        """Keep a place for a caller, `after` so many seconds or somewhat later; how many whole ones."""
        longest = LONGEST_SECONDS + self._room / promised_per_second
        wait = _whole(min(after, longest))
        if after <= longest and len(self._places) < _MOST_PLACES:
            place = _Place(who, size, now + wait)
            insort(self._places, place, key=_due)
            insort(self._places_of.setdefault(who, []), place, key=_due)
            self._promised_size += size
        return wait

    def _kept(self, now: float, promised_per_second: float) -> float:
        """How much of the room is not for newcomers."""
        if not self._places:
            return 0.0
        most = KEPT * self._room
        soon = 0.0
        for place in self._places:
            if soon >= most or place.due > now + _AHEAD_SECONDS:
                break
            soon += place.size
        # For those who are due later room will have been made, but not for all of them if they are many.
        until_last = self._places[-1].due - now
        later = self._promised_size - promised_per_second * until_last if promised_per_second else 0.0
        return min(max(soon, later), most)

    def _forget_missed(self, now: float) -> None:
        while self._places and self._places[0].due + LATE_SECONDS < now:
            self._forget(self._places[0])

    def _forget(self, place: _Place) -> None:
        at = bisect_left(self._places, place.due, key=_due)
        while self._places[at] is not place:
            at += 1
        del self._places[at]
        self._promised_size -= place.size
        places = self._places_of[place.who]
        places.remove(place)
        if not places:
            del self._places_of[place.who]


def _whole(seconds: float) -> float:
    """As `Retry-After` has it."""
    return float(max(1, math.ceil(seconds)))

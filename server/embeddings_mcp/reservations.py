"""Admission control for a limited capacity, with reservations for the clients that were refused.

A client that is refused gets a Retry-After: it queues behind the clients refused before it, and the wait follows from
how fast capacity is released. Capacity is reserved for that time, and new clients are admitted only to what is not
reserved. Reservations last for moments, and all of them together never take more than a part of the capacity, so
clients that do not come back cost the others little.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left, insort
from collections.abc import Hashable
from dataclasses import dataclass
from operator import attrgetter

MAX_WAIT_SECONDS = 300.0
"""Longest Retry-After, on top of the time in which the whole capacity is released. A client that would have to wait
longer is told this maximum, and gets no reservation."""

PROMISED_FRACTION = 0.75
"""Fraction of the release rate that reservations may count on: the rate is known from the past only, and new clients
take some of what is released."""

MAX_RESERVED_FRACTION = 0.75
"""Fraction of the capacity that is withheld from new clients at most, and the most that a single client counts for."""

OVERCOMMIT_FRACTION = 0.25
"""Fraction of the capacity by which clients whose reservation is due may exceed it: many may come at one moment."""

GRACE_SECONDS = 5.0
"""How long a reservation is kept after it is due: a request takes time to get here."""

_CLOCK_SKEW_SECONDS = 0.1
"""A client that comes back this much too early is on time: clocks differ."""

_LOOKAHEAD_SECONDS = 1.0
"""How long before it is due a reservation starts to hold capacity. Retry-After is rounded to whole seconds, so all
reservations of one second may fall due at once."""

_MAX_RESERVATIONS = 50_000
"""Reservations held at the same time, of about 300 bytes each."""


@dataclass(frozen=True, slots=True, eq=False)
class _Reservation:
    """Capacity that is reserved for a client that was refused.

    Attributes:
        client: identity of the client.
        size: how much capacity it wants.
        due: when it was asked to retry, by the monotonic clock.
    """

    client: Hashable
    size: float
    due: float


_due = attrgetter("due")


class Reservations:
    """Admits a client if there is capacity for it, and otherwise tells it when to retry.

    Args:
        capacity: the total.
        max_per_client: how many reservations clients of the same identity may hold. One more such client is taken for
            the last of them, retrying too early.
    """

    def __init__(self, capacity: float, *, max_per_client: int = 1) -> None:
        self._capacity = capacity
        self._max_per_client = max_per_client
        self._reservations: list[_Reservation] = []  # in the order in which they are due
        self._by_client: dict[Hashable, list[_Reservation]] = {}  # the same, in the same order
        self._reserved_size = 0.0  # of all reservations

    def retry_after(self, client: Hashable, size: float, *, used: float, released_per_second: float) -> float:
        """Return after how many whole seconds there is capacity for a client; 0 if there is now.

        Args:
            client: identifies the client when it retries.
            size: how much capacity it wants. If that is more than there is in all, it is admitted once little is used.
            used: how much is in use already, the sum of every user's `effective_size`.
            released_per_second: how much capacity is released per second; 0 if that is not known yet.
        """
        now = time.monotonic()
        self._remove_expired(now)
        size = self.effective_size(size)
        promised_per_second = PROMISED_FRACTION * released_per_second
        reservations = self._by_client.get(client, [])
        if reservations and reservations[0].due - _CLOCK_SKEW_SECONDS <= now:
            excess = used + size - (1 + OVERCOMMIT_FRACTION) * self._capacity
            if excess <= 0 or not released_per_second:
                return 0.0
            self._remove(reservations[0])  # on time, but there is no capacity after all: it goes next
            return self._reserve(client, size, now, excess / promised_per_second, promised_per_second)
        if not used or used + size + self._held(now, promised_per_second) <= self._capacity:
            return 0.0
        if not released_per_second:
            return 1.0
        if len(reservations) >= self._max_per_client:
            return _whole_seconds(reservations[-1].due - now)
        excess = used + self._reserved_size + size - self._capacity
        return self._reserve(client, size, now, excess / promised_per_second, promised_per_second)

    def effective_size(self, size: float) -> float:
        """Return how much a size counts for, requested or in use: `MAX_RESERVED_FRACTION` of the capacity at most.

        So a request larger than that leaves capacity to others.
        """
        return min(size, MAX_RESERVED_FRACTION * self._capacity)

    def is_contended(self, size: float, *, used: float) -> bool:
        """Whether admission depends on who asks: there is too little capacity, or some is reserved."""
        return bool(self._reservations) or used + size > self._capacity

    def admitted(self, client: Hashable) -> None:
        """Note that a client was admitted, which ends its reservation."""
        if reservations := self._by_client.get(client):
            self._remove(reservations[0])

    def _reserve(self, client: Hashable, size: float, now: float, seconds: float, promised_per_second: float) -> float:
        """Reserve capacity for a client, due after `seconds`; return the wait, whole and at most the maximum."""
        max_wait = MAX_WAIT_SECONDS + self._capacity / promised_per_second
        wait = _whole_seconds(min(seconds, max_wait))
        if seconds <= max_wait and len(self._reservations) < _MAX_RESERVATIONS:
            reservation = _Reservation(client, size, now + wait)
            insort(self._reservations, reservation, key=_due)
            insort(self._by_client.setdefault(client, []), reservation, key=_due)
            self._reserved_size += size
        return wait

    def _held(self, now: float, promised_per_second: float) -> float:
        """Return how much capacity is withheld from new clients."""
        if not self._reservations:
            return 0.0
        max_held = MAX_RESERVED_FRACTION * self._capacity
        due_soon = 0.0
        for reservation in self._reservations:
            if due_soon >= max_held or reservation.due > now + _LOOKAHEAD_SECONDS:
                break
            due_soon += reservation.size
        # For later reservations capacity will have been released by then, but not for all of them if they are many.
        until_last = self._reservations[-1].due - now
        later = self._reserved_size - promised_per_second * until_last if promised_per_second else 0.0
        return min(max(due_soon, later), max_held)

    def _remove_expired(self, now: float) -> None:
        while self._reservations and self._reservations[0].due + GRACE_SECONDS < now:
            self._remove(self._reservations[0])

    def _remove(self, reservation: _Reservation) -> None:
        index = bisect_left(self._reservations, reservation.due, key=_due)
        while self._reservations[index] is not reservation:
            index += 1
        del self._reservations[index]
        self._reserved_size -= reservation.size
        of_client = self._by_client[reservation.client]
        of_client.remove(reservation)
        if not of_client:
            del self._by_client[reservation.client]


def _whole_seconds(seconds: float) -> float:
    """Round up to whole seconds, at least one, as `Retry-After` has them."""
    return float(max(1, math.ceil(seconds)))

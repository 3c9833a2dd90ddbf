"""Admission at a limited capacity: clients that retry when they were told to, and new ones next to them."""

from __future__ import annotations

import heapq
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embeddings_mcp.reservations import GRACE_SECONDS, MAX_WAIT_SECONDS, OVERCOMMIT_FRACTION, Reservations
from tests.support import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("embeddings_mcp.reservations.time", clock)
    return clock


def refused(reservations: Reservations, *, size: float = 8, used: float = 20, shared: str = "") -> list[float]:
    """Retry-After of four clients that come at the same time, all with the identity `shared` if it is given."""
    return [reservations.retry_after(shared or client, size, used=used, released_per_second=4) for client in "abcd"]


def test_clients_are_admitted_until_the_capacity_is_used() -> None:
    reservations = Reservations(20)
    assert [reservations.retry_after("a", 8, used=used, released_per_second=4) for used in (0, 12, 13)] == [0, 0, 1]


@pytest.mark.usefixtures("clock")
def test_a_refused_client_waits_for_the_capacity_that_those_before_it_take() -> None:
    """2 s for each if all released capacity went to them; a third more, since new clients take some."""
    assert refused(Reservations(20)) == [3, 6, 8, 11]


def test_capacity_is_reserved_for_a_client_that_is_due_and_new_clients_get_the_rest(clock: Clock) -> None:
    reservations = Reservations(20)
    (due, *_) = refused(reservations)
    clock.now += due
    assert reservations.retry_after("newcomer", 8, used=12, released_per_second=4) > 0
    assert reservations.retry_after("newcomer", 4, used=8, released_per_second=4) == 0
    assert reservations.retry_after("a", 8, used=12, released_per_second=4) == 0
    reservations.admitted("a")
    assert reservations.retry_after("another", 8, used=12, released_per_second=4) == 0, "its reservation has ended"


def test_a_client_that_is_due_is_admitted_even_slightly_above_the_capacity(clock: Clock) -> None:
    reservations = Reservations(20)
    (due, *_) = refused(reservations)
    clock.now += due - 0.05  # clocks differ
    assert reservations.retry_after("a", 8, used=17, released_per_second=4) == 0
    assert reservations.retry_after("a", 8, used=24, released_per_second=4) == 3, (
        "too far above it, but no other client is before this one"
    )
    clock.now += 3
    assert reservations.retry_after("a", 8, used=17, released_per_second=4) == 0
    reservations.admitted("a")
    assert reservations.retry_after("newcomer", 4, used=4, released_per_second=4) == 0, (
        "it had one reservation, not two"
    )


def test_the_wait_of_a_client_that_is_refused_later_counts_from_then_on(clock: Clock) -> None:
    reservations = Reservations(20)
    refused(reservations)
    clock.now += 100
    assert reservations.retry_after("another", 8, used=20, released_per_second=4) == 3


def test_a_client_that_retries_too_early_keeps_its_turn(clock: Clock) -> None:
    reservations = Reservations(20)
    assert refused(reservations)[3] == 11
    clock.now += 2
    assert [reservations.retry_after("d", 8, used=20, released_per_second=4) for _ in range(3)] == [9, 9, 9]


@pytest.mark.usefixtures("clock")
def test_clients_of_one_identity_hold_as_many_reservations_as_they_may() -> None:
    assert refused(Reservations(20), shared="all") == [3, 3, 3, 3]
    assert refused(Reservations(20, max_per_client=3), shared="all") == [3, 6, 8, 8]


def test_a_reservation_expires(clock: Clock) -> None:
    reservations = Reservations(20)
    (due, *_) = refused(reservations)
    clock.now += due + GRACE_SECONDS + 20
    assert reservations.retry_after("newcomer", 8, used=12, released_per_second=4) == 0


@pytest.mark.usefixtures("clock")
def test_the_number_of_reservations_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embeddings_mcp.reservations._MAX_RESERVATIONS", 2)
    assert refused(Reservations(20)) == [3, 6, 8, 8]


def test_those_who_never_come_back_cannot_keep_all_others_out(clock: Clock) -> None:
    reservations = Reservations(20, max_per_client=100)
    for _ in range(25):
        assert refused(reservations, size=1, shared="many")
    clock.now += 5
    assert reservations.retry_after("newcomer", 2, used=4, released_per_second=4) > 0
    assert reservations.retry_after("newcomer", 1, used=4, released_per_second=4) == 0
    assert reservations.retry_after("newcomer", 1000, used=0, released_per_second=4) == 0


@pytest.mark.usefixtures("clock")
def test_the_wait_is_limited() -> None:
    reservations = Reservations(10, max_per_client=100)
    waits = [reservations.retry_after("all", 5, used=10, released_per_second=1) for _ in range(60)]
    assert waits[:3] == [7, 14, 20]
    assert max(waits) == 314, "300 s after the 13 s in which the whole capacity is released"


def test_the_wait_is_one_second_while_the_release_rate_is_unknown() -> None:
    assert Reservations(20).retry_after("a", 1000, used=20, released_per_second=0) == 1


@given(
    seed=st.integers(0, 2**32),
    pace=st.floats(1.2, 10),
    seconds=st.floats(1, 8),
    returning=st.floats(0, 1),
)
def test_a_client_that_retries_in_time_is_admitted_and_the_capacity_is_used(
    seed: int, pace: float, seconds: float, returning: float
) -> None:
    """A queue that drains at a constant rate, and a burst of clients that want more than that.

    The rate is known with an error of up to 20 %. Of the clients that are refused a part retries, up to 0.2 s late.
    """
    capacity, released_per_second = 10_000, 7_000
    choose = random.Random(seed)
    clock = Clock()
    numbers = itertools.count()
    coming = [(clock.now, next(numbers), choose.uniform(300, 900), False)]
    while coming[-1][0] < clock.now + seconds:
        last, _, size, _ = coming[-1]
        coming.append((last + size / (pace * released_per_second), next(numbers), choose.uniform(300, 900), False))
    used = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embeddings_mcp.reservations.time", clock)
        reservations = Reservations(capacity)
        while coming:
            at, client, size, retrying = heapq.heappop(coming)
            used = max(0.0, used - (at - clock.now) * released_per_second)
            clock.now = at
            wait = reservations.retry_after(
                client, size, used=used, released_per_second=released_per_second * choose.uniform(0.8, 1.2)
            )
            if not wait:
                reservations.admitted(client)
                used += size
            assert not (retrying and wait), "it was told to retry now"
            assert used <= capacity * (1 + OVERCOMMIT_FRACTION)
            if wait:
                assert used > capacity / 8, "capacity was left unused"
                if choose.random() < returning and wait < MAX_WAIT_SECONDS:
                    heapq.heappush(coming, (at + wait + choose.uniform(0.001, 0.2), client, size, True))

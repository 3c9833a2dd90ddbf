"""Who is let in where room is short: whoever comes back when he was told to, and others beside him."""

from __future__ import annotations

import heapq
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embeddings_mcp import reservations
from embeddings_mcp.reservations import Reservations
from tests.support import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("embeddings_mcp.reservations.time", clock)
    return clock


def refused(asked: Reservations, *, size: float = 8, used: float = 20, alike: str = "") -> list[float]:
    """What four callers are told, who come at the same time."""
    return [asked.wait(alike or caller, size, used=used, per_second=4) for caller in "abcd"]


def test_there_is_room_until_there_is_none() -> None:
    asked = Reservations(20)
    assert [asked.wait("a", 8, used=used, per_second=4) for used in (0, 12, 13)] == [0, 0, 1]


@pytest.mark.usefixtures("clock")
def test_each_is_asked_back_after_the_room_that_those_before_him_take() -> None:
    """2 s for each if room were made for them alone; since newcomers come too, a third more."""
    assert refused(Reservations(20)) == [3, 6, 8, 11]


def test_a_place_is_kept_for_who_is_due_and_newcomers_get_what_is_left(clock: Clock) -> None:
    asked = Reservations(20)
    (due, *_) = refused(asked)
    clock.now += due
    assert asked.wait("newcomer", 8, used=12, per_second=4) > 0
    assert asked.wait("newcomer", 4, used=8, per_second=4) == 0
    assert asked.wait("a", 8, used=12, per_second=4) == 0
    asked.admitted("a")
    assert asked.wait("another", 8, used=12, per_second=4) == 0, "his place is not kept any longer"


def test_who_is_due_is_let_in_also_where_a_little_more_came_in_than_there_is_room(clock: Clock) -> None:
    asked = Reservations(20)
    (due, *_) = refused(asked)
    clock.now += due - 0.05  # clocks differ
    assert asked.wait("a", 8, used=17, per_second=4) == 0
    assert asked.wait("a", 8, used=24, per_second=4) == 3, "too much is too much; but nobody else is before him"
    clock.now += 3
    assert asked.wait("a", 8, used=17, per_second=4) == 0
    asked.admitted("a")
    assert asked.wait("newcomer", 4, used=4, per_second=4) == 0, "one place was kept for him, not two"


def test_who_is_refused_later_waits_no_longer_than_from_then_on(clock: Clock) -> None:
    asked = Reservations(20)
    refused(asked)
    clock.now += 100
    assert asked.wait("another", 8, used=20, per_second=4) == 3


def test_who_comes_before_he_is_due_keeps_his_turn(clock: Clock) -> None:
    asked = Reservations(20)
    assert refused(asked)[3] == 11
    clock.now += 2
    assert [asked.wait("d", 8, used=20, per_second=4) for _ in range(3)] == [9, 9, 9]


@pytest.mark.usefixtures("clock")
def test_of_callers_who_cannot_be_told_apart_as_many_are_asked_back_as_was_said() -> None:
    assert refused(Reservations(20), alike="all") == [3, 3, 3, 3]
    assert refused(Reservations(20, alike=3), alike="all") == [3, 6, 8, 8]


def test_a_place_is_not_kept_for_long(clock: Clock) -> None:
    asked = Reservations(20)
    (due, *_) = refused(asked)
    clock.now += due + reservations.LATE_SECONDS + 20
    assert asked.wait("newcomer", 8, used=12, per_second=4) == 0


@pytest.mark.usefixtures("clock")
def test_so_many_places_are_kept_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservations, "_MOST_PLACES", 2)
    assert refused(Reservations(20)) == [3, 6, 8, 8]


def test_those_who_never_come_back_cannot_keep_all_others_out(clock: Clock) -> None:
    asked = Reservations(20, alike=100)
    for _ in range(25):
        assert refused(asked, size=1, alike="many")
    clock.now += 5
    assert asked.wait("newcomer", 2, used=4, per_second=4) > 0
    assert asked.wait("newcomer", 1, used=4, per_second=4) == 0
    assert asked.wait("newcomer", 1000, used=0, per_second=4) == 0


@pytest.mark.usefixtures("clock")
def test_nobody_is_sent_away_for_longer_than_the_limit() -> None:
    asked = Reservations(10, alike=100)
    waits = [asked.wait("all", 5, used=10, per_second=1) for _ in range(60)]
    assert waits[:3] == [7, 14, 20]
    assert max(waits) == 314, "300 s after the 13 s in which all room is made anew"


def test_where_nobody_knows_how_fast_room_is_made_a_second_is_as_good_as_any() -> None:
    assert Reservations(20).wait("a", 1000, used=20, per_second=0) == 1


@given(
    seed=st.integers(0, 2**32),
    pace=st.floats(1.2, 10),
    seconds=st.floats(1, 8),
    returning=st.floats(0, 1),
)
def test_whoever_keeps_to_his_time_finds_room_and_the_room_is_used(
    seed: int, pace: float, seconds: float, returning: float
) -> None:
    """A queue that empties at an even pace, and a rush of callers who want more.

    How fast it empties is known to a fifth. Of those who are refused a part comes back, up to 0.2 s late.
    """
    room, per_second = 10_000, 7_000
    choose = random.Random(seed)
    clock = Clock()
    numbers = itertools.count()
    coming = [(clock.now, next(numbers), choose.uniform(300, 900), False)]
    while coming[-1][0] < clock.now + seconds:
        last, _, size, _ = coming[-1]
        coming.append((last + size / (pace * per_second), next(numbers), choose.uniform(300, 900), False))
    used = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embeddings_mcp.reservations.time", clock)
        asked = Reservations(room)
        while coming:
            at, who, size, again = heapq.heappop(coming)
            used = max(0.0, used - (at - clock.now) * per_second)
            clock.now = at
            wait = asked.wait(who, size, used=used, per_second=per_second * choose.uniform(0.8, 1.2))
            if not wait:
                asked.admitted(who)
                used += size
            assert not (again and wait), "he was told to come now"
            assert used <= room * (1 + reservations.SPARE)
            if wait:
                assert used > room / 8, "room was left unused"
                if choose.random() < returning and wait < reservations.LONGEST_SECONDS:
                    heapq.heappush(coming, (at + wait + choose.uniform(0.001, 0.2), who, size, True))

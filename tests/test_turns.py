"""When those who were refused are asked back: one behind the other, as fast as room is made, and not too late."""

from __future__ import annotations

import pytest

from embeddings_mcp import turns
from embeddings_mcp.turns import Turns


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which passes when a test says so."""
    now = [1000.0]
    monkeypatch.setattr("embeddings_mcp.turns.time.monotonic", lambda: now[0])
    return now


def test_each_comes_after_the_room_that_those_before_him_take() -> None:
    """2 s for each if they were alone; since newcomers come too, a third more."""
    asked = Turns()
    assert [asked.wait(8, ahead=1, per_second=4) for _ in range(4)] == [1, 3, 6, 9]


def test_who_is_refused_later_waits_no_longer_than_from_then_on(clock: list[float]) -> None:
    asked = Turns()
    assert [asked.wait(8, ahead=4, per_second=4) for _ in range(2)] == [1, 4]
    clock[0] += 100
    assert asked.wait(8, ahead=12, per_second=4) == 3


def test_nobody_is_sent_away_for_longer_than_the_limit() -> None:
    asked = Turns()
    waits = [asked.wait(1000, ahead=5, per_second=1) for _ in range(3)]
    assert waits == [5, turns.LONGEST_SECONDS + 5, turns.LONGEST_SECONDS + 5]


def test_where_nobody_knows_how_fast_room_is_made_a_second_is_as_good_as_any() -> None:
    assert Turns().wait(1000, ahead=0, per_second=0) == 1

"""The throttle before an endpoint."""

from __future__ import annotations

import math

import anyio
import pytest

from embeddings_mcp.embedders.nim.throttle import Throttle
from embeddings_mcp.errors import Overloaded

pytestmark = pytest.mark.anyio


async def pass_through(throttle: Throttle, times: list[float]) -> None:
    async with throttle.turn():
        times.append(anyio.current_time())


async def test_no_window_of_time_sees_more_requests_than_the_limit() -> None:
    throttle = Throttle("it", concurrency=100, requests=5, window=0.05)
    times: list[float] = []
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            for _ in range(17):
                group.start_soon(pass_through, throttle, times)
    assert all(times[later] - times[later - 5] >= 0.05 for later in range(5, 17))
    assert 0.15 <= times[-1] - times[0] < 1  # 5 at once, 5, 5, 2


async def test_requests_pass_in_the_order_in_which_they_came() -> None:
    throttle = Throttle("it", concurrency=1, requests=2, window=0.01)
    order: list[int] = []

    async def go(number: int) -> None:
        async with throttle.turn():
            order.append(number)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            for number in range(9):
                group.start_soon(go, number)
    assert order == list(range(9))


async def test_the_wait_for_the_last_of_several_requests_is_foretold() -> None:
    throttle = Throttle("it", concurrency=100, requests=5, window=60)
    waits = [throttle.wait(requests) for requests in (1, 5, 6, 10, 11)]
    assert waits == pytest.approx([0, 0, 60, 60, 120], abs=0.5)
    times: list[float] = []
    for _ in range(3):
        await pass_through(throttle, times)
    waits = [throttle.wait(requests) for requests in (1, 2, 3, 5, 6, 7, 8)]
    assert waits == pytest.approx([0, 0, 60, 60, 60, 60, 120], abs=0.5)
    assert [throttle.capacity(seconds) for seconds in (0, 59, 60, 300)] == [5, 5, 10, 30]
    assert Throttle("it", concurrency=1, requests=math.inf).capacity(1) == math.inf


async def test_nobody_waits_for_a_turn_after_his_deadline() -> None:
    throttle = Throttle("the endpoint", concurrency=100, requests=1, window=60)
    times: list[float] = []
    await pass_through(throttle, times)
    with anyio.move_on_after(20) as scope, pytest.raises(Overloaded, match="the endpoint is busy") as caught:
        await pass_through(throttle, times)
    assert not scope.cancelled_caught
    assert caught.value.retry_after == pytest.approx(40, abs=1)
    assert len(times) == 1


async def test_whose_time_is_over_is_not_told_that_others_are_before_him() -> None:
    throttle = Throttle("it", concurrency=100, requests=1, window=60)
    times: list[float] = []
    await pass_through(throttle, times)
    with anyio.move_on_after(0) as scope:
        throttle.admit(1)
        await pass_through(throttle, times)
    assert scope.cancelled_caught
    assert len(times) == 1


async def test_slow_requests_before_a_place_are_counted_in_the_wait() -> None:
    throttle = Throttle("it", concurrency=1, requests=math.inf)
    release = anyio.Event()

    async def slowly() -> None:
        async with throttle.turn():
            await release.wait()

    throttle._seconds = 30
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(slowly)
            group.start_soon(slowly)
            await anyio.wait_all_tasks_blocked()
            with anyio.move_on_after(20), pytest.raises(Overloaded):
                await pass_through(throttle, [])
            release.set()


async def test_a_closed_throttle_lets_nobody_through_until_it_opens() -> None:
    throttle = Throttle("it", concurrency=100, requests=math.inf)
    times: list[float] = []
    begun = anyio.current_time()
    throttle.close_for(0.05)
    with anyio.fail_after(5):
        await pass_through(throttle, times)
    assert times[0] - begun >= 0.05


async def test_a_cancelled_wait_leaves_its_place_to_the_next() -> None:
    throttle = Throttle("it", concurrency=2, requests=1, window=60)
    with anyio.fail_after(5):
        await pass_through(throttle, [])
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(pass_through, throttle, [])
        await anyio.wait_all_tasks_blocked()
        assert throttle.wait(1) > 120
        group.cancel_scope.cancel()
    assert throttle.wait(1) <= 60

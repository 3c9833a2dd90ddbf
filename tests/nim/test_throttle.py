"""The throttle of an endpoint's requests."""

from __future__ import annotations

import math

import anyio
import pytest

from embeddings_mcp.embedders.nim.throttle import Throttle
from embeddings_mcp.errors import Overloaded

pytestmark = pytest.mark.anyio


async def pass_through(throttle: Throttle, times: list[float]) -> None:
    async with throttle.acquire():
        times.append(anyio.current_time())


async def test_no_sliding_window_exceeds_the_limit() -> None:
    throttle = Throttle("the endpoint", concurrency=100, max_requests=5, window=0.05)
    times: list[float] = []
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            for _ in range(17):
                group.start_soon(pass_through, throttle, times)
    assert all(times[later] - times[later - 5] >= 0.05 for later in range(5, 17))
    assert 0.15 <= times[-1] - times[0] < 1  # 5 at once, 5, 5, 2


async def test_requests_start_in_order_of_arrival() -> None:
    throttle = Throttle("the endpoint", concurrency=1, max_requests=2, window=0.01)
    order: list[int] = []

    async def record(number: int) -> None:
        async with throttle.acquire():
            order.append(number)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            for number in range(9):
                group.start_soon(record, number)
    assert order == list(range(9))


async def test_the_wait_for_the_last_of_several_requests_is_estimated() -> None:
    throttle = Throttle("the endpoint", concurrency=100, max_requests=5, window=60)
    waits = [throttle.estimated_wait(requests) for requests in (1, 5, 6, 10, 11)]
    assert waits == pytest.approx([0, 0, 60, 60, 120], abs=0.5)
    times: list[float] = []
    for _ in range(3):
        await pass_through(throttle, times)
    waits = [throttle.estimated_wait(requests) for requests in (1, 2, 3, 5, 6, 7, 8)]
    assert waits == pytest.approx([0, 0, 60, 60, 60, 60, 120], abs=0.5)
    assert [throttle.capacity(seconds) for seconds in (0, 59, 60, 300)] == [5, 5, 10, 30]
    assert Throttle("the endpoint", concurrency=1, max_requests=math.inf).capacity(1) == math.inf


async def test_a_request_that_cannot_start_before_its_deadline_is_refused_at_once() -> None:
    throttle = Throttle("the endpoint", concurrency=100, max_requests=1, window=60)
    times: list[float] = []
    await pass_through(throttle, times)
    with anyio.move_on_after(20) as scope, pytest.raises(Overloaded, match="the endpoint is busy") as caught:
        await pass_through(throttle, times)
    assert not scope.cancelled_caught
    assert caught.value.retry_after == pytest.approx(40, abs=1)
    assert len(times) == 1


async def test_a_caller_past_its_deadline_is_cancelled_rather_than_refused() -> None:
    throttle = Throttle("the endpoint", concurrency=100, max_requests=1, window=60)
    times: list[float] = []
    await pass_through(throttle, times)
    with anyio.move_on_after(0) as scope:
        throttle.admit(1)
        await pass_through(throttle, times)
    assert scope.cancelled_caught
    assert len(times) == 1


async def test_the_estimated_wait_follows_from_the_average_duration_of_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    throttle = Throttle("the endpoint", concurrency=2, max_requests=math.inf)
    now = 0.0
    monkeypatch.setattr(anyio, "current_time", lambda: now)
    for seconds in (10, 20):
        async with throttle.acquire():
            now += seconds
    assert [throttle.estimated_wait(requests) for requests in (1, 2, 3, 5)] == [0, 0, 12, 24]


async def test_the_duration_of_earlier_requests_counts_in_the_estimated_wait() -> None:
    throttle = Throttle("the endpoint", concurrency=1, max_requests=math.inf)
    release = anyio.Event()

    async def block() -> None:
        async with throttle.acquire():
            await release.wait()

    throttle._average_seconds = 30
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(block)
            group.start_soon(block)
            await anyio.wait_all_tasks_blocked()
            with anyio.move_on_after(20), pytest.raises(Overloaded):
                await pass_through(throttle, [])
            release.set()


async def test_a_waiting_request_is_refused_once_a_pause_exceeds_its_deadline() -> None:
    throttle = Throttle("the endpoint", concurrency=1, max_requests=math.inf)

    async def wait() -> None:
        with anyio.move_on_after(20) as scope, pytest.raises(Overloaded, match="the request to it would have to wait"):
            await pass_through(throttle, [])
        assert not scope.cancelled_caught

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group, throttle.acquire():
            group.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            throttle.pause_for(60)


async def test_a_paused_throttle_starts_no_request_until_the_pause_ends() -> None:
    throttle = Throttle("the endpoint", concurrency=100, max_requests=math.inf)
    times: list[float] = []
    start = anyio.current_time()
    throttle.pause_for(0.05)
    with anyio.fail_after(5):
        await pass_through(throttle, times)
    assert times[0] - start >= 0.05


async def test_a_cancelled_wait_frees_its_place_in_the_queue() -> None:
    throttle = Throttle("the endpoint", concurrency=2, max_requests=1, window=60)
    with anyio.fail_after(5):
        await pass_through(throttle, [])
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(pass_through, throttle, [])
        await anyio.wait_all_tasks_blocked()
        assert throttle.estimated_wait(1) > 120
        group.cancel_scope.cancel()
    assert throttle.estimated_wait(1) <= 60

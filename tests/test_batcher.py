"""The queue of a model: which requests share a batch, which go first, and that each gets its own results."""

from __future__ import annotations

import contextlib
import functools
import queue
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings_mcp.caller import with_caller_name
from embeddings_mcp.embedders.batcher import Batcher, Claim
from embeddings_mcp.errors import ModelUnavailable, Overloaded, ServerStopped
from tests.support import SECONDS, Clock, wait_until

STOPPED = ServerStopped()

BUDGET = 8


@dataclass
class Steps:
    """The `run` of a batcher: returns ``(kind, row)`` for each row, once the test lets the batch end."""

    started: queue.SimpleQueue[tuple[str, list[int]]] = field(default_factory=queue.SimpleQueue)
    may_end: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __call__(self, kind: str, rows: Sequence[Sequence[int]]) -> list[tuple[str, Sequence[int]]]:
        self.started.put((kind, [len(row) for row in rows]))
        assert self.may_end.acquire(timeout=SECONDS), "the test did not let the batch end"
        if any(13 in row for row in rows):
            raise ValueError("thirteen")
        return [(kind, row) for row in rows]

    async def next_batch(self) -> tuple[str, list[int]]:
        """Return kind and lengths of the next batch that starts."""
        return await anyio.to_thread.run_sync(lambda: self.started.get(timeout=SECONDS))


async def submit(
    batcher: Batcher[str, object],
    rows: Sequence[Sequence[int]],
    kind: str = "a",
    caller: str = "",
    *,
    at_once: int = 100,
    claim: Claim | None = None,
) -> list[object]:
    """Submit rows, `at_once` at a time; return the results in the order of the rows."""
    results: dict[int, object] = {}
    pieces = [rows[start : start + at_once] for start in range(0, len(rows), at_once)]

    async def more() -> Sequence[Sequence[int]]:
        await anyio.lowlevel.checkpoint()
        return pieces.pop(0) if pieces else ()

    def on_results(indices: Sequence[int], new: Sequence[object]) -> None:
        assert not results.keys() & set(indices), "a result was delivered twice"
        results.update(zip(indices, new, strict=True))

    with anyio.fail_after(SECONDS), with_caller_name(caller):
        await batcher.submit(kind, pieces.pop(0), on_results, more=more, claim=claim)
    return [results[index] for index in range(len(rows))]


async def until_queued(batcher: Batcher[str, object], tokens: int) -> None:
    await wait_until(lambda: batcher.queued_tokens == tokens)


async def checkpoints(count: int) -> None:
    """Let the event loop run this many times."""
    for _ in range(count):
        await anyio.lowlevel.checkpoint()


def row(length: int) -> list[int]:
    return [1] * length


@given(
    requests=st.lists(
        st.tuples(st.sampled_from("ab"), st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1)),
        min_size=1,
        max_size=5,
    ),
    workers=st.integers(1, 3),
    padded=st.booleans(),
    at_once=st.integers(1, 12),
)
def test_every_caller_gets_the_results_of_their_own_rows_in_order(
    requests: list[tuple[str, list[list[int]]]], workers: int, padded: bool, at_once: int
) -> None:
    sizes: list[int] = []

    def run(kind: str, rows: Sequence[Sequence[int]]) -> list[tuple[str, Sequence[int]]]:
        lengths = [len(row) for row in rows]
        sizes.append(max(lengths) * len(rows) if padded else sum(lengths))
        assert len(rows) == 1 or sizes[-1] <= BUDGET
        return [(kind, row) for row in rows]

    answers: dict[int, list[object]] = {}

    async def ask_all() -> None:
        batcher = Batcher[str, object](run, workers=workers, budget=BUDGET, padded=padded)

        async def ask(caller: int, kind: str, rows: list[list[int]]) -> None:
            answers[caller] = await submit(batcher, rows, kind, at_once=at_once)

        async with anyio.create_task_group() as callers:
            for caller, (kind, rows) in enumerate(requests):
                callers.start_soon(ask, caller, kind, rows)
        assert batcher.queued_tokens == 0
        batcher.close(STOPPED)

    anyio.run(ask_all)
    assert answers == {caller: [(kind, row) for row in rows] for caller, (kind, rows) in enumerate(requests)}


@settings(max_examples=50)
@given(
    requests=st.lists(
        st.tuples(
            st.lists(st.lists(st.integers(1, 13), min_size=1, max_size=9), min_size=1, max_size=9),
            st.integers(1, 4),  # rows submitted at a time
            st.integers(0, 12),  # steps of the event loop until it arrives
            st.integers(0, 12) | st.none(),  # steps until it is cancelled
        ),
        min_size=1,
        max_size=6,
    ),
    workers=st.integers(1, 3),
    closed_after=st.integers(0, 30) | st.none(),
)
def test_no_row_of_a_request_stays_in_the_queue_however_it_ends(
    requests: list[tuple[list[list[int]], int, int, int | None]], workers: int, closed_after: int | None
) -> None:
    claims: list[Claim] = []

    def run(kind: str, rows: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        if any(13 in row for row in rows):
            raise ValueError("thirteen")
        return list(rows)

    async def ask(batcher: Batcher[str, object], rows: list[list[int]], at_once: int) -> None:
        remaining = list(rows)

        async def more() -> list[list[int]]:
            await checkpoints(1)
            piece, remaining[:] = remaining[:at_once], remaining[at_once:]
            claim.expected -= sum(map(len, piece))
            return piece

        with (
            contextlib.suppress(ValueError, Overloaded, ServerStopped),
            batcher.admit(id(rows), sum(map(len, rows))) as claim,
        ):
            claims.append(claim)
            await batcher.submit("a", await more(), lambda _indices, _results: None, more=more, claim=claim)

    async def ask_all() -> None:
        batcher = Batcher[str, object](run, workers=workers, budget=BUDGET, max_queued_tokens=40)

        async def come_and_go(rows: list[list[int]], at_once: int, arrives: int, leaves: int | None) -> None:
            await checkpoints(arrives)
            async with anyio.create_task_group() as caller:
                caller.start_soon(ask, batcher, rows, at_once)
                if leaves is not None:
                    await checkpoints(leaves)
                    caller.cancel_scope.cancel()

        with anyio.fail_after(SECONDS):
            async with anyio.create_task_group() as callers:
                for request in requests:
                    callers.start_soon(come_and_go, *request)
                if closed_after is not None:
                    await checkpoints(closed_after)
                    batcher.close(STOPPED)
        assert batcher.queued_tokens == 0
        batcher.close(STOPPED)

    anyio.run(ask_all)
    assert all(claim.waiting == 0 for claim in claims)


@pytest.mark.anyio
async def test_waiting_requests_share_a_batch_up_to_the_token_budget() -> None:
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=1, budget=BUDGET)
    async with anyio.create_task_group() as callers:
        callers.start_soon(submit, batcher, [row(1)])
        assert await steps.next_batch() == ("a", [1])
        for length in (2, 3, 3, 4):
            callers.start_soon(submit, batcher, [row(length)])
        await until_queued(batcher, 12)
        steps.may_end.release(100)
        assert await steps.next_batch() == ("a", [3, 3, 2])
        assert await steps.next_batch() == ("a", [4])


@pytest.mark.anyio
async def test_rows_of_another_kind_get_a_batch_of_their_own() -> None:
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=1, budget=BUDGET)
    async with anyio.create_task_group() as callers:
        callers.start_soon(submit, batcher, [row(1)], "a")
        await steps.next_batch()
        callers.start_soon(submit, batcher, [row(1)], "b")
        callers.start_soon(submit, batcher, [row(2)], "a")
        await until_queued(batcher, 3)
        steps.may_end.release(100)
        assert [await steps.next_batch(), await steps.next_batch()] == [("b", [1]), ("a", [2])]


@pytest.mark.anyio
async def test_a_query_overtakes_bulk_and_bulk_makes_progress_among_queries() -> None:
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=1, budget=4)
    async with anyio.create_task_group() as callers:
        callers.start_soon(submit, batcher, [row(4)] * 4)
        assert await steps.next_batch() == ("a", [4])
        for _ in range(8):
            callers.start_soon(submit, batcher, [row(3)])
        await until_queued(batcher, 12 + 24)
        steps.may_end.release(100)
        order = [(await steps.next_batch())[1] for _ in range(11)]
    assert order[0] == [3], "the first query waited for one batch only"
    assert order.index([4]) < 4, "bulk made progress before the queries ended"


@pytest.mark.anyio
async def test_as_many_batches_run_at_once_as_there_are_workers() -> None:
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=2, budget=BUDGET)
    async with anyio.create_task_group() as callers:
        callers.start_soon(submit, batcher, [row(8)] * 3)
        assert [await steps.next_batch(), await steps.next_batch()] == [("a", [8])] * 2
        assert batcher.queued_tokens == 8
        steps.may_end.release(3)


@pytest.mark.anyio
async def test_a_worker_takes_its_next_batch_while_the_event_loop_is_busy() -> None:
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=1, budget=BUDGET)
    async with anyio.create_task_group() as callers:
        callers.start_soon(submit, batcher, [row(8), row(7)])
        assert await steps.next_batch() == ("a", [8])
        steps.may_end.release()
        assert steps.started.get(timeout=SECONDS) == ("a", [7]), "waited for here, so that the event loop is blocked"
        steps.may_end.release()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("texts", "batches"),
    [([row(100)] * 12, [6, 3, 2, 1]), ([row(50)] * 4, [4])],
    ids=["a fraction of what is left each time", "all, if it is too little for two"],
)
async def test_workers_share_the_queue(texts: list[list[int]], batches: list[int]) -> None:
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=2, budget=2048, min_share=256)
    async with anyio.create_task_group() as callers:
        callers.start_soon(submit, batcher, texts)
        first = [len((await steps.next_batch())[1]) for _ in batches[:2]]
        assert sorted(first, reverse=True) == batches[:2], "at the same time, and started in any order"
        for size in batches[2:]:
            steps.may_end.release()
            assert len((await steps.next_batch())[1]) == size
        steps.may_end.release(2)


@pytest.mark.anyio
async def test_requests_that_arrive_together_share_a_batch_even_if_a_worker_is_idle() -> None:
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=1, budget=BUDGET)
    async with anyio.create_task_group() as callers:
        for length in (1, 2, 3):
            callers.start_soon(submit, batcher, [row(length)])
        assert await steps.next_batch() == ("a", [3, 2, 1])
        steps.may_end.release()


@pytest.mark.anyio
async def test_cancelling_a_request_removes_its_rows_from_the_queue() -> None:
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=1, budget=BUDGET)
    async with anyio.create_task_group() as leaving:
        leaving.start_soon(submit, batcher, [row(8)] * 5)
        await steps.next_batch()
        leaving.cancel_scope.cancel()
    assert batcher.queued_tokens == 0
    steps.may_end.release(2)
    assert await submit(batcher, [row(2)]) == [("a", row(2))]
    assert steps.started.get_nowait() == ("a", [2])


@pytest.mark.anyio
async def test_a_failed_batch_fails_the_requests_whose_rows_it_had() -> None:
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=1, budget=BUDGET)
    steps.may_end.release(100)
    with pytest.raises(ValueError, match="thirteen"):
        await submit(batcher, [[13], row(8), row(8)])
    assert batcher.queued_tokens == 0
    assert await submit(batcher, [row(2)]) == [("a", row(2))]


@pytest.mark.anyio
async def test_a_full_queue_refuses_with_retry_after() -> None:
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=1, budget=BUDGET, max_queued_tokens=20)
    async with anyio.create_task_group() as callers:
        callers.start_soon(submit, batcher, [row(8)] * 3)
        await steps.next_batch()
        with pytest.raises(Overloaded, match="16 tokens wait already") as refused, batcher.admit("newcomer", 8):
            pass
        assert refused.value.retry_after == 1
        steps.may_end.release(100)


def test_expected_tokens_take_capacity_until_they_are_queued() -> None:
    batcher = Batcher[str, object](Steps(), workers=1, budget=BUDGET, max_queued_tokens=20)
    with (
        batcher.admit("first", 16),
        pytest.raises(Overloaded, match="16 tokens wait already"),
        batcher.admit("second", 8),
    ):
        pass
    with batcher.admit("first", 16) as claim:
        claim.expected -= 10
        with batcher.admit("second", 8):
            pass
    with batcher.admit("second", 20):
        pass


@pytest.mark.anyio
async def test_a_request_larger_than_the_queue_is_admitted_when_the_queue_is_empty() -> None:
    steps = Steps()
    steps.may_end.release(100)
    batcher = Batcher[str, object](steps, workers=1, budget=BUDGET, max_queued_tokens=20)
    with batcher.admit("large", 48):
        pass
    assert len(await submit(batcher, [row(8)] * 6)) == 6


@pytest.mark.anyio
async def test_a_request_larger_than_the_queue_leaves_capacity_to_others() -> None:
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=1, budget=BUDGET, max_queued_tokens=20)
    async with anyio.create_task_group() as callers:
        with batcher.admit("large", 48) as claim:
            callers.start_soon(functools.partial(submit, batcher, [row(8)] * 4, claim=claim))
            await until_queued(batcher, 24)
            claim.expected -= 32
            with (
                batcher.admit("small", 5),
                pytest.raises(Overloaded, match="45 tokens wait"),
                batcher.admit("another", 1),
            ):
                pass
            steps.may_end.release(100)
    with batcher.admit("later", 20):
        pass


@pytest.mark.anyio
async def test_rows_whose_batch_fails_after_closing_fail_with_the_reason_for_closing() -> None:
    """Closing a model ends its process, so the batch that it computes fails too; its caller may still be tokenizing."""
    workers: queue.SimpleQueue[threading.Thread] = queue.SimpleQueue()
    closed, tokenized = threading.Event(), anyio.Event()

    def run(_kind: str, _rows: Sequence[Sequence[int]]) -> list[object]:
        workers.put(threading.current_thread())
        assert closed.wait(SECONDS)
        raise ModelUnavailable("the process was ended by SIGKILL")

    batcher = Batcher[str, object](run, workers=1, budget=BUDGET)

    async def more() -> Sequence[Sequence[int]]:
        await tokenized.wait()
        return [row(1)]

    async def ask() -> None:
        with pytest.raises(ServerStopped):
            await batcher.submit("a", [row(1)], lambda _indices, _results: None, more=more)

    async with anyio.create_task_group() as callers:
        callers.start_soon(ask)
        worker = await anyio.to_thread.run_sync(lambda: workers.get(timeout=SECONDS))
        batcher.close(STOPPED)
        closed.set()
        await anyio.to_thread.run_sync(worker.join, SECONDS)
        tokenized.set()


@pytest.mark.anyio
async def test_closing_fails_waiting_rows_and_refuses_new_ones() -> None:
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=1, budget=BUDGET)

    async def ask() -> None:
        with pytest.raises(ServerStopped):
            await submit(batcher, [row(8)] * 3)

    async with anyio.create_task_group() as callers:
        callers.start_soon(ask)
        await steps.next_batch()
        batcher.close(STOPPED)
        steps.may_end.release(100)
    assert steps.started.empty()
    with pytest.raises(ServerStopped):
        await submit(batcher, [row(1)])


@pytest.mark.anyio
@pytest.mark.parametrize("requests", [1, 2_000], ids=["in one request", "each in one of its own"])
async def test_a_query_waits_for_one_batch_however_many_texts_another_caller_sent(requests: int) -> None:
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=1, budget=4)
    texts = 2_000
    async with anyio.create_task_group() as callers:
        for _ in range(requests):
            callers.start_soon(submit, batcher, [row(4)] * (texts // requests), "a", "bulk")
        await until_queued(batcher, 4 * (texts - 1))
        steps.may_end.release(20)
        for _ in range(21):
            await steps.next_batch()
        callers.start_soon(submit, batcher, [row(3)], "a", "query")
        await until_queued(batcher, 4 * (texts - 21) + 3)
        steps.may_end.release(1)
        assert await steps.next_batch() == ("a", [3])
        callers.cancel_scope.cancel()
    steps.may_end.release(1)


@pytest.mark.anyio
async def test_the_tokens_served_to_a_caller_are_forgotten_after_their_last_request() -> None:
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=1, budget=BUDGET)
    steps.may_end.release(1)
    await submit(batcher, [row(8)], caller="again")
    await steps.next_batch()
    async with anyio.create_task_group() as callers:
        callers.start_soon(submit, batcher, [row(8)], "a", "blocking")
        await steps.next_batch()
        callers.start_soon(submit, batcher, [row(5)], "a", "again")
        await until_queued(batcher, 5)
        callers.start_soon(submit, batcher, [row(6)], "a", "new")
        await until_queued(batcher, 11)
        steps.may_end.release(3)
        assert [(await steps.next_batch())[1] for _ in range(2)] == [[5], [6]]


@pytest.mark.anyio
async def test_the_cost_of_a_request_does_not_grow_with_the_number_of_others() -> None:
    others = 1_000
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in {"call", "c_call"}

    steps = Steps()
    batcher = Batcher[str, object](steps, workers=1, budget=others)
    async with anyio.create_task_group() as callers:
        for caller in range(others):
            callers.start_soon(submit, batcher, [row(1)], "a", str(caller))
        assert await steps.next_batch() == ("a", [1] * others)
        before = sys.getprofile()
        sys.setprofile(count)
        try:
            with batcher.admit("newcomer", 1) as claim:
                await batcher.submit("a", [], lambda _indices, _results: None, claim=claim)
        finally:
            sys.setprofile(before)
        steps.may_end.release()
    assert 0 < calls < others


@pytest.mark.anyio
@pytest.mark.parametrize(("workers", "waits"), [(1, [2, 4, 7]), (2, [1, 2, 4])])
async def test_retry_after_follows_the_measured_throughput_of_the_workers(
    monkeypatch: pytest.MonkeyPatch, workers: int, waits: list[float]
) -> None:
    """The 2 s of work of the request before, and a third more; half of that with two workers."""
    clock = Clock()
    monkeypatch.setattr("embeddings_mcp.embedders.batcher.time", clock)
    monkeypatch.setattr("embeddings_mcp.reservations.time", clock)
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=workers, budget=BUDGET, max_queued_tokens=20)
    retry_after = []
    async with anyio.create_task_group() as callers:
        callers.start_soon(submit, batcher, [row(8)])
        await steps.next_batch()
        clock.now += 2
        steps.may_end.release()
    async with anyio.create_task_group() as callers:
        for _ in range(workers + 2):
            callers.start_soon(submit, batcher, [row(8)])
        for _ in range(workers):
            await steps.next_batch()
        for caller in ("first", "second", "third"):
            with pytest.raises(Overloaded) as refused, batcher.admit(caller, 8):
                pass
            retry_after.append(refused.value.retry_after)
        steps.may_end.release(100)
    assert retry_after == waits
    clock.now += retry_after[0]
    with batcher.admit("first", 8), batcher.admit("new, next to the reservation of the second", 4):
        pass


@pytest.mark.anyio
async def test_a_worker_that_dies_is_replaced_and_its_requests_are_answered() -> None:
    class Gone(BaseException):
        """An exception that no code is expected to catch."""

    deaths = [Gone(), None]

    def run(kind: str, rows: Sequence[Sequence[int]]) -> list[tuple[str, Sequence[int]]]:
        if death := deaths.pop(0):
            raise death
        return [(kind, row) for row in rows]

    batcher = Batcher[str, object](run, workers=1, budget=BUDGET)
    with pytest.raises(ModelUnavailable, match="Gone"):
        await submit(batcher, [row(2)])
    assert await submit(batcher, [row(2)]) == [("a", row(2))]


@pytest.mark.anyio
async def test_a_worker_whose_preparation_fails_is_replaced_too(caplog: pytest.LogCaptureFixture) -> None:
    failures = [OSError("no such core"), None, None]

    def prepare() -> None:
        if failure := failures.pop(0):
            raise failure

    steps = Steps()
    steps.may_end.release(10)
    batcher = Batcher[str, object](steps, workers=1, budget=BUDGET, prepare_worker=prepare)
    async with anyio.create_task_group() as others:
        others.start_soon(submit, batcher, [row(3)], "waiting")
        with pytest.raises(ModelUnavailable):
            await submit(batcher, [row(2)])
    assert await submit(batcher, [row(2)]) == [("a", row(2))]


@pytest.mark.anyio
async def test_requests_fail_if_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps()
    steps.may_end.release(10)
    batcher = Batcher[str, object](steps, workers=1, budget=BUDGET)
    with monkeypatch.context() as patch:

        def start(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr("concurrent.futures.thread.threading.Thread.start", start)
        with pytest.raises(ModelUnavailable, match="can't start new thread"):
            await batcher.submit("a", [row(2)], lambda _indices, _results: None)
    assert batcher.queued_tokens == 0
    assert await submit(batcher, [row(2)]) == [("a", row(2))]

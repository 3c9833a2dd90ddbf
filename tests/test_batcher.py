"""The queue before a model: who shares a batch, who goes first, and that everybody gets his own."""

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
from tests.support import SECONDS, Clock, until

STOPPED = ServerStopped()

BUDGET = 8


@dataclass
class Steps:
    """What a batcher runs: it makes ``(kind, row)`` of every row, once the test lets the batch end."""

    begun: queue.SimpleQueue[tuple[str, list[int]]] = field(default_factory=queue.SimpleQueue)
    may_end: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __call__(self, kind: str, rows: Sequence[Sequence[int]]) -> list[tuple[str, Sequence[int]]]:
        self.begun.put((kind, [len(row) for row in rows]))
        assert self.may_end.acquire(timeout=SECONDS), "the test did not let the batch end"
        if any(13 in row for row in rows):
            raise ValueError("thirteen")
        return [(kind, row) for row in rows]

    async def next_batch(self) -> tuple[str, list[int]]:
        """Kind and lengths of the next batch that begins."""
        return await anyio.to_thread.run_sync(lambda: self.begun.get(timeout=SECONDS))


async def submit(
    batcher: Batcher[str, object],
    rows: Sequence[Sequence[int]],
    kind: str = "a",
    caller: str = "",
    *,
    at_once: int = 100,
    claim: Claim | None = None,
) -> list[object]:
    """The results in the rows' order, which are brought so many at once."""
    results: dict[int, object] = {}
    pieces = [rows[start : start + at_once] for start in range(0, len(rows), at_once)]

    async def bring() -> Sequence[Sequence[int]]:
        await anyio.lowlevel.checkpoint()
        return pieces.pop(0) if pieces else ()

    def take(places: Sequence[int], made: Sequence[object]) -> None:
        assert not results.keys() & set(places), "a result was given twice"
        results.update(zip(places, made, strict=True))

    with anyio.fail_after(SECONDS), with_caller_name(caller):
        await batcher.submit(kind, pieces.pop(0), take, more=bring, claim=claim)
    return [results[index] for index in range(len(rows))]


async def until_queued(batcher: Batcher[str, object], tokens: int) -> None:
    await until(lambda: batcher.queued_tokens == tokens)


async def checkpoints(count: int) -> None:
    """Let the event loop go on so often."""
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
def test_every_caller_gets_the_results_of_his_own_rows_in_their_order(
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
            st.integers(1, 4),  # rows that are brought at once
            st.integers(0, 12),  # steps of the event loop until it comes
            st.integers(0, 12) | st.none(),  # steps until it is cancelled
        ),
        min_size=1,
        max_size=6,
    ),
    workers=st.integers(1, 3),
    closed_after=st.integers(0, 30) | st.none(),
)
def test_nothing_of_a_request_is_left_in_the_queue_however_it_ends(
    requests: list[tuple[list[list[int]], int, int, int | None]], workers: int, closed_after: int | None
) -> None:
    claims: list[Claim] = []

    def run(kind: str, rows: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        if any(13 in row for row in rows):
            raise ValueError("thirteen")
        return list(rows)

    async def ask(batcher: Batcher[str, object], rows: list[list[int]], at_once: int) -> None:
        left = list(rows)

        async def bring() -> list[list[int]]:
            await checkpoints(1)
            piece, left[:] = left[:at_once], left[at_once:]
            claim.expected -= sum(map(len, piece))
            return piece

        with (
            contextlib.suppress(ValueError, Overloaded, ServerStopped),
            batcher.expecting(id(rows), sum(map(len, rows))) as claim,
        ):
            claims.append(claim)
            await batcher.submit("a", await bring(), lambda _places, _made: None, more=bring, claim=claim)

    async def ask_all() -> None:
        batcher = Batcher[str, object](run, workers=workers, budget=BUDGET, max_queued_tokens=40)

        async def come_and_go(rows: list[list[int]], at_once: int, comes: int, goes: int | None) -> None:
            await checkpoints(comes)
            async with anyio.create_task_group() as caller:
                caller.start_soon(ask, batcher, rows, at_once)
                if goes is not None:
                    await checkpoints(goes)
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
async def test_requests_that_wait_share_a_batch_up_to_the_budget() -> None:
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
async def test_texts_of_another_kind_wait_for_a_batch_of_their_own() -> None:
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
async def test_a_query_overtakes_bulk_and_bulk_gets_on_under_queries() -> None:
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
    assert order.index([4]) < 4, "bulk went on before the queries ended"


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
async def test_a_worker_goes_on_with_what_waits_while_the_event_loop_is_busy() -> None:
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=1, budget=BUDGET)
    async with anyio.create_task_group() as callers:
        callers.start_soon(submit, batcher, [row(8), row(7)])
        assert await steps.next_batch() == ("a", [8])
        steps.may_end.release()
        assert steps.begun.get(timeout=SECONDS) == ("a", [7]), "waited for here, so that the loop can do nothing else"
        steps.may_end.release()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("texts", "batches"),
    [([row(100)] * 12, [6, 3, 2, 1]), ([row(50)] * 4, [4])],
    ids=["a part of what is left each time", "all, where it is too little for two"],
)
async def test_workers_share_what_waits(texts: list[list[int]], batches: list[int]) -> None:
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=2, budget=2048, least_share=256)
    async with anyio.create_task_group() as callers:
        callers.start_soon(submit, batcher, texts)
        first = [len((await steps.next_batch())[1]) for _ in batches[:2]]
        assert sorted(first, reverse=True) == batches[:2], "side by side, and begun in any order"
        for size in batches[2:]:
            steps.may_end.release()
            assert len((await steps.next_batch())[1]) == size
        steps.may_end.release(2)


@pytest.mark.anyio
async def test_requests_that_come_in_together_share_a_batch_also_when_a_worker_is_idle() -> None:
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=1, budget=BUDGET)
    async with anyio.create_task_group() as callers:
        for length in (1, 2, 3):
            callers.start_soon(submit, batcher, [row(length)])
        assert await steps.next_batch() == ("a", [3, 2, 1])
        steps.may_end.release()


@pytest.mark.anyio
async def test_a_caller_who_leaves_takes_his_texts_out_of_the_queue() -> None:
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=1, budget=BUDGET)
    async with anyio.create_task_group() as leaving:
        leaving.start_soon(submit, batcher, [row(8)] * 5)
        await steps.next_batch()
        leaving.cancel_scope.cancel()
    assert batcher.queued_tokens == 0
    steps.may_end.release(2)
    assert await submit(batcher, [row(2)]) == [("a", row(2))]
    assert steps.begun.get_nowait() == ("a", [2])


@pytest.mark.anyio
async def test_a_batch_that_fails_fails_those_whose_texts_it_held() -> None:
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=1, budget=BUDGET)
    steps.may_end.release(100)
    with pytest.raises(ValueError, match="thirteen"):
        await submit(batcher, [[13], row(8), row(8)])
    assert batcher.queued_tokens == 0
    assert await submit(batcher, [row(2)]) == [("a", row(2))]


@pytest.mark.anyio
async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=1, budget=BUDGET, max_queued_tokens=20)
    async with anyio.create_task_group() as callers:
        callers.start_soon(submit, batcher, [row(8)] * 3)
        await steps.next_batch()
        with pytest.raises(Overloaded, match="16 tokens wait already") as refused, batcher.expecting("newcomer", 8):
            pass
        assert refused.value.retry_after == 1
        steps.may_end.release(100)


def test_what_is_expected_takes_room_too_until_it_is_there() -> None:
    batcher = Batcher[str, object](Steps(), workers=1, budget=BUDGET, max_queued_tokens=20)
    with (
        batcher.expecting("first", 16),
        pytest.raises(Overloaded, match="16 tokens wait already"),
        batcher.expecting("second", 8),
    ):
        pass
    with batcher.expecting("first", 16) as claim:
        claim.expected -= 10
        with batcher.expecting("second", 8):
            pass
    with batcher.expecting("second", 20):
        pass


@pytest.mark.anyio
async def test_a_request_larger_than_the_queue_is_taken_when_nothing_waits() -> None:
    steps = Steps()
    steps.may_end.release(100)
    batcher = Batcher[str, object](steps, workers=1, budget=BUDGET, max_queued_tokens=20)
    with batcher.expecting("large", 48):
        pass
    assert len(await submit(batcher, [row(8)] * 6)) == 6


@pytest.mark.anyio
async def test_a_request_larger_than_the_queue_leaves_room_to_others() -> None:
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=1, budget=BUDGET, max_queued_tokens=20)
    async with anyio.create_task_group() as callers:
        with batcher.expecting("large", 48) as claim:
            callers.start_soon(functools.partial(submit, batcher, [row(8)] * 4, claim=claim))
            await until_queued(batcher, 24)
            claim.expected -= 32
            with (
                batcher.expecting("small", 5),
                pytest.raises(Overloaded, match="45 tokens wait"),
                batcher.expecting("another", 1),
            ):
                pass
            steps.may_end.release(100)
    with batcher.expecting("later", 20):
        pass


@pytest.mark.anyio
async def test_closing_fails_what_waits_and_takes_no_more() -> None:
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
    assert steps.begun.empty()
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
async def test_what_a_caller_was_served_is_forgotten_once_nothing_of_his_is_left() -> None:
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=1, budget=BUDGET)
    steps.may_end.release(1)
    await submit(batcher, [row(8)], caller="again")
    await steps.next_batch()
    async with anyio.create_task_group() as callers:
        callers.start_soon(submit, batcher, [row(8)], "a", "who holds up the others")
        await steps.next_batch()
        callers.start_soon(submit, batcher, [row(5)], "a", "again")
        await until_queued(batcher, 5)
        callers.start_soon(submit, batcher, [row(6)], "a", "new")
        await until_queued(batcher, 11)
        steps.may_end.release(3)
        assert [(await steps.next_batch())[1] for _ in range(2)] == [[5], [6]]


@pytest.mark.anyio
async def test_a_request_comes_and_goes_without_a_step_for_each_other_that_is_there() -> None:
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
            with batcher.expecting("newcomer", 1) as claim:
                await batcher.submit("a", [], lambda _places, _made: None, claim=claim)
        finally:
            sys.setprofile(before)
        steps.may_end.release()
    assert 0 < calls < others


@pytest.mark.anyio
@pytest.mark.parametrize(("workers", "waits"), [(1, [2, 4, 7]), (2, [1, 2, 4])])
async def test_those_who_are_refused_are_asked_back_as_fast_as_the_workers_are_seen_to_be(
    monkeypatch: pytest.MonkeyPatch, workers: int, waits: list[float]
) -> None:
    """After the 2 s of work that the one before him brings, and a third more; in half of the time where two work."""
    clock = Clock()
    monkeypatch.setattr("embeddings_mcp.embedders.batcher.time", clock)
    monkeypatch.setattr("embeddings_mcp.reservations.time", clock)
    steps = Steps()
    batcher = Batcher[str, object](steps, workers=workers, budget=BUDGET, max_queued_tokens=20)
    told = []
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
            with pytest.raises(Overloaded) as refused, batcher.expecting(caller, 8):
                pass
            told.append(refused.value.retry_after)
        steps.may_end.release(100)
    assert told == waits
    clock.now += told[0]
    with batcher.expecting("first", 8), batcher.expecting("newcomer, besides whom a place is kept for the second", 4):
        pass


@pytest.mark.anyio
async def test_a_worker_that_dies_is_replaced_and_its_requests_are_answered() -> None:
    class Gone(BaseException):
        """What no code is expected to catch."""

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
async def test_a_thread_that_cannot_be_prepared_is_replaced_too(caplog: pytest.LogCaptureFixture) -> None:
    failures = [OSError("no such core"), None, None]

    def prepare() -> None:
        if failure := failures.pop(0):
            raise failure

    steps = Steps()
    steps.may_end.release(10)
    batcher = Batcher[str, object](steps, workers=1, budget=BUDGET, prepare_worker=prepare)
    async with anyio.create_task_group() as others:
        others.start_soon(submit, batcher, [row(3)], "who waits meanwhile")
        with pytest.raises(ModelUnavailable):
            await submit(batcher, [row(2)])
    assert await submit(batcher, [row(2)]) == [("a", row(2))]


@pytest.mark.anyio
async def test_where_no_thread_can_be_started_requests_are_answered_so(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps()
    steps.may_end.release(10)
    batcher = Batcher[str, object](steps, workers=1, budget=BUDGET)
    with monkeypatch.context() as patch:

        def start(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr("concurrent.futures.thread.threading.Thread.start", start)
        with pytest.raises(ModelUnavailable, match="can't start new thread"):
            await batcher.submit("a", [row(2)], lambda places, made: None)
    assert batcher.queued_tokens == 0
    assert await submit(batcher, [row(2)]) == [("a", row(2))]

"""One queue for a model: texts of all requests, put together into batches for the workers that run it.

A request's texts wait here as rows of token ids. Whenever a worker is free, the next batch is made of whatever waits
then, up to the token budget: so a lone query goes at once, many at a time share a batch, and a large request fills
batches of its own. Who has been served least comes first, so that a query overtakes bulk; every fourth batch begins
with whoever has waited longest, so that bulk gets on however many queries come.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from embeddings_mcp.embedders.base import OnProgress
from embeddings_mcp.errors import Overloaded, ServerStopped

Row = Sequence[int]
Kind = TypeVar("Kind", bound=Hashable)
Result = TypeVar("Result")

OnResults = Callable[[Sequence[int], Sequence[Result]], None]
"""Given, on the event loop, the positions of some rows and what was made of them."""

MAX_QUEUED_TOKENS = 4_000_000
"""Tokens that may wait for one model: some minutes of work on a CPU, and some 100 MB of token ids."""


@dataclass(eq=False)
class _Job(Generic[Kind, Result]):
    """The texts of one request.

    Attributes:
        kind: what is to be made of them; only texts of one kind share a batch.
        rows: their token ids.
        waiting: positions of those that no batch holds yet, the longest last.
        fresh: positions and results of those that are made, and that the caller has not been given yet.
        served: tokens that batches hold or held.
        changed: set whenever `fresh` or `failure` is.
        failure: why there will be no results.
    """

    kind: Kind
    rows: Sequence[Row]
    waiting: list[int]
    fresh: list[tuple[int, Result]] = field(default_factory=list)
    served: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    failure: Exception | None = None


class Batcher(Generic[Kind, Result]):
    """The queue of one model, and its workers.

    Args:
        run: makes the results of some rows of one kind, in their order; called on a worker thread, with neighbours of
            equal length side by side.
        workers: how many batches run at the same time.
        budget: tokens of one batch.
        padded: whether a row costs as many tokens as the longest of its batch.
        prepare_worker: called once on each worker thread.

    Attributes:
        queued_tokens: tokens that wait for a worker.
    """

    def __init__(
        self,
        run: Callable[[Kind, Sequence[Row]], Sequence[Result]],
        *,
        workers: int,
        budget: int,
        padded: bool = False,
        prepare_worker: Callable[[], None] | None = None,
    ) -> None:
        self._run = run
        self._budget = budget
        self._padded = padded
        self._jobs: list[_Job[Kind, Result]] = []  # in order of arrival
        self._idle = workers
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="encode", initializer=prepare_worker)
        self._least_served_first = itertools.cycle([True, True, True, False])
        self._tokens_per_second = 0.0
        self._closed = False
        self.queued_tokens = 0

    async def submit(
        self, kind: Kind, rows: Sequence[Row], on_results: OnResults[Result], on_progress: OnProgress | None = None
    ) -> None:
        """Have the results of `rows` made. Cancelling the call takes out of the queue what has not begun.

        Args:
            kind: what is to be made; rows of one kind share batches.
            rows: token ids of the texts.
            on_results: given every result once, as soon as it is there.
            on_progress: told how many are there.

        Raises:
            Overloaded: too much waits already.
            ServerStopped: the queue is closed.
            Exception: whatever `run` raised.
        """
        if self._closed:
            raise ServerStopped("the server is shutting down")
        tokens = sum(map(len, rows))
        self._check_room(tokens)
        self.queued_tokens += tokens
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        job = _Job[Kind, Result](kind, rows, order)
        self._jobs.append(job)
        self._start_batches()
        try:
            done = 0
            while done < len(rows):
                await job.changed.wait()
                job.changed.clear()
                fresh, job.fresh = job.fresh, []
                on_results([index for index, _ in fresh], [result for _, result in fresh])
                if job.failure is not None:
                    raise job.failure
                done += len(fresh)
                if on_progress is not None:
                    await on_progress(done)
        finally:
            self._drop_waiting(job)
            self._jobs.remove(job)

    def close(self) -> None:
        """Take no more; what waits fails, what runs ends by itself."""
        self._closed = True
        for job in self._jobs:
            self._fail(job, ServerStopped("the server is shutting down"))
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _check_room(self, tokens: int) -> None:
        queued = self.queued_tokens
        # What is more than the queue holds is taken all the same when nothing else waits: it would never find room.
        if queued and queued + tokens > MAX_QUEUED_TOKENS:
            seconds = queued / self._tokens_per_second if self._tokens_per_second else 1.0
            raise Overloaded(
                f"{queued:,} tokens wait already, and of these {tokens:,} there is no room: try again in "
                f"{max(1, round(seconds))} s, or send fewer texts at once",
                retry_after=max(1.0, seconds),
            )

    def _start_batches(self) -> None:
        """Give every idle worker a batch, while anything waits."""
        loop = asyncio.get_running_loop()
        while self._idle and any(job.waiting for job in self._jobs):
            batch = self._next_batch()
            self._idle -= 1
            began = time.perf_counter()
            kind = batch[0][0].kind
            running = loop.run_in_executor(self._executor, self._run, kind, [job.rows[index] for job, index in batch])
            running.add_done_callback(functools.partial(self._finish, batch, began))

    def _next_batch(self) -> list[tuple[_Job[Kind, Result], int]]:
        """What goes next, the longest rows first; taken out of the queue."""
        waiting = [job for job in self._jobs if job.waiting]
        if next(self._least_served_first):
            waiting.sort(key=lambda job: job.served)
        kind = waiting[0].kind
        batch: list[tuple[_Job[Kind, Result], int]] = []
        spent = longest = 0
        for job in waiting:
            while job.kind == kind and job.waiting:
                length = len(job.rows[job.waiting[-1]])
                longest = max(longest, length)
                cost = longest * (len(batch) + 1) if self._padded else spent + length
                if batch and cost > self._budget:
                    break
                batch.append((job, job.waiting.pop()))
                job.served += length
                spent += length
        self.queued_tokens -= spent
        return sorted(batch, key=lambda entry: len(entry[0].rows[entry[1]]), reverse=True)

    def _finish(
        self, batch: Sequence[tuple[_Job[Kind, Result], int]], began: float, done: asyncio.Future[Sequence[Result]]
    ) -> None:
        """Hand out what a worker made, and give it the next batch."""
        self._idle += 1
        if done.cancelled():
            return
        failure = done.exception()
        if failure is None:
            tokens = sum(len(job.rows[index]) for job, index in batch)
            self._tokens_per_second = tokens / max(time.perf_counter() - began, 1e-6)
            for (job, index), result in zip(batch, done.result(), strict=True):
                job.fresh.append((index, result))
                job.changed.set()
        else:
            for job in {id(job): job for job, _ in batch}.values():
                self._fail(job, failure if isinstance(failure, Exception) else RuntimeError(str(failure)))
        if not self._closed:
            self._start_batches()

    def _fail(self, job: _Job[Kind, Result], failure: Exception) -> None:
        self._drop_waiting(job)
        job.failure = failure
        job.changed.set()

    def _drop_waiting(self, job: _Job[Kind, Result]) -> None:
        self.queued_tokens -= sum(len(job.rows[index]) for index in job.waiting)
        job.waiting.clear()

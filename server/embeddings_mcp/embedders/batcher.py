"""One queue for a model: texts of all requests, put together into batches for the workers that run it.

A request's texts wait here as rows of token ids. Whenever a worker is free, the next batch is made of its share of what
waits then, up to the token budget: so a lone query goes at once, many at a time share a batch, and a large request
fills batches of its own. A worker takes its next batch itself, since the event loop may be busy for as long as a small
batch takes.

Who has been served least comes first, first among callers and then among a caller's requests, so that a query overtakes
bulk, in one request or in a thousand; every fourth batch begins with whoever has waited longest, so that bulk gets on
however many queries come.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

from embeddings_mcp import telemetry
from embeddings_mcp.caller import caller_name
from embeddings_mcp.embedders.base import OnProgress
from embeddings_mcp.errors import EmbeddingsError, ModelUnavailable, Overloaded
from embeddings_mcp.reservations import Reservations

Row = Sequence[int]
Kind = TypeVar("Kind", bound=Hashable)
Result = TypeVar("Result")

OnResults = Callable[[Sequence[int], Sequence[Result]], None]
"""Given, on the event loop, the positions of some rows and what was made of them."""

MAX_QUEUED_TOKENS = 1_000_000
"""Tokens that may wait for one model, if nobody says otherwise: minutes of work on a small CPU, seconds on a GPU."""


async def _no_more() -> Sequence[Row]:
    return ()


@dataclass(eq=False)
class Claim:
    """The room in the queue that one request takes.

    Attributes:
        expected: about how many tokens the texts have that are on their way here; whoever brings them takes off what
            they stand for, right before they are submitted.
        waiting: tokens of those that are here and in no batch yet.
    """

    expected: int = 0
    waiting: int = 0


@dataclass(eq=False)
class _Job(Generic[Kind, Result]):
    """The texts of one request.

    Attributes:
        caller: whose they are.
        kind: what is to be made of them; only texts of one kind share a batch.
        claim: the room that they take.
        rows: their token ids.
        waiting: positions of those that no batch holds yet, the longest last.
        fresh: positions and results of those that are made, and that the caller has not been given yet.
        served: tokens that batches hold or held.
        began: when the first of them was made, by the performance counter.
        changed: set whenever `fresh` or `failure` is.
        failure: why there will be no results.
    """

    caller: str
    kind: Kind
    claim: Claim
    rows: list[Row] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    fresh: list[tuple[int, Result]] = field(default_factory=list)
    served: int = 0
    began: float | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    failure: Exception | None = None


_Batch: TypeAlias = list[tuple[_Job[Kind, Result], int]]
"""Whose texts, and which of them."""


class Batcher(Generic[Kind, Result]):
    """The queue of one model, and its workers.

    Args:
        run: makes the results of some rows of one kind, in their order; called on a worker thread, with neighbours of
            equal length side by side.
        workers: how many batches run at the same time.
        budget: tokens of one batch.
        least_share: tokens that one worker takes alone though others are free.
        max_queued_tokens: tokens that may wait.
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
        least_share: int = 1,
        max_queued_tokens: int = MAX_QUEUED_TOKENS,
        padded: bool = False,
        prepare_worker: Callable[[], None] | None = None,
    ) -> None:
        self._run = run
        self._budget = budget
        self._least_share = least_share
        self._padded = padded
        self._jobs: dict[_Job[Kind, Result], None] = {}  # in order of arrival
        self._jobs_of: Counter[str] = Counter()  # of each caller who has a job here
        self._served: Counter[str] = Counter()  # tokens of these callers
        self._workers = self._idle = workers
        self._new_executor = functools.partial(
            ThreadPoolExecutor, workers, thread_name_prefix="encode", initializer=prepare_worker
        )
        self._executor = self._new_executor()
        self._least_served_first = itertools.cycle([True, True, True, False])
        self._tokens_per_second = 0.0  # of one worker
        self._turns = Reservations(max_queued_tokens)
        self._claims: set[Claim] = set()
        self._starting = False
        self._closed: EmbeddingsError | None = None  # what is told to who comes since
        self._lock = threading.Lock()  # of what waits, who was served, and who is idle
        self.queued_tokens = 0

    async def submit(
        self,
        kind: Kind,
        rows: Sequence[Row],
        on_results: OnResults[Result],
        on_progress: OnProgress | None = None,
        *,
        more: Callable[[], Awaitable[Sequence[Row]]] = _no_more,
        claim: Claim | None = None,
    ) -> None:
        """Have the results of `rows` made. Cancelling the call takes out of the queue what has not begun.

        Args:
            kind: what is to be made; rows of one kind share batches.
            rows: token ids of the texts.
            on_results: given every result once, as soon as it is there.
            on_progress: told how many are there.
            more: brings further rows of the same request, which come while others are run; none after the last.
            claim: the room held for them, see `expecting`.

        Raises:
            EmbeddingsError: the queue is closed.
            Exception: whatever `run`, or `more`, raised.
        """
        if self._closed is not None:
            raise self._closed
        came = time.perf_counter()
        job = _Job[Kind, Result](caller_name(), kind, claim or Claim())
        self._claims.add(job.claim)
        with self._lock:
            self._jobs[job] = None
            self._jobs_of[job.caller] += 1
        try:
            done = 0
            self._add(job, rows)
            while True:
                if others := await more():
                    self._add(job, others)
                elif done < len(job.rows):
                    await job.changed.wait()
                else:
                    break
                job.changed.clear()
                fresh, job.fresh = job.fresh, []
                if fresh:
                    on_results([index for index, _ in fresh], [result for _, result in fresh])
                if job.failure is not None:
                    raise job.failure
                done += len(fresh)
                if fresh and on_progress is not None:
                    await on_progress(done)
        finally:
            job.failure = None  # whose traceback holds the job: a circle that would hold the model, too
            with self._lock:
                self._drop_waiting(job)
                del self._jobs[job]
                self._jobs_of[job.caller] -= 1
                if not self._jobs_of[job.caller]:
                    del self._jobs_of[job.caller], self._served[job.caller]
            self._claims.discard(job.claim)
            ended = time.perf_counter()
            telemetry.record("wait", (job.began or ended) - came)
            if job.began is not None:
                telemetry.record("encode", ended - job.began)

    def close(self, reason: EmbeddingsError) -> None:
        """Take no more; what waits fails for this `reason`, what runs ends by itself, and the workers with it."""
        self._closed = reason
        for job in self._jobs:
            self._fail(job, reason)
        self._executor.shutdown(wait=False, cancel_futures=True)

    @contextlib.contextmanager
    def expecting(self, who: Hashable, tokens: int) -> Iterator[Claim]:
        """Hold room for texts that are on their way here.

        Args:
            who: whose they are, if they are refused and come again.
            tokens: about how many they have.

        Raises:
            Overloaded: too much waits already.
        """
        taken = [claim.expected + claim.waiting for claim in self._claims]
        total, counted = sum(taken), self._turns.counted
        # Where all together count as what they have, each does: that is usual, and many are quickly added up.
        used = total if counted(total) == total else sum(map(counted, taken))
        if seconds := self._turns.wait(who, tokens, used=used, per_second=self._tokens_per_second * self._workers):
            raise Overloaded(
                f"{total:,} tokens wait already, and of these {tokens:,} there is no room: try again in "
                f"{seconds:.0f} s, or send fewer texts at once",
                retry_after=seconds,
            )
        self._turns.admitted(who)
        claim = Claim(expected=tokens)
        self._claims.add(claim)
        try:
            yield claim
        finally:
            self._claims.discard(claim)

    def _add(self, job: _Job[Kind, Result], rows: Sequence[Row]) -> None:
        """Put rows in the queue."""
        with self._lock:
            job.waiting += range(len(job.rows), len(job.rows) + len(rows))
            job.rows += rows
            job.waiting.sort(key=lambda index: len(job.rows[index]))
            self._queue(job, sum(map(len, rows)))
        # Requests that came in together are to share a batch: the loop goes through all of them first.
        if not self._starting:
            self._starting = True
            asyncio.get_running_loop().call_soon(self._start_workers)

    def _start_workers(self) -> None:
        """Give every idle worker a batch, while anything waits."""
        self._starting = False
        loop = asyncio.get_running_loop()
        while self._closed is None and (batch := self._take()):
            try:
                working = loop.run_in_executor(self._executor, self._work, loop, batch)
            except RuntimeError as error:  # no thread could be started, or one ended before it could work
                self._end_worker(batch, ModelUnavailable(f"there is no thread to run the model on: {error}"))
            else:
                working.add_done_callback(functools.partial(self._check_worked, batch))

    def _take(self) -> _Batch[Kind, Result] | None:
        """The next batch for a worker that is idle; None if there is none of either."""
        with self._lock:
            if not self._idle or not any(job.waiting for job in self._jobs):
                return None
            self._idle -= 1
            return self._next_batch()

    def _work(self, loop: asyncio.AbstractEventLoop, batch: _Batch[Kind, Result] | None) -> None:
        """Run batch after batch, on a worker thread, until none waits."""
        while batch:
            rows = [job.rows[index] for job, index in batch]
            began = time.perf_counter()
            try:
                outcome: Sequence[Result] | BaseException = self._run(batch[0][0].kind, rows)
            except BaseException as failure:  # noqa: BLE001 - raised again in those who asked
                outcome = failure
            finish = functools.partial(self._finish, batch, time.perf_counter() - began, outcome)
            with self._lock:
                self._idle += 1
            batch = self._take()
            try:
                loop.call_soon_threadsafe(finish)
            except RuntimeError:  # the loop has ended, and nobody waits any longer
                return
            finally:
                del outcome, finish  # a failure's traceback holds this call, and would be held by it

    def _next_batch(self) -> _Batch[Kind, Result]:
        """What goes next, the longest rows first; taken out of the queue. The lock must be held."""
        waiting = [job for job in self._jobs if job.waiting]
        if next(self._least_served_first):
            waiting.sort(key=lambda job: (self._served[job.caller], job.served))
        kind = waiting[0].kind
        # A part of what is left each time (guided self-scheduling), so that all are done at about one time.
        budget = min(self._budget, max(self._least_share, math.ceil(self.queued_tokens / self._workers)))
        batch: _Batch[Kind, Result] = []
        spent = longest = 0
        began = time.perf_counter()
        for job in waiting:
            while job.kind == kind and job.waiting:
                length = len(job.rows[job.waiting[-1]])
                longest = max(longest, length)
                cost = longest * (len(batch) + 1) if self._padded else spent + length
                if batch and cost > budget:
                    break
                batch.append((job, job.waiting.pop()))
                job.began = job.began or began
                job.served += length
                self._served[job.caller] += length
                job.claim.waiting -= length
                spent += length
        self._count_queued(-spent)
        return sorted(batch, key=lambda entry: len(entry[0].rows[entry[1]]), reverse=True)

    def _finish(self, batch: _Batch[Kind, Result], seconds: float, outcome: Sequence[Result] | BaseException) -> None:
        """Hand out what a worker made."""
        if isinstance(outcome, BaseException):
            self._fail_batch(batch, outcome)
            return
        tokens = sum(len(job.rows[index]) for job, index in batch)
        telemetry.BATCH_TEXTS.observe(len(batch))
        telemetry.BATCH_TOKENS.observe(tokens)
        rate = tokens / max(seconds, 1e-6)
        self._tokens_per_second += (rate - self._tokens_per_second) * (0.2 if self._tokens_per_second else 1)
        for (job, index), result in zip(batch, outcome, strict=True):
            job.fresh.append((index, result))
            job.changed.set()

    def _check_worked(self, batch: _Batch[Kind, Result], working: asyncio.Future[None]) -> None:
        """See to it that a thread that could not begin its work is replaced, and its batch answered."""
        if not working.cancelled() and (failure := working.exception()) is not None:
            if isinstance(failure, BrokenExecutor) and self._closed is None:
                self._executor.shutdown(wait=False)
                self._executor = self._new_executor()
            self._end_worker(batch, failure)
            self._start_workers()

    def _end_worker(self, batch: _Batch[Kind, Result], failure: BaseException) -> None:
        with self._lock:
            self._idle += 1
        self._fail_batch(batch, failure)

    def _fail_batch(self, batch: _Batch[Kind, Result], failure: BaseException) -> None:
        """Fail those whose texts it held."""
        if not isinstance(failure, Exception) or isinstance(failure, BrokenExecutor):
            failure = ModelUnavailable(f"the thread that ran the model ended: {failure!r}")
        for job in {id(job): job for job, _ in batch}.values():
            self._fail(job, failure)

    def _fail(self, job: _Job[Kind, Result], failure: Exception) -> None:
        with self._lock:
            if job not in self._jobs:  # another of its batches has failed it already
                return
            self._drop_waiting(job)
        job.failure = failure
        job.changed.set()

    def _drop_waiting(self, job: _Job[Kind, Result]) -> None:
        self._queue(job, -sum(len(job.rows[index]) for index in job.waiting))
        job.waiting.clear()

    def _queue(self, job: _Job[Kind, Result], tokens: int) -> None:
        job.claim.waiting += tokens
        self._count_queued(tokens)

    def _count_queued(self, tokens: int) -> None:
        self.queued_tokens += tokens
        telemetry.QUEUED_TOKENS.inc(tokens)

"""The queue of a model: texts of all requests wait here and are grouped into batches for the worker threads.

Texts are queued as rows of token ids. Whenever a worker is idle it takes the next batch: its share of the queue, up to
the token budget. So a lone query runs at once, many queries share a batch, and a large request fills its own batches.
Workers take their next batch themselves, since the event loop may be busy for as long as a small batch takes.

Scheduling is fair by tokens served, first among callers and then among a caller's requests, so that a query overtakes
bulk, whether that is one request or a thousand. Every fourth batch is filled in order of arrival instead, so that bulk
makes progress however many queries arrive.
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
"""Called on the event loop with the indices of some rows and their results."""

MAX_QUEUED_TOKENS = 1_000_000
"""Default limit of queued tokens per model: minutes of work on a small CPU, seconds on a GPU."""


async def _no_more_rows() -> Sequence[Row]:
    return ()


@dataclass(eq=False)
class Claim:
    """The part of the queue's capacity that one request takes.

    Attributes:
        expected: estimated tokens of the texts that are not queued yet; the caller subtracts a text's estimate right
            before submitting it.
        waiting: tokens of the texts that are queued and in no batch yet.
    """

    expected: int = 0
    waiting: int = 0


@dataclass(eq=False)
class _Job(Generic[Kind, Result]):
    """The texts of one request.

    Attributes:
        caller: name of the caller.
        kind: what to compute; only texts of the same kind share a batch.
        claim: the capacity that they take.
        rows: their token ids.
        waiting: indices of the rows that are in no batch yet, the longest last.
        undelivered: indices and results that are computed but not passed to the caller yet.
        served: tokens that are or were in a batch.
        started: when the first batch with one of the rows was made, by the performance counter.
        changed: set whenever `undelivered` or `failure` is.
        failure: why there will be no more results.
    """

    caller: str
    kind: Kind
    claim: Claim
    rows: list[Row] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    undelivered: list[tuple[int, Result]] = field(default_factory=list)
    served: int = 0
    started: float | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    failure: Exception | None = None


_Batch: TypeAlias = list[tuple[_Job[Kind, Result], int]]
"""Jobs, each with the index of one of its rows."""


class Batcher(Generic[Kind, Result]):
    """The queue of one model, and its worker threads.

    Args:
        run: computes the results of rows of one kind, in the same order; called on a worker thread with rows sorted by
            length.
        workers: how many batches run at the same time.
        budget: token budget of a batch.
        min_share: lower bound of a worker's share of the queue, in tokens.
        max_queued_tokens: limit of queued tokens.
        padded: whether a row costs as many tokens as the longest in its batch.
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
        min_share: int = 1,
        max_queued_tokens: int = MAX_QUEUED_TOKENS,
        padded: bool = False,
        prepare_worker: Callable[[], None] | None = None,
    ) -> None:
        self._run = run
        self._budget = budget
        self._min_share = min_share
        self._padded = padded
        self._jobs: dict[_Job[Kind, Result], None] = {}  # in order of arrival
        self._jobs_by_caller: Counter[str] = Counter()  # number of jobs of each caller that has any
        self._served_by_caller: Counter[str] = Counter()  # tokens served to these callers
        self._workers = self._idle = workers
        self._new_executor = functools.partial(
            ThreadPoolExecutor, workers, thread_name_prefix="encode", initializer=prepare_worker
        )
        self._executor = self._new_executor()
        self._least_served_first = itertools.cycle([True, True, True, False])
        self._tokens_per_second = 0.0  # of one worker
        self._reservations = Reservations(max_queued_tokens)
        self._claims: set[Claim] = set()
        self._start_scheduled = False
        self._closed: EmbeddingsError | None = None  # set when closed; raised by later calls
        self._lock = threading.Lock()  # guards waiting rows, served tokens and the number of idle workers
        self.queued_tokens = 0

    async def submit(
        self,
        kind: Kind,
        rows: Sequence[Row],
        on_results: OnResults[Result],
        on_progress: OnProgress | None = None,
        *,
        more: Callable[[], Awaitable[Sequence[Row]]] = _no_more_rows,
        claim: Claim | None = None,
    ) -> None:
        """Queue `rows`, and return once all results are delivered.

        Cancelling the call removes the rows that are in no batch yet.

        Args:
            kind: what to compute; rows of the same kind share batches.
            rows: token ids of the texts.
            on_results: called with each result once, as soon as it is available.
            on_progress: called with the number of results so far.
            more: returns further rows of the same request, which are added while others run; empty after the last.
            claim: the capacity held for them, see `admit`.

        Raises:
            EmbeddingsError: the queue is closed.
            Exception: whatever `run` or `more` raised.
        """
        if self._closed is not None:
            raise self._closed
        arrived = time.perf_counter()
        job = _Job[Kind, Result](caller_name(), kind, claim or Claim())
        self._claims.add(job.claim)
        with self._lock:
            self._jobs[job] = None
            self._jobs_by_caller[job.caller] += 1
        try:
            done = 0
            self._add(job, rows)
            while True:
                if further := await more():
                    self._add(job, further)
                elif done < len(job.rows):
                    await job.changed.wait()
                else:
                    break
                job.changed.clear()
                results, job.undelivered = job.undelivered, []
                if results:
                    on_results([index for index, _ in results], [result for _, result in results])
                if job.failure is not None:
                    raise job.failure
                done += len(results)
                if results and on_progress is not None:
                    await on_progress(done)
        finally:
            job.failure = None  # its traceback refers to the job: a reference cycle that keeps the model alive
            with self._lock:
                self._remove_waiting(job)
                del self._jobs[job]
                self._jobs_by_caller[job.caller] -= 1
                if not self._jobs_by_caller[job.caller]:
                    del self._jobs_by_caller[job.caller], self._served_by_caller[job.caller]
            self._claims.discard(job.claim)
            ended = time.perf_counter()
            telemetry.record("wait", (job.started or ended) - arrived)
            if job.started is not None:
                telemetry.record("encode", ended - job.started)

    def close(self, reason: EmbeddingsError) -> None:
        """Refuse new rows and fail waiting ones with `reason`; running batches finish, then the workers end."""
        self._closed = reason
        for job in self._jobs:
            self._fail(job, reason)
        self._executor.shutdown(wait=False, cancel_futures=True)

    @contextlib.contextmanager
    def admit(self, client: Hashable, tokens: int) -> Iterator[Claim]:
        """Hold capacity for texts that are about to be queued.

        Args:
            client: identifies the request when it is retried after a refusal.
            tokens: estimated number of tokens.

        Raises:
            Overloaded: there is not enough capacity.
        """
        sizes = [claim.expected + claim.waiting for claim in self._claims]
        total, effective_size = sum(sizes), self._reservations.effective_size
        # Usually even the total is below the cap on a single size, and so is each: one sum is enough then.
        used = total if effective_size(total) == total else sum(map(effective_size, sizes))
        tokens_per_second = self._tokens_per_second * self._workers
        if seconds := self._reservations.retry_after(client, tokens, used=used, released_per_second=tokens_per_second):
            raise Overloaded(
                f"{total:,} tokens wait already, and there is no room for {tokens:,} more: try again in "
                f"{seconds:.0f} s, or send fewer texts at once",
                retry_after=seconds,
            )
        self._reservations.admitted(client)
        claim = Claim(expected=tokens)
        self._claims.add(claim)
        try:
            yield claim
        finally:
            self._claims.discard(claim)

    def _add(self, job: _Job[Kind, Result], rows: Sequence[Row]) -> None:
        """Add rows to the queue."""
        with self._lock:
            job.waiting += range(len(job.rows), len(job.rows) + len(rows))
            job.rows += rows
            job.waiting.sort(key=lambda index: len(job.rows[index]))
            self._change_queued(job, sum(map(len, rows)))
        # Requests that arrive together should share a batch: let the event loop process all of them first.
        if not self._start_scheduled:
            self._start_scheduled = True
            asyncio.get_running_loop().call_soon(self._start_workers)

    def _start_workers(self) -> None:
        """Give each idle worker a batch while rows are waiting."""
        self._start_scheduled = False
        loop = asyncio.get_running_loop()
        while self._closed is None and (batch := self._take_batch()):
            try:
                worker = loop.run_in_executor(self._executor, self._run_batches, loop, batch)
            except RuntimeError as error:  # no thread could be started, or one ended during its initialization
                self._fail_start(batch, ModelUnavailable(f"no thread could be started to run the model: {error}"))
            else:
                worker.add_done_callback(functools.partial(self._check_started, batch))

    def _take_batch(self) -> _Batch[Kind, Result] | None:
        """Take the next batch for an idle worker; None if no worker is idle or no row is waiting."""
        with self._lock:
            if not self._idle or not any(job.waiting for job in self._jobs):
                return None
            self._idle -= 1
            return self._next_batch()

    def _run_batches(self, loop: asyncio.AbstractEventLoop, batch: _Batch[Kind, Result] | None) -> None:
        """Run one batch after another on a worker thread, until no row is waiting."""
        while batch:
            rows = [job.rows[index] for job, index in batch]
            start = time.perf_counter()
            try:
                outcome: Sequence[Result] | BaseException = self._run(batch[0][0].kind, rows)
            except BaseException as failure:  # noqa: BLE001 - raised again in the requests
                outcome = failure
            deliver = functools.partial(self._deliver, batch, time.perf_counter() - start, outcome)
            with self._lock:
                self._idle += 1
            batch = self._take_batch()
            try:
                loop.call_soon_threadsafe(deliver)
            except RuntimeError:  # the event loop has closed, so no request is waiting any longer
                return
            finally:
                del outcome, deliver  # a failure's traceback refers to this frame, which would be a reference cycle

    def _next_batch(self) -> _Batch[Kind, Result]:
        """Remove the next batch from the queue, sorted by length, longest first. The lock must be held."""
        waiting = [job for job in self._jobs if job.waiting]
        if next(self._least_served_first):
            waiting.sort(key=lambda job: (self._served_by_caller[job.caller], job.served))
        kind = waiting[0].kind
        # A fraction of what is left each time (guided self-scheduling): all workers finish at about the same time.
        budget = min(self._budget, max(self._min_share, math.ceil(self.queued_tokens / self._workers)))
        batch: _Batch[Kind, Result] = []
        spent = longest = 0
        now = time.perf_counter()
        for job in waiting:
            while job.kind == kind and job.waiting:
                length = len(job.rows[job.waiting[-1]])
                longest = max(longest, length)
                cost = longest * (len(batch) + 1) if self._padded else spent + length
                if batch and cost > budget:
                    break
                batch.append((job, job.waiting.pop()))
                job.started = job.started or now
                job.served += length
                self._served_by_caller[job.caller] += length
                job.claim.waiting -= length
                spent += length
        self._count_queued(-spent)
        return sorted(batch, key=lambda entry: len(entry[0].rows[entry[1]]), reverse=True)

    def _deliver(self, batch: _Batch[Kind, Result], seconds: float, outcome: Sequence[Result] | BaseException) -> None:
        """Pass the outcome of a batch to its jobs, and update the throughput (an exponential moving average)."""
        if isinstance(outcome, BaseException):
            self._fail_batch(batch, outcome)
            return
        tokens = sum(len(job.rows[index]) for job, index in batch)
        telemetry.BATCH_TEXTS.observe(len(batch))
        telemetry.BATCH_TOKENS.observe(tokens)
        rate = tokens / max(seconds, 1e-6)
        self._tokens_per_second += (rate - self._tokens_per_second) * (0.2 if self._tokens_per_second else 1)
        for (job, index), result in zip(batch, outcome, strict=True):
            job.undelivered.append((index, result))
            job.changed.set()

    def _check_started(self, batch: _Batch[Kind, Result], worker: asyncio.Future[None]) -> None:
        """Replace a worker thread that could not start, and fail its batch."""
        if not worker.cancelled() and (failure := worker.exception()) is not None:
            if isinstance(failure, BrokenExecutor) and self._closed is None:
                self._executor.shutdown(wait=False)
                self._executor = self._new_executor()
            self._fail_start(batch, failure)
            self._start_workers()

    def _fail_start(self, batch: _Batch[Kind, Result], failure: BaseException) -> None:
        with self._lock:
            self._idle += 1
        self._fail_batch(batch, failure)

    def _fail_batch(self, batch: _Batch[Kind, Result], failure: BaseException) -> None:
        """Fail the jobs whose texts are in the batch."""
        if not isinstance(failure, Exception) or isinstance(failure, BrokenExecutor):
            failure = ModelUnavailable(f"the thread that ran the model died: {failure!r}")
        for job in {id(job): job for job, _ in batch}.values():
            self._fail(job, failure)

    def _fail(self, job: _Job[Kind, Result], failure: Exception) -> None:
        with self._lock:
            if job not in self._jobs or job.failure is not None:  # it has ended, or failed for another reason before
                return
            self._remove_waiting(job)
        job.failure = failure
        job.changed.set()

    def _remove_waiting(self, job: _Job[Kind, Result]) -> None:
        self._change_queued(job, -sum(len(job.rows[index]) for index in job.waiting))
        job.waiting.clear()

    def _change_queued(self, job: _Job[Kind, Result], tokens: int) -> None:
        job.claim.waiting += tokens
        self._count_queued(tokens)

    def _count_queued(self, tokens: int) -> None:
        self.queued_tokens += tokens
        telemetry.QUEUED_TOKENS.inc(tokens)

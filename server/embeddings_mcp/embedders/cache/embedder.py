"""A caching wrapper around an embedder.

Concurrent requests for the same text are computed once (single-flight). Rows completed before a call fails or is
cancelled stay cached, so that a retry resumes from there.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import anyio
import anyio.to_thread
import numpy as np

from embeddings_mcp import telemetry
from embeddings_mcp.embedders.base import (
    Embedder,
    Embeddings,
    MultiEmbedder,
    OnProgress,
    OnRows,
    Representations,
)
from embeddings_mcp.embedders.cache.request import Request
from embeddings_mcp.embedders.cache.rows import Key, Kind, Row, keys_of, rows_of
from embeddings_mcp.embedders.cache.store import Cache
from embeddings_mcp.errors import InputUnusable, ModelUnavailable, UpstreamFailed
from embeddings_mcp.models import InputType, ModelCard, Truncate

_Result = TypeVar("_Result")

_Outcome = Row | ModelUnavailable | None
"""Outcome of a row in flight: None if it was not computed, but the waiting request may compute it itself."""

_Call = dict[Key, "asyncio.Future[_Outcome]"]
"""The rows of one call to the embedder that are still in flight."""

_SHORT_CALL = 64
"""Rows. Only requests of at least the same length wait for a longer call, which would delay a single query."""

_COLLECT_SECONDS = 5.0
"""How often a request that waits for others takes the rows that they have completed, and reports them as progress."""

_MAX_MODEL_CHANGES = 3
"""How often the model behind an endpoint may change during one request."""

_MAX_BYTES_ON_LOOP = 1 << 18
"""Larger texts or vectors are processed on a worker thread; this many bytes take about a millisecond."""


def cached(embedder: Embedder, cache: Cache) -> CachedEmbedder:
    """Wrap an embedder in this cache; a `MultiEmbedder` stays one."""
    if isinstance(embedder, MultiEmbedder):
        return CachedMultiEmbedder(embedder, cache)
    return CachedEmbedder(embedder, cache)


class CachedEmbedder:
    """Takes rows from the cache and computes the missing ones; follows `embedders.base.Embedder`.

    Results are the same as without the cache: rows are in the order of the texts, vectors are bit-identical to those
    computed, and tokens are as counted then. If an endpoint reports which model it served, all rows of a result are of
    the same model: the one that last computed a row or, before that, the one of the first result.

    Args:
        embedder: computes the vectors.
        cache: may be shared with other embedders. Closing any of them closes its file for all.
    """

    def __init__(self, embedder: Embedder, cache: Cache) -> None:
        self._embedder = embedder
        self._cache = cache
        self._in_flight: dict[Key, _Call] = {}
        self._latest: Kind | None = None

    @property
    def card(self) -> ModelCard:
        """See `Embedder.card`."""
        return self._embedder.card

    @property
    def origin(self) -> str:
        """See `Embedder.origin`."""
        return self._embedder.origin

    async def identify(self) -> str:
        """See `Embedder.identify`."""
        return await self._embedder.identify()

    async def check(self) -> None:
        """See `Embedder.check`."""
        await self._embedder.check()

    async def aclose(self) -> None:
        """See `Embedder.aclose`."""
        try:
            await self._embedder.aclose()
        finally:
            await self._cache.aclose()

    async def embed(
        self,
        texts: Sequence[str],
        *,
        input_type: InputType | None,
        truncate: Truncate,
        on_progress: OnProgress | None = None,
        on_rows: OnRows | None = None,
    ) -> Embeddings:
        """See `Embedder.embed`; `on_rows` gets all rows at once, since rows completed before a failure stay cached.

        Texts that another request is computing are waited for. If that request is cancelled or refused, this one
        computes them itself; if the model was unavailable to it, this one fails with the same error.
        """
        identity = await self._embedder.identify()  # from here on the card is exact
        generation = await self._cache.generation(self.card.id)

        def compute_keys() -> list[Key]:
            return keys_of(
                texts,
                identity=identity,
                generation=generation,
                card=self.card,
                input_type=input_type,
                truncate=truncate,
            )

        keys = await _run(compute_keys, 256 * len(texts) + sum(map(len, texts)))
        request = Request(texts, keys, on_progress)
        compute = functools.partial(self._compute, request, input_type=input_type, truncate=truncate)
        request.add(await self._cache.get(request.missing))
        telemetry.CACHE_TEXTS.labels("miss").inc(len(request.missing))
        telemetry.CACHE_TEXTS.labels("hit").inc(len(set(keys)) - len(request.missing))
        model_changes = 0
        while True:
            if dropped := request.drop_mismatched(self._latest):
                self._cache.memory.remove(dropped)
                model_changes += 1
            await request.report_new_progress()
            if not request.missing:
                break
            if model_changes > _MAX_MODEL_CHANGES:
                raise UpstreamFailed(
                    f"{self.origin} serves {self.card.id} with different models in turn, whose vectors cannot be "
                    "mixed in one response: try again"
                )
            await self._fill(request, compute)
        if self._latest is None:  # nothing was computed yet: later results must be of the same model as this one
            self._latest = request.rows[keys[0]].kind
        embeddings = await _run(request.result, request.bytes)
        if on_rows is not None:
            on_rows(range(len(texts)), embeddings)
        return embeddings

    async def _fill(self, request: Request, compute: Callable[[list[Key]], Awaitable[None]]) -> None:
        """Compute the missing rows that are not in flight, and wait for those that are.

        Rows may still be missing afterwards, if another request that was computing them was cancelled or refused.
        """
        request.add(self._cache.memory.get(request.missing))  # rows completed while the file was read
        max_rows = max(_SHORT_CALL, len(request.texts))
        calls = {key: call for key in request.missing if (call := self._in_flight.get(key)) is not None}
        awaited = {key: call[key] for key, call in calls.items() if len(call) <= max_rows}
        if own := [key for key in request.missing if key not in awaited]:
            await compute(own)
        while awaited:
            await asyncio.wait(awaited.values(), timeout=_COLLECT_SECONDS)
            outcomes = {key: future.result() for key, future in awaited.items() if future.done()}
            awaited = {key: future for key, future in awaited.items() if key not in outcomes}
            request.add({key: outcome for key, outcome in outcomes.items() if isinstance(outcome, Row)})
            for outcome in outcomes.values():
                if isinstance(outcome, ModelUnavailable):
                    raise outcome
            if awaited:
                await request.report_new_progress()

    async def _compute(
        self, request: Request, keys: list[Key], *, input_type: InputType | None, truncate: Truncate
    ) -> None:
        """Compute these rows with the embedder, and cache those that it completes, even if it fails in the end."""
        call: _Call = {}
        for key in keys:
            if key not in self._in_flight:
                self._in_flight[key] = call
                call[key] = asyncio.get_running_loop().create_future()
        completed: dict[Key, Row] = {}
        failure: ModelUnavailable | None = None

        def store(indices: Sequence[int], embeddings: Embeddings) -> None:
            rows = dict(zip([keys[index] for index in indices], rows_of(embeddings), strict=True))
            request.add(rows)
            self._latest = next(iter(rows.values())).kind
            if np.isfinite(embeddings.vectors).all():  # the service refuses other vectors, so they are not cached
                self._cache.memory.put(rows)
                completed.update(rows)
                self._resolve(rows)

        try:
            await self._embedder.embed(
                request.texts_of(keys),
                input_type=input_type,
                truncate=truncate,
                on_progress=request.report_progress,
                on_rows=store,
            )
        except InputUnusable as error:
            raise error.reindexed(lambda index: request.indices_of(keys[index])) from None
        except ModelUnavailable as error:
            failure = error
            raise
        finally:
            self._resolve(dict.fromkeys(call, failure))
            if completed:
                with anyio.CancelScope(shield=True):
                    await self._cache.put(completed, model=self.card.id, origin=self.origin)

    def _resolve(self, outcomes: Mapping[Key, _Outcome]) -> None:
        """Complete the futures of these rows."""
        for key, outcome in outcomes.items():
            if (call := self._in_flight.pop(key, None)) is not None:
                call.pop(key).set_result(outcome)


class CachedMultiEmbedder(CachedEmbedder):
    """`CachedEmbedder` for a `MultiEmbedder`; only dense vectors are cached, since the others are large."""

    def __init__(self, embedder: MultiEmbedder, cache: Cache) -> None:
        super().__init__(embedder, cache)
        self._multi_embedder = embedder

    async def represent(
        self,
        texts: Sequence[str],
        *,
        input_type: InputType | None,
        truncate: Truncate,
        on_progress: OnProgress | None = None,
    ) -> Representations:
        """See `MultiEmbedder.represent`."""
        return await self._multi_embedder.represent(
            texts, input_type=input_type, truncate=truncate, on_progress=on_progress
        )


async def _run(work: Callable[[], _Result], size: int) -> _Result:
    """Run `work` on this many bytes, on a worker thread if it would block the event loop for too long."""
    return work() if size <= _MAX_BYTES_ON_LOOP else await anyio.to_thread.run_sync(work)

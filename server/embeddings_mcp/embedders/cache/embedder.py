"""An embedder that remembers what another has made, and asks it for the rest.

A text that somebody waits for already is not asked for again. What was made before a call failed or was cancelled is
kept, so that the next try goes on from there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import anyio
import anyio.to_thread
import numpy as np

from embeddings_mcp import telemetry
from embeddings_mcp.embedders.base import Embedder, Embeddings, MultiEmbedder, OnProgress, OnRows, Representations
from embeddings_mcp.embedders.cache.request import Request
from embeddings_mcp.embedders.cache.rows import Key, Kind, Row, keys_of, rows_of
from embeddings_mcp.embedders.cache.store import Cache
from embeddings_mcp.errors import InputUnusable, ModelUnavailable, UpstreamFailed
from embeddings_mcp.models import InputType, ModelCard, Truncate

_Result = TypeVar("_Result")

_Outcome = Row | ModelUnavailable | None
"""What became of a row that somebody waits for: None where it was not made, and asking again may help."""

_Call = dict[Key, "asyncio.Future[_Outcome]"]
"""One asking of the embedder: the rows that others may wait for, until they have come."""

_SIGN_OF_LIFE = 5.0
"""Seconds between two reports of progress while a request waits for another one."""

_SHORT_CALL = 64
"""Rows. A longer call is waited for by requests of that length only: it would hold up a single query."""

_MOST_EXCHANGES = 3
"""How often the model behind an endpoint may be exchanged while one request is answered."""

_BYTES_ON_LOOP = 1 << 18
"""Texts or vectors of more bytes than these are worked on beside the event loop: a millisecond of work."""


def cached(embedder: Embedder, cache: Cache) -> CachedEmbedder:
    """The embedder behind this cache; it can do no less than without."""
    if isinstance(embedder, MultiEmbedder):
        return CachedMultiEmbedder(embedder, cache)
    return CachedEmbedder(embedder, cache)


class CachedEmbedder:
    """Answers from the cache what it can, and has the rest made; follows `embedders.base.Embedder`.

    An answer is what it would be without the cache: rows stand where their texts do, vectors are bit for bit those that
    were stored, and the tokens those that were counted when they were made. Where an endpoint says which model it
    served, the rows of an answer are all of one model, the latest.

    Args:
        embedder: makes the vectors.
        cache: may be that of other embedders too. It is closed with each of them, and then empty for all.
    """

    def __init__(self, embedder: Embedder, cache: Cache) -> None:
        self._embedder = embedder
        self._cache = cache
        self._coming: dict[Key, _Call] = {}
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
        """See `Embedder.embed`; `on_rows` is given all rows at once, since what a failure would lose is kept here.

        A text that another request has asked for is waited for. Where that request is cancelled or refused, this one
        asks for itself; where the model was unavailable to it, this one is told so too.
        """
        identity = await self._embedder.identify()  # from here on the card is exact
        generation = await self._cache.generation(self.card.id)

        def find_keys() -> list[Key]:
            return keys_of(
                texts,
                identity=identity,
                generation=generation,
                card=self.card,
                input_type=input_type,
                truncate=truncate,
            )

        async def make(wanted: list[Key]) -> None:
            await self._make(request, wanted, input_type=input_type, truncate=truncate)

        keys = await _compute(find_keys, 256 * len(texts) + sum(map(len, texts)))
        request = Request(texts, keys, on_progress)
        request.add(await self._cache.get(request.missing))
        telemetry.CACHE_TEXTS.labels("miss").inc(len(request.missing))
        telemetry.CACHE_TEXTS.labels("hit").inc(len(set(keys)) - len(request.missing))
        exchanges = 0
        while True:
            if strays := request.drop_strays(self._latest):
                self._cache.memory.drop(strays)
                exchanges += 1
            await request.tell_news()
            if not request.missing:
                break
            if exchanges > _MOST_EXCHANGES:
                raise UpstreamFailed(
                    f"{self.origin} serves {self.card.id} with different models in turn, whose vectors cannot stand in "
                    "one answer: try again"
                )
            await self._fill(request, make)
        answer = await _compute(request.answer, request.bytes)
        if on_rows is not None:
            on_rows(range(len(texts)), answer)
        return answer

    async def _fill(self, request: Request, make: Callable[[list[Key]], Awaitable[None]]) -> None:
        """Have made what nobody makes yet, and wait for the rest.

        Rows may be missing still afterwards, where a request that was waited for was cancelled or refused.
        """
        request.add(self._cache.memory.get(request.missing))  # what has come while the file was read
        patience = max(_SHORT_CALL, len(request.texts))
        calls = {key: call for key in request.missing if (call := self._coming.get(key)) is not None}
        others = {key: call[key] for key, call in calls.items() if len(call) <= patience}
        if mine := [key for key in request.missing if key not in others]:
            await make(mine)
        while others:
            await asyncio.wait(others.values(), timeout=_SIGN_OF_LIFE)
            outcomes = {key: coming.result() for key, coming in others.items() if coming.done()}
            others = {key: coming for key, coming in others.items() if key not in outcomes}
            request.add({key: outcome for key, outcome in outcomes.items() if isinstance(outcome, Row)})
            for outcome in outcomes.values():
                if isinstance(outcome, ModelUnavailable):
                    raise outcome
            if others:
                await request.tell()

    async def _make(
        self, request: Request, wanted: list[Key], *, input_type: InputType | None, truncate: Truncate
    ) -> None:
        """Ask the embedder, and keep whatever it makes, also where it fails in the end."""
        call: _Call = {}
        for key in wanted:
            if key not in self._coming:
                self._coming[key] = call
                call[key] = asyncio.get_running_loop().create_future()
        kept: dict[Key, Row] = {}
        failure: ModelUnavailable | None = None

        def take(positions: Sequence[int], made: Embeddings) -> None:
            rows = dict(zip([wanted[position] for position in positions], rows_of(made), strict=True))
            request.add(rows)
            self._latest = next(iter(rows.values())).kind
            if np.isfinite(made.vectors).all():  # of others nothing is kept: the service refuses them
                self._cache.memory.put(rows)
                kept.update(rows)
                self._settle(rows)

        try:
            await self._embedder.embed(
                request.texts_of(wanted),
                input_type=input_type,
                truncate=truncate,
                on_progress=request.tell,
                on_rows=take,
            )
        except InputUnusable as error:
            raise error.about(lambda index: request.place_of(wanted[index])) from None
        except ModelUnavailable as error:
            failure = error
            raise
        finally:
            self._settle(dict.fromkeys(call, failure))
            if kept:
                with anyio.CancelScope(shield=True):
                    await self._cache.put(kept, model=self.card.id, origin=self.origin)

    def _settle(self, outcomes: Mapping[Key, _Outcome]) -> None:
        """Tell those who wait for these rows what has become of them."""
        for key, outcome in outcomes.items():
            if (call := self._coming.pop(key, None)) is not None:
                call.pop(key).set_result(outcome)


class CachedMultiEmbedder(CachedEmbedder):
    """The same before an embedder that makes more than dense vectors: what is large is made anew each time."""

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


async def _compute(work: Callable[[], _Result], size: int) -> _Result:
    """What `work` makes of so many bytes: on a worker thread where it would hold up the event loop."""
    return work() if size <= _BYTES_ON_LOOP else await anyio.to_thread.run_sync(work)

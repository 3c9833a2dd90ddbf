"""A local model behind the embedder protocol: loaded on first use, and never run on the event loop."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import numpy as np

from embeddings_mcp import telemetry
from embeddings_mcp.caller import caller_name
from embeddings_mcp.embedders.base import Embeddings, OnProgress, OnRows, Representations
from embeddings_mcp.embedders.batcher import MAX_QUEUED_TOKENS, Batcher, OnResults
from embeddings_mcp.embedders.cores import usable_cores
from embeddings_mcp.embedders.lazy import AsyncLazy
from embeddings_mcp.errors import ModelUnavailable, ServerStopped
from embeddings_mcp.models import InputType, ModelCard, Truncate
from embeddings_mcp.vectors import FloatMatrix, FloatVector, SparseVector

if TYPE_CHECKING:
    from embeddings_mcp.embedders.local.inputs import Row, Tokens
    from embeddings_mcp.embedders.local.running.loaded import LoadedModel

_CHARACTERS_ON_LOOP = 2048
"""Texts of more characters than these, all together, are tokenized beside the event loop: half a millisecond of work,
and as long as it takes to hand it to a thread and back."""

_TOKENS_OF_CHARACTER = 0.25
"""Tokens for each character, until texts were seen: in English one has four or five characters."""

_CHARACTERS_REMEMBERED = 10_000
"""Of how many characters, seen last, what was learnt counts as much as what is seen now: so that many short queries, of
which every one has its special tokens too, do not make a large request seem larger than it is."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """What is to be made of some texts; only those of one kind go through the model together.

    Attributes:
        skip: how many tokens at each start are not pooled.
        every: whether all the model's outputs are wanted, or the dense vectors only.
    """

    skip: int
    every: bool


@dataclass(frozen=True, slots=True)
class _Request:
    """What one call asks for.

    Attributes:
        texts: that are to be embedded.
        input_type: what they are.
        truncate: what is done with those that are too long.
        counts: tokens of each text, as far as they have been tokenized.
    """

    texts: Sequence[str]
    input_type: InputType | None
    truncate: Truncate
    counts: list[int] = field(default_factory=list)


class LocalEmbedder:
    """Embeds with a model that runs on this machine, in this process or in one of its own.

    The model is loaded when it is first needed, once for all who wait for it, while the event loop goes on. Texts of
    all callers then go through one queue (see `batcher`).

    Args:
        card: what is known of the model before it is loaded.
        load: loads it; called on a thread of its own.
        identify: finds its files without loading them, and says what identifies its vectors and what its card is;
            called on a thread of its own.
        max_queued_tokens: tokens that may wait for it.
        workers: how many of its batches run at the same time; None for as many as it finds good.
    """

    origin = "local"

    def __init__(
        self,
        card: ModelCard,
        load: Callable[[], LoadedModel],
        identify: Callable[[], tuple[str, ModelCard]],
        *,
        max_queued_tokens: int = MAX_QUEUED_TOKENS,
        workers: int | None = None,
    ) -> None:
        self.card = card
        self._workers = workers
        self._max_queued_tokens = max_queued_tokens
        self._loaded = AsyncLazy(f"load {card.id}", load, drop=lambda model: model.close())
        self._identified = AsyncLazy(f"identify {card.id}", identify)
        self._batcher: Batcher[_Kind, Any] | None = None
        self._tokens_of_character = _TOKENS_OF_CHARACTER
        self._closed = False

    async def identify(self) -> str:
        """See `Embedder.identify`."""
        self._check_open()
        identity, self.card = await self._identified.get()
        return identity

    async def embed(
        self,
        texts: Sequence[str],
        *,
        input_type: InputType | None,
        truncate: Truncate,
        on_progress: OnProgress | None = None,
        on_rows: OnRows | None = None,
    ) -> Embeddings:
        """See `Embedder.embed`."""
        model, batcher = await self._ready()
        vectors = np.empty((len(texts), model.facts.dimensions), dtype=np.float32)

        def take(places: Sequence[int], made: Sequence[FloatVector]) -> None:
            rows = np.stack(made)
            vectors[places] = rows
            if on_rows is not None:
                on_rows(places, Embeddings(rows, [request.counts[place] for place in places]))

        request = _Request(texts, input_type, truncate)
        await self._compute(request, model, batcher, take, on_progress, every=False)
        return Embeddings(vectors, request.counts)

    async def represent(
        self,
        texts: Sequence[str],
        *,
        input_type: InputType | None,
        truncate: Truncate,
        on_progress: OnProgress | None = None,
    ) -> Representations:
        """See `MultiEmbedder.represent`."""
        model, batcher = await self._ready()
        found: dict[int, tuple[FloatVector, SparseVector, FloatMatrix]] = {}

        def take(places: Sequence[int], made: Sequence[tuple[FloatVector, SparseVector, FloatMatrix]]) -> None:
            found.update(zip(places, made, strict=True))

        request = _Request(texts, input_type, truncate)
        await self._compute(request, model, batcher, take, on_progress, every=True)
        vectors, sparse, colbert = zip(*(found[index] for index in range(len(texts))), strict=True)
        return Representations(np.stack(vectors), sparse=sparse, colbert=colbert, prompt_tokens=sum(request.counts))

    async def check(self) -> None:
        """See `Embedder.check`: loads the model if it is not loaded yet."""
        await self._ready()

    async def aclose(self) -> None:
        """Take no more work, and let the model go; a batch that is running ends by itself."""
        self._closed = True
        if self._batcher is not None:
            self._batcher.close(ServerStopped())
        self._loaded.close()
        self._identified.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ServerStopped

    async def _compute(
        self,
        request: _Request,
        model: LoadedModel,
        batcher: Batcher[_Kind, Any],
        take: OnResults[Any],
        on_progress: OnProgress | None,
        *,
        every: bool,
    ) -> None:
        """Have something made of a request's texts, the first of them while the others are still tokenized."""
        texts, counts = request.texts, request.counts
        most = model.facts.card.max_tokens or sys.maxsize
        expected = [min(most, math.ceil(len(text) * self._tokens_of_character)) for text in texts]
        # What finds no room is refused before it is tokenized; by its texts it is known when it comes again.
        with batcher.expecting((caller_name(), hash(tuple(texts))), sum(expected)) as claim:
            pieces = model.tokenize(texts, input_type=request.input_type, truncate=request.truncate)
            beside = sum(map(len, texts)) > _CHARACTERS_ON_LOOP

            async def read() -> Tokens:
                with telemetry.stage("tokenise"):
                    tokens = await anyio.to_thread.run_sync(next, pieces) if beside else next(pieces)
                piece = slice(len(counts), len(counts) + len(tokens.rows))
                self._note_tokens(texts[piece], tokens.counts, most)
                counts.extend(tokens.counts)
                claim.expected -= sum(expected[piece])
                return tokens

            async def more() -> Sequence[Row]:
                return (await read()).rows if len(counts) < len(texts) else ()

            first = await read()
            kind = _Kind(first.skip, every)
            await batcher.submit(kind, first.rows, take, on_progress, more=more, claim=claim)

    def _note_tokens(self, texts: Sequence[str], counts: Sequence[int], most: int) -> None:
        """Learn how many tokens the characters of such texts make, of those texts that were not cut off."""
        whole = [(len(text), count) for text, count in zip(texts, counts, strict=True) if count < most]
        if characters := sum(length for length, _ in whole):
            seen = sum(count for _, count in whole) / characters
            weight = characters / (characters + _CHARACTERS_REMEMBERED)
            self._tokens_of_character += weight * (seen - self._tokens_of_character)

    async def _ready(self) -> tuple[LoadedModel, Batcher[_Kind, Any]]:
        """The loaded model, and the queue before it."""
        self._check_open()
        model = await self._loaded.get()
        if not model.alive:
            if self._loaded.forget(model) and self._batcher is not None:
                self._batcher.close(ModelUnavailable(f"{self.card.id} has ended; the next request starts it again"))
                self._batcher = None
            model = await self._loaded.get()
        self.card = model.facts.card
        if self._batcher is None:
            self._batcher = _batcher(model, self._max_queued_tokens, self._workers)
        return model, self._batcher


def _batcher(model: LoadedModel, max_queued_tokens: int, workers: int | None) -> Batcher[_Kind, Any]:
    cores = usable_cores()
    workers = workers or model.workers(cores)

    def run(kind: _Kind, rows: Sequence[Row]) -> Sequence[Any]:
        if not kind.every:
            return list(model.forward(rows, kind.skip))
        return list(zip(*model.forward_all(rows, kind.skip), strict=True))

    return Batcher(
        run,
        workers=workers,
        budget=model.facts.tokens_per_batch,
        least_share=model.facts.least_tokens_per_batch,
        max_queued_tokens=max_queued_tokens,
        padded=not model.facts.packed,
        prepare_worker=functools.partial(model.compute_on, max(1, cores // workers)),
    )

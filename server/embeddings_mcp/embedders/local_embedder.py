"""An embedder for a local model: loaded lazily, and never run on the event loop."""

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
    from embeddings_mcp.embedders.local.inputs import Row, TokenizedBatch
    from embeddings_mcp.embedders.local.runtime.loaded_model import LoadedModel

_MAX_CHARACTERS_ON_LOOP = 2048
"""Requests of more characters than this in total are tokenized on a worker thread instead of the event loop: this many
take half a millisecond, as long as the round trip to a thread."""

_INITIAL_TOKENS_PER_CHARACTER = 0.25
"""The estimate before any texts were seen: in English a token has four or five characters."""

_SMOOTHING_CHARACTERS = 10_000
"""Number of characters at which a request weighs as much in the moving average as all earlier ones together; large
enough that many short queries, each with its special tokens, do not inflate the estimate for a large request."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """What to compute; only texts of the same kind share a forward pass.

    Attributes:
        skip: number of tokens at the start of each text that are not pooled.
        all_outputs: whether to compute all of the model's outputs, or the dense vectors only.
    """

    skip: int
    all_outputs: bool


@dataclass(frozen=True, slots=True)
class _Request:
    """One call to embed texts.

    Attributes:
        texts: the texts to embed.
        input_type: whether they are queries or passages.
        truncate: how texts that are too long are truncated.
        counts: number of tokens of each text that has been tokenized so far.
    """

    texts: Sequence[str]
    input_type: InputType | None
    truncate: Truncate
    counts: list[int] = field(default_factory=list)


class LocalEmbedder:
    """Embeds with a model that runs on this machine, in this process or in a subprocess.

    The model is loaded on first use, once for all waiting calls, without blocking the event loop. The texts of all
    callers then go through one queue (see `batcher`).

    Args:
        card: the model's card as far as it is known before loading.
        load: loads the model; called on a thread of its own.
        identify: finds the model's files without loading them, and returns the identity of its vectors and its card;
            called on a thread of its own.
        max_queued_tokens: limit of queued tokens.
        workers: how many batches run at the same time; None for the model's default.
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
        self._loaded = AsyncLazy(f"load {card.id}", load, dispose=lambda model: model.close())
        self._identified = AsyncLazy(f"identify {card.id}", identify)
        self._batcher: Batcher[_Kind, Any] | None = None
        self._tokens_per_character = _INITIAL_TOKENS_PER_CHARACTER
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
        model, batcher = await self._ensure_loaded()
        vectors = np.empty((len(texts), model.info.dimensions), dtype=np.float32)

        def on_results(indices: Sequence[int], results: Sequence[FloatVector]) -> None:
            rows = np.stack(results)
            vectors[indices] = rows
            if on_rows is not None:
                on_rows(indices, Embeddings(rows, [request.counts[index] for index in indices]))

        request = _Request(texts, input_type, truncate)
        await self._compute(request, model, batcher, on_results, on_progress, all_outputs=False)
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
        model, batcher = await self._ensure_loaded()
        outputs: dict[int, tuple[FloatVector, SparseVector, FloatMatrix]] = {}

        def on_results(
            indices: Sequence[int], results: Sequence[tuple[FloatVector, SparseVector, FloatMatrix]]
        ) -> None:
            outputs.update(zip(indices, results, strict=True))

        request = _Request(texts, input_type, truncate)
        await self._compute(request, model, batcher, on_results, on_progress, all_outputs=True)
        vectors, sparse, colbert = zip(*(outputs[index] for index in range(len(texts))), strict=True)
        return Representations(np.stack(vectors), sparse=sparse, colbert=colbert, prompt_tokens=sum(request.counts))

    async def check(self) -> None:
        """See `Embedder.check`: loads the model if it is not loaded yet."""
        await self._ensure_loaded()

    async def aclose(self) -> None:
        """Refuse new work and release the model; a batch that is running finishes."""
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
        on_results: OnResults[Any],
        on_progress: OnProgress | None,
        *,
        all_outputs: bool,
    ) -> None:
        """Tokenize a request's texts and run them through the model; the first run while others are being tokenized."""
        texts, counts = request.texts, request.counts
        max_tokens = model.info.card.max_tokens or sys.maxsize
        expected = [min(max_tokens, math.ceil(len(text) * self._tokens_per_character)) for text in texts]
        # Refused before it is tokenized if the queue is full; a retry is recognized by its texts.
        with batcher.admit((caller_name(), hash(tuple(texts))), sum(expected)) as claim:
            token_batches = model.tokenize(texts, input_type=request.input_type, truncate=request.truncate)
            on_thread = sum(map(len, texts)) > _MAX_CHARACTERS_ON_LOOP

            async def tokenize_next() -> TokenizedBatch:
                with telemetry.stage("tokenize"):
                    batch = await anyio.to_thread.run_sync(next, token_batches) if on_thread else next(token_batches)
                tokenized = slice(len(counts), len(counts) + len(batch.rows))  # positions of their texts
                self._update_estimate(texts[tokenized], batch.counts, max_tokens)
                counts.extend(batch.counts)
                claim.expected -= sum(expected[tokenized])
                return batch

            async def more() -> Sequence[Row]:
                return (await tokenize_next()).rows if len(counts) < len(texts) else ()

            first = await tokenize_next()
            kind = _Kind(first.skip, all_outputs)
            await batcher.submit(kind, first.rows, on_results, on_progress, more=more, claim=claim)

    def _update_estimate(self, texts: Sequence[str], counts: Sequence[int], max_tokens: int) -> None:
        """Update the moving average of tokens per character from the texts that were not truncated."""
        untruncated = [(len(text), count) for text, count in zip(texts, counts, strict=True) if count < max_tokens]
        if characters := sum(length for length, _ in untruncated):
            observed = sum(count for _, count in untruncated) / characters
            weight = characters / (characters + _SMOOTHING_CHARACTERS)
            self._tokens_per_character += weight * (observed - self._tokens_per_character)

    async def _ensure_loaded(self) -> tuple[LoadedModel, Batcher[_Kind, Any]]:
        """Load the model if necessary; return it and its queue."""
        self._check_open()
        model = await self._loaded.get()
        if not model.alive:
            if self._loaded.invalidate(model) and self._batcher is not None:
                self._batcher.close(
                    ModelUnavailable(f"the process of {self.card.id} has ended; the next request starts it again")
                )
                self._batcher = None
            model = await self._loaded.get()
        self.card = model.info.card
        if self._batcher is None:
            self._batcher = _make_batcher(model, self._max_queued_tokens, self._workers)
        return model, self._batcher


def _make_batcher(model: LoadedModel, max_queued_tokens: int, workers: int | None) -> Batcher[_Kind, Any]:
    cores = usable_cores()
    workers = workers or model.workers(cores)

    def run(kind: _Kind, rows: Sequence[Row]) -> Sequence[Any]:
        if not kind.all_outputs:
            return list(model.forward(rows, kind.skip))
        return list(zip(*model.forward_all(rows, kind.skip), strict=True))

    return Batcher(
        run,
        workers=workers,
        budget=model.info.tokens_per_batch,
        min_share=model.info.min_tokens_per_batch,
        max_queued_tokens=max_queued_tokens,
        padded=not model.info.packed,
        prepare_worker=functools.partial(model.set_thread_cores, max(1, cores // workers)),
    )

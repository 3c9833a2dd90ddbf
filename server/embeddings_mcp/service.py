"""The service: handles a whole request, independently of the transport and of how vectors are computed.

It resolves the model, checks the request against the model card, gets vectors from one embedder, and builds the
response: vectors shortened and renormalized, encoded or scored, and token usage.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import anyio.to_thread
import numpy as np
from pydantic import SecretStr

from embeddings_mcp import responses
from embeddings_mcp.catalog import DEFAULT, Catalog, ModelSource
from embeddings_mcp.embedders.base import Embedder, Embeddings, MultiEmbedder, OnProgress, Representations
from embeddings_mcp.errors import InputUnusable, InvalidRequest, ModelUnavailable, UpstreamFailed
from embeddings_mcp.models import InputType, Mode, ModelCard, Truncate
from embeddings_mcp.responses import EmbedderResult
from embeddings_mcp.schema import (
    ColbertEmbeddingRequest,
    ColbertEmbeddingResponse,
    EmbeddingRequest,
    EmbeddingResponse,
    ModelEntry,
    ModelsResponse,
    SearchRequest,
    SearchResponse,
    SimilarityRequest,
    SimilarityResponse,
    SparseEmbeddingRequest,
    SparseEmbeddingResponse,
    TypedEmbeddingRequest,
    Usage,
    count_texts,
    texts_of,
)
from embeddings_mcp.vectors import shorten

_Result = TypeVar("_Result")

MAX_SCORES = 10_000
"""Maximum scores in a `similarity` response: more would only fill a model's context. `search` is limited by `top_k`."""

_MAX_NUMBERS_ON_EVENT_LOOP = 1 << 16
"""Vectors with more components than this in total (some 5 ms of work) are processed on a worker thread."""


class EmbeddingService:
    """Handles requests with the given embedders.

    Args:
        embedders: one per model.
        default_model: the model name that ``default`` stands for.
        sources: endpoints with more models.
        keys: configured keys, which no error repeats.

    Attributes:
        catalog: the models served.

    Raises:
        InvalidSetting: two embedders share a name, one is named ``default``, or none matches `default_model`.
    """

    def __init__(
        self,
        embedders: Iterable[Embedder],
        *,
        default_model: str,
        sources: Iterable[ModelSource] = (),
        keys: Collection[SecretStr] = (),
    ) -> None:
        self.catalog = Catalog(embedders, sources, default=default_model, keys=keys)

    # --- Operations --------------------------------------------------------------------------------------------------

    async def create_embedding(
        self, request: EmbeddingRequest, on_progress: OnProgress | None = None
    ) -> EmbeddingResponse:
        """Embed the request's texts; row i of ``data`` belongs to text i.

        Raises:
            EmbeddingsError: any subclass in `errors`; ``param`` names the field at fault.
        """
        embedder, input_type = await self._resolve(request.model, request.input_type)
        result = await self._embed(
            embedder,
            texts_of(request),
            input_type=input_type,
            truncate=request.truncate,
            dimensions=request.dimensions,
            on_progress=on_progress,
        )
        embedding_type = request.embedding_type if isinstance(request, TypedEmbeddingRequest) else "float"
        return {
            "object": "list",
            "data": await _compute(
                result, lambda: responses.encode_embeddings(result.vectors, request.encoding_format, embedding_type)
            ),
            "model": result.served_model or embedder.card.id,
            "usage": responses.usage(result),
        }

    async def create_sparse_embedding(
        self, request: SparseEmbeddingRequest, on_progress: OnProgress | None = None
    ) -> SparseEmbeddingResponse:
        """Return the lexical weights of the request's texts; entry i of ``data`` belongs to text i.

        Raises:
            EmbeddingsError: any subclass in `errors`; ``param`` names the field at fault.
        """
        embedder, result = await self._represent_input(request, on_progress, "sparse")
        return {
            "object": "list",
            "data": responses.encode_sparse(result),
            "model": embedder.card.id,
            "usage": responses.usage(result),
        }

    async def create_colbert_embedding(
        self, request: ColbertEmbeddingRequest, on_progress: OnProgress | None = None
    ) -> ColbertEmbeddingResponse:
        """Return the token vectors of the request's texts; entry i of ``data`` belongs to text i.

        Raises:
            EmbeddingsError: any subclass in `errors`; ``param`` names the field at fault.
        """
        embedder, result = await self._represent_input(request, on_progress, "colbert")
        return {
            "object": "list",
            "data": await _compute(result, lambda: responses.encode_colbert(result, request.encoding_format)),
            "model": embedder.card.id,
            "usage": responses.usage(result),
        }

    async def similarity(self, request: SimilarityRequest, on_progress: OnProgress | None = None) -> SimilarityResponse:
        """Score every ``input`` against every ``other``, or the texts of ``input`` against each other.

        Raises:
            EmbeddingsError: any subclass in `errors`; ``param`` names the field at fault.
        """
        if request.other is None and isinstance(request.input, str):
            # Its score with itself would be 1, which would hide a mistake such as an array sent as a JSON string.
            raise InvalidRequest(
                "`other` is required where `input` is one string; to compare several texts, send an array of strings",
                param="other",
            )
        rows = count_texts(request.input)
        columns = None if request.other is None else count_texts(request.other)
        _check_scores(rows, columns, request.top_k)
        if request.mode != "dense" and request.metric != "cosine":
            raise InvalidRequest("`metric` is for mode 'dense' only: leave it out", param="metric")
        embedder, input_type = await self._resolve(request.model, request.input_type)
        result = await self._embed(
            embedder,
            texts_of(request),
            mode=request.mode,
            input_type=input_type,
            truncate=request.truncate,
            dimensions=request.dimensions,
            on_progress=on_progress,
        )
        left = responses.select(result, slice(rows))
        right = left if columns is None else responses.select(result, slice(rows, None))
        # Called only in `_compute`, since preparing the right side may take long too.
        make_scorer = functools.partial(responses.make_block_scorer, left, right, request.mode, request.metric)
        response: SimilarityResponse = {
            "model": result.served_model or embedder.card.id,
            "usage": responses.usage(result),
        }
        if request.mode == "dense":
            response["metric"] = request.metric
        if (top_k := request.top_k) is None:
            response["scores"] = await _compute(result, lambda: responses.matrix(make_scorer()))
        else:
            response["pairs"] = await _compute(
                result, lambda: responses.pairs(make_scorer(), rows, columns, request.metric, top_k)
            )
        return response

    async def search(self, request: SearchRequest, on_progress: OnProgress | None = None) -> SearchResponse:
        """Rank the passages of ``input`` by closeness to ``query``.

        Raises:
            EmbeddingsError: any subclass in `errors`; ``param`` names the field at fault.
        """
        embedder, suffix_type = await self._resolve(request.model, None)
        if suffix_type is not None:
            raise InvalidRequest(
                f"`model` must be without the suffix -{suffix_type} here: search embeds the query as a query and the "
                "passages as passages",
                param="model",
            )
        query, passages, usage = await self._embed_query_and_passages(embedder, request, on_progress)
        make_scorer = functools.partial(responses.make_block_scorer, query, passages, request.mode, "cosine")
        rows, columns = len(query.vectors), len(passages.vectors)
        return {
            "model": passages.served_model or embedder.card.id,
            "results": await _compute(passages, lambda: responses.ranking(make_scorer(), rows, columns, request.top_k)),
            "usage": usage,
        }

    async def list_models(self) -> ModelsResponse:
        """List every model served, in configuration order, after refreshing the lists of the endpoints."""
        await self.catalog.refresh()
        return {"models": self.known_models()}

    def known_models(self) -> list[ModelEntry]:
        """List the models known so far, without a request to any endpoint."""
        return [self._entry(embedder) for embedder in self.catalog.known]

    async def describe(self, model: str) -> ModelEntry:
        """Describe one model.

        Raises:
            UnknownModel: it is not served here.
            UpstreamUnavailable: an endpoint that may serve it cannot be reached.
        """
        return self._entry((await self.catalog.find(model))[0])

    async def load_default(self) -> None:
        """Load the default model if it is a local one; do nothing if it is served by an endpoint.

        Raises:
            ModelUnavailable: it cannot be loaded; the message says why.
        """
        default = self.catalog.default
        if default is not None and default.origin == "local":
            await default.check()

    async def check(self) -> None:
        """Wait until the default model is ready.

        Raises:
            EmbeddingsError: it cannot be made ready; the message says why.
        """
        await (await self.catalog.find(DEFAULT))[0].check()

    async def aclose(self) -> None:
        """Close every embedder, even if closing one of them fails."""
        await self.catalog.aclose()

    # --- Steps -------------------------------------------------------------------------------------------------------

    async def _resolve(self, model: str, input_type: InputType | None) -> tuple[Embedder, InputType | None]:
        """Return the embedder for a model name, its card complete, and the input type, which a suffix may imply."""
        embedder, implied = await self.catalog.find(model)
        # Before this, the card of a hub model may have only its name, so a missing input type would go unnoticed.
        await embedder.identify()
        if implied is None:
            return embedder, input_type
        if input_type not in {None, implied}:
            raise InvalidRequest(
                f"`input_type` is '{input_type}', but the model name ends in -{implied}: leave one of them out",
                param="input_type",
            )
        return embedder, implied

    async def _embed(
        self,
        embedder: Embedder,
        fields: Mapping[str, str | list[str]],
        *,
        mode: Mode = "dense",
        input_type: InputType | None,
        truncate: Truncate,
        dimensions: int | None,
        on_progress: OnProgress | None,
    ) -> EmbedderResult:
        """Embed the texts of the fields, in order, as `mode` needs it and at the requested length."""
        _check_input_type(embedder.card, input_type)
        if dimensions is not None:
            if embedder.card.dimensions is None:
                await embedder.check()  # the length of an endpoint's model is known from its first vector
            _check_dimensions(embedder.card, dimensions)
        embed = embedder.embed if mode == "dense" else _require_mode(embedder, mode, field="mode").represent
        texts = [text for value in fields.values() for text in _as_list(value)]
        try:
            result = await embed(texts, input_type=input_type, truncate=truncate, on_progress=on_progress)
        except InputUnusable as error:
            raise error.reindexed(name=functools.partial(_field_of, fields)) from None
        return await _compute(result, lambda: _validated(result, embedder.card, fields, dimensions))

    async def _embed_query_and_passages(
        self, embedder: Embedder, request: SearchRequest, on_progress: OnProgress | None
    ) -> tuple[EmbedderResult, EmbedderResult, Usage]:
        """Embed the query and the passages, in one call for a symmetric model; also return the usage.

        Raises:
            UpstreamFailed: the model behind a name at an endpoint changed in between.
        """
        embed = functools.partial(
            self._embed, embedder, mode=request.mode, truncate=request.truncate, dimensions=request.dimensions
        )
        query_count = count_texts(request.query)
        if embedder.card.input_type == "ignored":
            result = await embed(texts_of(request), input_type=None, on_progress=on_progress)
            return (
                responses.select(result, slice(query_count)),
                responses.select(result, slice(query_count, None)),
                responses.usage(result),
            )
        query = await embed({"query": request.query}, input_type="query", on_progress=on_progress)
        passages = await embed(
            {"input": request.input}, input_type="passage", on_progress=_offset_progress(on_progress, query_count)
        )
        if (query.served_model, query.vectors.shape[1]) != (passages.served_model, passages.vectors.shape[1]):
            raise UpstreamFailed(
                f"the vectors of the query and of the passages, from {embedder.origin}, are of different models behind "
                f"the name {embedder.card.id} and cannot be compared: try again"
            )
        return query, passages, responses.usage(query, passages)

    async def _represent_input(
        self, request: SparseEmbeddingRequest, on_progress: OnProgress | None, mode: Mode
    ) -> tuple[Embedder, Representations]:
        embedder, input_type = await self._resolve(request.model, request.input_type)
        _require_mode(embedder, mode, field="model")
        result = await self._embed(
            embedder,
            texts_of(request),
            mode=mode,
            input_type=input_type,
            truncate=request.truncate,
            dimensions=None,
            on_progress=on_progress,
        )
        assert isinstance(result, Representations)
        return embedder, result

    def _entry(self, embedder: Embedder) -> ModelEntry:
        card = embedder.card
        entry: ModelEntry = {
            "id": card.id,
            "aliases": list(card.aliases),
            "default": embedder is self.catalog.default,
            "allowed_dimensions": list(card.matryoshka),
            "input_type": card.input_type,
            "modes": list(card.modes),
            "served_from": embedder.origin,
        }
        if card.dimensions is not None:
            entry["dimensions"] = card.dimensions
        if card.max_tokens is not None:
            entry["max_tokens"] = card.max_tokens
        if card.license is not None:
            entry["license"] = f"{card.license} (no commercial use)" if card.non_commercial else card.license
        if card.hosted_until is not None:
            entry["hosted_until"] = card.hosted_until
        return entry


async def _compute(result: EmbedderResult, work: Callable[[], _Result]) -> _Result:
    """Run `work` on `result`: on a worker thread if it would block the event loop for long."""
    quick = isinstance(result, Embeddings) and result.vectors.size <= _MAX_NUMBERS_ON_EVENT_LOOP
    return work() if quick else await anyio.to_thread.run_sync(work)


# --- Checks ----------------------------------------------------------------------------------------------------------


def _check_input_type(card: ModelCard, input_type: InputType | None) -> None:
    if card.input_type == "required" and input_type is None:
        raise InvalidRequest(
            f"`input_type` is required by {card.id}, which embeds questions and documents differently: 'query' for "
            "search queries, 'passage' for the texts to search",
            param="input_type",
        )


def _require_mode(embedder: Embedder, mode: Mode, *, field: str) -> MultiEmbedder:
    """Return the embedder if it supports `mode`; otherwise raise an error that names `field` as the one to change."""
    if mode in embedder.card.modes and isinstance(embedder, MultiEmbedder):
        return embedder
    raise InvalidRequest(
        f"`{field}`: {embedder.card.id} does not support mode '{mode}'; its modes are: "
        f"{', '.join(embedder.card.modes)}",
        param=field,
    )


def _check_dimensions(card: ModelCard, dimensions: int) -> None:
    if dimensions == card.dimensions or dimensions in card.matryoshka:
        return
    if card.dimensions is None:
        accepted = "the length of its vectors, and whether they can be shortened, is not known here"
    elif card.matryoshka:
        accepted = f"accepted are {', '.join(str(length) for length in card.matryoshka)} and {card.dimensions}"
    else:
        accepted = f"its vectors have {card.dimensions} and cannot be shortened (it is not a Matryoshka model)"
    raise InvalidRequest(
        f"`dimensions` {str(dimensions)[:20]} is not possible with {card.id}: {accepted}", param="dimensions"
    )


def _check_scores(rows: int, columns: int | None, top_k: int | None) -> None:
    """Reject a comparison that would return more than `MAX_SCORES` scores."""
    if top_k is None and (scores := rows * (columns or rows)) > MAX_SCORES:
        raise InvalidRequest(
            f"`top_k` is required here: {scores:,} scores exceed the limit of {MAX_SCORES:,} per response",
            param="top_k",
        )
    pairs = rows * (rows - 1) // 2 if columns is None else rows * columns
    if top_k is not None and min(top_k, pairs) > MAX_SCORES:
        raise InvalidRequest(f"`top_k` must be at most {MAX_SCORES:,} here: there are {pairs:,} pairs", param="top_k")


def _offset_progress(on_progress: OnProgress | None, offset: int) -> OnProgress | None:
    """Return a callback that adds `offset` to the number of texts done."""
    if on_progress is None:
        return None

    async def report(done: int) -> None:
        await on_progress(offset + done)

    return report


def _field_of(fields: Mapping[str, str | list[str]], index: int) -> str:
    """Return the field of a text, and the index in it, from its `index` among the texts of all fields."""
    for field, value in fields.items():
        if index < count_texts(value):
            return field if isinstance(value, str) else f"{field}[{index}]"
        index -= count_texts(value)
    raise IndexError(index)


def _as_list(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def _validated(
    result: EmbedderResult, card: ModelCard, fields: Mapping[str, str | list[str]], dimensions: int | None
) -> EmbedderResult:
    """Check that all vectors are finite, and shorten them to the requested length."""
    broken = np.flatnonzero(~np.isfinite(result.vectors).all(axis=1))
    if broken.size:
        raise ModelUnavailable(
            f"the model {card.id} returned values that are not finite for `{_field_of(fields, int(broken[0]))}`"
        )
    if dimensions is None or dimensions == result.vectors.shape[1]:
        return result
    return replace(result, vectors=shorten(result.vectors, dimensions))

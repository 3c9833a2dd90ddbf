"""The service: the only place that knows a whole request.

It resolves the model, checks what the model allows, asks one embedder for vectors, and makes the answer: cut and
renormalised, encoded, scored, with usage counted. It knows neither how vectors are made nor how a request came in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import anyio.to_thread
import numpy as np

from embeddings_mcp import responses
from embeddings_mcp.catalogue import DEFAULT, Catalogue, ModelSource
from embeddings_mcp.embedders.base import (
    Embedder,
    Embeddings,
    MultiEmbedder,
    OnProgress,
    Representations,
)
from embeddings_mcp.errors import InputUnusable, InvalidRequest, ModelUnavailable
from embeddings_mcp.models import InputType, Mode, ModelCard, Truncate
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
"""Most scores in one answer of `similarity`: more would only fill a model's context. `search` answers with `top_k`."""

_NUMBERS_ON_LOOP = 1 << 16
"""Vectors of more numbers than these, all together, are worked on beside the event loop: some 5 ms of work."""


class EmbeddingService:
    """Answers requests with the embedders it was given.

    Args:
        embedders: one for each model.
        default_model: the name that ``default`` stands for.
        sources: where there are more models.

    Attributes:
        catalogue: the models.

    Raises:
        InvalidSetting: two embedders answer to one name, one to ``default``, or none to `default_model`.
    """

    def __init__(
        self, embedders: Iterable[Embedder], *, default_model: str, sources: Iterable[ModelSource] = ()
    ) -> None:
        self.catalogue = Catalogue(embedders, sources, default=default_model)

    # --- What can be asked -------------------------------------------------------------------------------------------

    async def create_embedding(
        self, request: EmbeddingRequest, on_progress: OnProgress | None = None
    ) -> EmbeddingResponse:
        """Embed the request's texts; row i of ``data`` belongs to text i.

        Raises:
            EmbeddingsError: any of the tree in `errors`; ``param`` names the field to blame.
        """
        embedder, input_type = await self._resolve(request.model, request.input_type)
        made = await self._embed(
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
                made, lambda: responses.encoded(made.vectors, request.encoding_format, embedding_type)
            ),
            "model": made.served_model or embedder.card.id,
            "usage": responses.usage(made),
        }

    async def create_sparse_embedding(
        self, request: SparseEmbeddingRequest, on_progress: OnProgress | None = None
    ) -> SparseEmbeddingResponse:
        """The lexical weights of the request's texts; entry i of ``data`` belongs to text i.

        Raises:
            EmbeddingsError: any of the tree in `errors`; ``param`` names the field to blame.
        """
        embedder, made = await self._represent_input(request, on_progress, "sparse")
        return {
            "object": "list",
            "data": responses.sparse_encoded(made),
            "model": embedder.card.id,
            "usage": responses.usage(made),
        }

    async def create_colbert_embedding(
        self, request: ColbertEmbeddingRequest, on_progress: OnProgress | None = None
    ) -> ColbertEmbeddingResponse:
        """The token vectors of the request's texts; entry i of ``data`` belongs to text i.

        Raises:
            EmbeddingsError: any of the tree in `errors`; ``param`` names the field to blame.
        """
        embedder, made = await self._represent_input(request, on_progress, "colbert")
        return {
            "object": "list",
            "data": await _compute(made, lambda: responses.colbert_encoded(made, request.encoding_format)),
            "model": embedder.card.id,
            "usage": responses.usage(made),
        }

    async def similarity(self, request: SimilarityRequest, on_progress: OnProgress | None = None) -> SimilarityResponse:
        """Score every ``input`` against every ``other``, or the texts of ``input`` against each other.

        Raises:
            EmbeddingsError: any of the tree in `errors`; ``param`` names the field to blame.
        """
        if request.other is None and isinstance(request.input, str):
            # Its score with itself would be 1, also where it is several texts by mistake, as an array written as JSON.
            raise InvalidRequest(
                "`other` is required where `input` is one string; several texts are given as an array of strings",
                param="other",
            )
        rows = count_texts(request.input)
        columns = None if request.other is None else count_texts(request.other)
        _check_scores(rows, columns, request.top_k)
        if request.mode != "dense" and request.metric != "cosine":
            raise InvalidRequest("`metric` is for mode 'dense' only: leave it out", param="metric")
        embedder, input_type = await self._resolve(request.model, request.input_type)
        made = await self._embed(
            embedder,
            texts_of(request),
            mode=request.mode,
            input_type=input_type,
            truncate=request.truncate,
            dimensions=request.dimensions,
            on_progress=on_progress,
        )
        left = responses.part(made, slice(rows))
        right = left if columns is None else responses.part(made, slice(rows, None))
        compare = functools.partial(responses.comparison, left, right, request.mode, request.metric)
        response: SimilarityResponse = {
            "model": made.served_model or embedder.card.id,
            "usage": responses.usage(made),
        }
        if request.mode == "dense":
            response["metric"] = request.metric
        if (top_k := request.top_k) is None:
            response["scores"] = await _compute(made, lambda: responses.matrix(compare()))
        else:
            response["pairs"] = await _compute(
                made, lambda: responses.pairs(compare(), rows, columns, request.metric, top_k)
            )
        return response

    async def search(self, request: SearchRequest, on_progress: OnProgress | None = None) -> SearchResponse:
        """Rank the passages of ``input`` by closeness to ``query``.

        Raises:
            EmbeddingsError: any of the tree in `errors`; ``param`` names the field to blame.
        """
        embedder, asked_type = await self._resolve(request.model, None)
        if asked_type is not None:
            raise InvalidRequest(
                f"`model` must be without the suffix -{asked_type} here: search embeds the query as a query and the "
                "passages as passages",
                param="model",
            )
        query, found, usage = await self._query_and_passages(embedder, request, on_progress)
        compare = functools.partial(responses.comparison, query, found, request.mode, "cosine")
        rows, columns = len(query.vectors), len(found.vectors)
        return {
            "model": found.served_model or embedder.card.id,
            "results": await _compute(found, lambda: responses.ranking(compare(), rows, columns, request.top_k)),
            "usage": usage,
        }

    async def list_models(self) -> ModelsResponse:
        """Every model served, in the order it was given; endpoints are asked what they have."""
        await self.catalogue.refresh()
        return {"models": self.known_models()}

    def known_models(self) -> list[ModelEntry]:
        """The models of which it is known now that they are served; nothing is asked for it."""
        return [self._entry(embedder) for embedder in self.catalogue.known]

    async def describe(self, model: str) -> ModelEntry:
        """What is known of one model.

        Raises:
            UnknownModel: it is not served here.
            UpstreamUnavailable: an endpoint cannot be asked whether it is.
        """
        return self._entry((await self.catalogue.find(model))[0])

    async def load_default(self) -> None:
        """Return once the default model is loaded, where it runs here; of an endpoint nothing is asked.

        Raises:
            ModelUnavailable: it cannot be loaded, and why.
        """
        default = self.catalogue.default
        if default is not None and default.origin == "local":
            await default.check()

    async def check(self) -> None:
        """Return once the default model can answer.

        Raises:
            EmbeddingsError: it cannot, and why.
        """
        await (await self.catalogue.find(DEFAULT))[0].check()

    async def aclose(self) -> None:
        """Close every embedder, also where one cannot be closed."""
        await self.catalogue.aclose()

    # --- The steps ---------------------------------------------------------------------------------------------------

    async def _resolve(self, model: str, input_type: InputType | None) -> tuple[Embedder, InputType | None]:
        """The embedder that a model name means, its card exact, and the input type, which the name's suffix may say."""
        embedder, implied = await self.catalogue.find(model)
        # Of a model of the hub only the name is known before, and a wrong prompt would show in no error.
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
    ) -> responses.Made:
        """What `mode` needs, at the length asked for, of the texts in these fields, one field after the other."""
        _check_input_type(embedder.card, input_type)
        if dimensions is not None:
            if embedder.card.dimensions is None:
                await embedder.check()  # an endpoint tells its model's length with the first vector
            _check_dimensions(embedder.card, dimensions)
        make = embedder.embed if mode == "dense" else _representing(embedder, mode, field="mode").represent
        texts = [text for value in fields.values() for text in _as_list(value)]
        try:
            made = await make(texts, input_type=input_type, truncate=truncate, on_progress=on_progress)
        except InputUnusable as error:
            raise error.about(name=functools.partial(_place, fields)) from None
        return await _compute(made, lambda: _finished(made, embedder.card, fields, dimensions))

    async def _query_and_passages(
        self, embedder: Embedder, request: SearchRequest, on_progress: OnProgress | None
    ) -> tuple[responses.Made, responses.Made, Usage]:
        """What `mode` needs of the query and of the passages, and what it cost; of a symmetric model in one call."""
        make = functools.partial(
            self._embed, embedder, mode=request.mode, truncate=request.truncate, dimensions=request.dimensions
        )
        queries = count_texts(request.query)
        if embedder.card.input_type == "ignored":
            made = await make(texts_of(request), input_type=None, on_progress=on_progress)
            return (
                responses.part(made, slice(queries)),
                responses.part(made, slice(queries, None)),
                responses.usage(made),
            )
        query = await make({"query": request.query}, input_type="query", on_progress=on_progress)
        found = await make({"input": request.input}, input_type="passage", on_progress=_after(queries, on_progress))
        return query, found, responses.usage(query, found)

    async def _represent_input(
        self, request: SparseEmbeddingRequest, on_progress: OnProgress | None, mode: Mode
    ) -> tuple[Embedder, Representations]:
        embedder, input_type = await self._resolve(request.model, request.input_type)
        _representing(embedder, mode, field="model")
        made = await self._embed(
            embedder,
            texts_of(request),
            mode=mode,
            input_type=input_type,
            truncate=request.truncate,
            dimensions=None,
            on_progress=on_progress,
        )
        assert isinstance(made, Representations)
        return embedder, made

    def _entry(self, embedder: Embedder) -> ModelEntry:
        card = embedder.card
        entry: ModelEntry = {
            "id": card.id,
            "aliases": list(card.aliases),
            "default": embedder is self.catalogue.default,
            "allowed_dimensions": list(card.matryoshka),
            "input_type": card.input_type,
            "modes": list(card.modes),
            "served_from": embedder.origin,
        }
        if card.dimensions is not None:
            entry["dimensions"] = card.dimensions
        if card.max_tokens is not None:
            entry["max_tokens"] = card.max_tokens
        if card.licence is not None:
            entry["licence"] = f"{card.licence} (no commercial use)" if card.non_commercial else card.licence
        if card.hosted_until is not None:
            entry["hosted_until"] = card.hosted_until
        return entry


async def _compute(made: responses.Made, work: Callable[[], _Result]) -> _Result:
    """What `work` makes of `made`: on a worker thread where it would hold up the event loop."""
    light = isinstance(made, Embeddings) and made.vectors.size <= _NUMBERS_ON_LOOP
    return work() if light else await anyio.to_thread.run_sync(work)


# --- What a request may ask for --------------------------------------------------------------------------------------


def _check_input_type(card: ModelCard, input_type: InputType | None) -> None:
    if card.input_type == "required" and input_type is None:
        raise InvalidRequest(
            f"`input_type` is required by {card.id}, which embeds questions and documents differently: 'query' for "
            "what is searched with, 'passage' for what is searched",
            param="input_type",
        )


def _representing(embedder: Embedder, mode: Mode, *, field: str) -> MultiEmbedder:
    """The embedder, found to make what `mode` needs; `field` is what to change where it does not."""
    if mode in embedder.card.modes and isinstance(embedder, MultiEmbedder):
        return embedder
    raise InvalidRequest(
        f"`{field}`: {embedder.card.id} does not make what mode '{mode}' needs; its modes are: "
        f"{', '.join(embedder.card.modes)}",
        param=field,
    )


def _check_dimensions(card: ModelCard, dimensions: int) -> None:
    if dimensions == card.dimensions or dimensions in card.matryoshka:
        return
    if card.dimensions is None:
        accepted = "how long its vectors are, and whether they can be cut, is not known here"
    elif card.matryoshka:
        accepted = f"accepted are {', '.join(str(length) for length in card.matryoshka)} and {card.dimensions}"
    else:
        accepted = f"its vectors have {card.dimensions} and cannot be cut (it is not a Matryoshka model)"
    raise InvalidRequest(
        f"`dimensions` {str(dimensions)[:20]} is not possible with {card.id}: {accepted}", param="dimensions"
    )


def _check_scores(rows: int, columns: int | None, top_k: int | None) -> None:
    """Refuse a comparison with more scores in its answer than anybody would read."""
    if top_k is None and (scores := rows * (columns or rows)) > MAX_SCORES:
        raise InvalidRequest(
            f"`top_k` is required here: {scores:,} scores are more than the {MAX_SCORES:,} of one answer", param="top_k"
        )
    pairs = rows * (rows - 1) // 2 if columns is None else rows * columns
    if top_k is not None and min(top_k, pairs) > MAX_SCORES:
        raise InvalidRequest(f"`top_k` must be at most {MAX_SCORES:,} here: there are {pairs:,} pairs", param="top_k")


def _after(earlier: int, on_progress: OnProgress | None) -> OnProgress | None:
    """Told of the texts that are done after so many others."""
    if on_progress is None:
        return None

    async def report(done: int) -> None:
        await on_progress(earlier + done)

    return report


def _place(fields: Mapping[str, str | list[str]], index: int) -> str:
    """The field, and the position in it, of the text at `index` of all the fields' texts."""
    for field, value in fields.items():
        if index < count_texts(value):
            return field if isinstance(value, str) else f"{field}[{index}]"
        index -= count_texts(value)
    raise IndexError(index)


def _as_list(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def _finished(
    made: responses.Made, card: ModelCard, fields: Mapping[str, str | list[str]], dimensions: int | None
) -> responses.Made:
    """The vectors, found to be numbers, at the length asked for."""
    broken = np.flatnonzero(~np.isfinite(made.vectors).all(axis=1))
    if broken.size:
        raise ModelUnavailable(
            f"the model {card.id} made values that are not finite for `{_place(fields, int(broken[0]))}`"
        )
    if dimensions is None or dimensions == made.vectors.shape[1]:
        return made
    return replace(made, vectors=shorten(made.vectors, dimensions))

"""The operations of the service: the table from which tools, routes and published documents are generated."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

from embeddings_mcp.embedders.base import OnProgress
from embeddings_mcp.schema import (
    ColbertEmbeddingRequest,
    ColbertEmbeddingResponse,
    EmbeddingRequest,
    EmbeddingResponse,
    ListModelsRequest,
    ModelsResponse,
    SearchRequest,
    SearchResponse,
    SimilarityRequest,
    SimilarityResponse,
    SparseEmbeddingRequest,
    SparseEmbeddingResponse,
    TypedEmbeddingRequest,
)
from embeddings_mcp.service import EmbeddingService


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of the service.

    Attributes:
        name: the MCP tool's name, and the stem of the OpenAPI operation id.
        title: a short title for people.
        description: for the agent that chooses a tool: what it does, when to use it, and when not to. Hosts truncate
            tool descriptions at 2,048 characters.
        request: the request's wire type.
        response: the response's wire type.
        path: the REST route to POST to; None where REST has a route of another form.
        call: the method of the service.
    """

    name: str
    title: str
    description: str
    request: type[BaseModel]
    response: type
    path: str | None
    call: Callable[[EmbeddingService, Any, OnProgress | None], Awaitable[Mapping[str, Any]]]


async def _list_models(
    service: EmbeddingService, _request: ListModelsRequest, _on_progress: OnProgress | None
) -> ModelsResponse:
    return await service.list_models()


CREATE_EMBEDDING = Operation(
    name="create_embedding",
    title="Create embeddings",
    description=(
        "Turn text into embedding vectors, for a program that stores or indexes them (a vector database, a file).\n"
        "Do NOT use it to find out which texts are similar or which passage answers a question: a vector is hundreds "
        "of numbers, meaningless to read. Use `similarity` or `search`, which return a few scores.\n"
        "Send many texts in one call (an array as `input`); vectors come back in the same order. If vectors must pass "
        "through you, set `encoding_format` to `base64`. Asymmetric models need `input_type`: `query` for questions, "
        "`passage` for documents. Vectors of different models cannot be compared."
    ),
    request=EmbeddingRequest,
    response=EmbeddingResponse,
    path="/v1/embeddings",
    call=EmbeddingService.create_embedding,
)

SIMILARITY = Operation(
    name="similarity",
    title="Compare texts",
    description=(
        "Score how similar texts are in meaning; returns only numbers, no vectors. With `other`, every `input` is "
        "compared with every `other`; without it, the texts of `input` with each other. `top_k` returns only the "
        "closest pairs: use it to find duplicates or best matches among many texts.\n"
        "Do NOT use it to find the passages that answer a question: `search` does that, and embeds question and "
        "passages each in the right way. Scores rank pairs within one model; what counts as close differs by model."
    ),
    request=SimilarityRequest,
    response=SimilarityResponse,
    path="/v1/similarity",
    call=EmbeddingService.similarity,
)

SEARCH = Operation(
    name="search",
    title="Rank passages by a query",
    description=(
        "Rank the given passages by how well they answer a query; returns indexes and scores, best first, no text "
        "and no vectors. The query is embedded as a query and the passages as passages.\n"
        "Do NOT use it on texts that you do not have at hand: it searches only `input`, stores nothing, and reads no "
        "files. To compare texts of the same kind with each other use `similarity`."
    ),
    request=SearchRequest,
    response=SearchResponse,
    path="/v1/search",
    call=EmbeddingService.search,
)

LIST_MODELS = Operation(
    name="list_models",
    title="List embedding models",
    description=(
        "List the models served here: id, vector length, the shorter `dimensions` each allows, longest text in tokens, "
        "whether `input_type` is required, and where it runs.\n"
        "Do NOT call it before every request: `default` names the default model, and an error says what a model needs."
    ),
    request=ListModelsRequest,
    response=ModelsResponse,
    path=None,
    call=_list_models,
)

CREATE_TYPED_EMBEDDING = replace(CREATE_EMBEDDING, request=TypedEmbeddingRequest)

CREATE_SPARSE_EMBEDDING = Operation(
    name="create_sparse_embedding",
    title="Create lexical weights",
    description=(
        "The lexical weights of a text's tokens, on models with mode `sparse` (BGE-M3). The score of two texts is the "
        "sum, over the tokens they share, of the products of their weights."
    ),
    request=SparseEmbeddingRequest,
    response=SparseEmbeddingResponse,
    path="/v1/embeddings/sparse",
    call=EmbeddingService.create_sparse_embedding,
)

CREATE_COLBERT_EMBEDDING = Operation(
    name="create_colbert_embedding",
    title="Create token vectors",
    description=(
        "A vector for every token of a text, on models with mode `colbert` (BGE-M3). The score of a query and a "
        "passage is the mean, over the query's tokens, of each one's best match in the passage."
    ),
    request=ColbertEmbeddingRequest,
    response=ColbertEmbeddingResponse,
    path="/v1/embeddings/colbert",
    call=EmbeddingService.create_colbert_embedding,
)

OPERATIONS = (CREATE_EMBEDDING, SIMILARITY, SEARCH, LIST_MODELS)
"""The operations offered to agents as tools: the published request, and those that return no vectors."""

ROUTES: Mapping[str, Operation] = {
    operation.path: operation
    for operation in (CREATE_TYPED_EMBEDDING, CREATE_SPARSE_EMBEDDING, CREATE_COLBERT_EMBEDDING, SIMILARITY, SEARCH)
    if operation.path is not None
}
"""The REST operations by path: more than agents need."""

"""The OpenAPI document of the REST face, and of its types alone the JSON Schema."""

from __future__ import annotations

import inspect
from typing import Any

from embeddings_mcp import __version__, paths
from embeddings_mcp.errors import HTTP_ERRORS, WIRE_FORMS, EmbeddingsError, http_form
from embeddings_mcp.models import DEFAULT_MODEL
from embeddings_mcp.operations import (
    CREATE_COLBERT_EMBEDDING,
    CREATE_SPARSE_EMBEDDING,
    CREATE_TYPED_EMBEDDING,
    ROUTES,
    SEARCH,
    SIMILARITY,
    Operation,
)
from embeddings_mcp.publish import identity
from embeddings_mcp.publish.schemas import json_schema
from embeddings_mcp.schema import (
    EmbeddingRequest,
    ErrorResponse,
    HealthResponse,
    ModelList,
    ModelObject,
    TypedEmbeddingRequest,
)


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": tokens, "total_tokens": tokens}


_EXAMPLES: dict[Operation, tuple[dict[str, Any], dict[str, Any]]] = {
    CREATE_TYPED_EMBEDDING: (
        {"model": "default", "input": ["The cat sleeps.", "A cat is asleep."]},
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": 0, "embedding": [0.0930, 0.0135, -0.0247]},
                {"object": "embedding", "index": 1, "embedding": [0.1031, -0.0103, -0.0347]},
            ],
            "model": DEFAULT_MODEL,
            "usage": _usage(13),
        },
    ),
    CREATE_SPARSE_EMBEDDING: (
        {"model": "baai/bge-m3", "input": "The cat sleeps."},
        {
            "object": "list",
            "data": [{"object": "sparse_embedding", "index": 0, "token_ids": [7515, 105], "weights": [0.2731, 0.0412]}],
            "model": "baai/bge-m3",
            "usage": _usage(7),
        },
    ),
    CREATE_COLBERT_EMBEDDING: (
        {"model": "baai/bge-m3", "input": "The cat sleeps."},
        {
            "object": "list",
            "data": [
                {
                    "object": "colbert_embedding",
                    "index": 0,
                    "shape": [2, 3],
                    "embedding": [[0.0631, -0.0224, 0.0413], [0.0587, -0.0169, 0.0502]],
                }
            ],
            "model": "baai/bge-m3",
            "usage": _usage(7),
        },
    ),
    SIMILARITY: (
        {"model": "default", "input": "The cat sleeps.", "other": ["A cat is asleep.", "Shares fell."]},
        {"model": DEFAULT_MODEL, "metric": "cosine", "scores": [[0.9319, -0.0131]], "usage": _usage(18)},
    ),
    SEARCH: (
        {"query": "How do I reset my password?", "input": ["Opening hours", "Forgotten your login?"], "top_k": 1},
        {"model": DEFAULT_MODEL, "results": [{"index": 1, "score": 0.5959}], "usage": _usage(20)},
    ),
}
"""A request and an answer to it, of which the first numbers of each vector are shown, and of BGE-M3's its form only."""

_WHEN = ("Retry-After", "Seconds after which it is worth trying again, where the server knows.", "integer")
_HOW = (
    "WWW-Authenticate",
    "`Bearer`, and where access tokens open the server too, what tells who makes them.",
    "string",
)
_HEADERS = {401: _HOW, 403: _HOW, 429: _WHEN, 503: _WHEN}


def openapi_document() -> dict[str, Any]:
    """The document, OpenAPI 3.1."""
    types = [part for operation in _EXAMPLES for part in (operation.request, operation.response)]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "embeddings-mcp",
            "summary": "Text embeddings, OpenAI-compatible, in the manner of the NVIDIA NIM embeddings API",
            "version": __version__,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/", "description": "The server that serves this document"}],
        # A server without a key asks for none.
        "security": [{"BearerAuth": []}, {}],
        "tags": [
            {"name": "Embeddings", "description": "Vectors of texts, and what can be told from them"},
            {"name": "Models", "description": "What is served"},
            {"name": "Health", "description": "For orchestrators; asks for no key"},
        ],
        "paths": {
            **{path: {"post": _post(operation)} for path, operation in ROUTES.items()},
            "/v1/models": {"get": _get("listModels", "List the models served", "Models", ModelList)},
            "/v1/models/{model}": {
                "parameters": [
                    {
                        "name": "model",
                        "in": "path",
                        "required": True,
                        "description": "Model id or alias; the slashes in it may stay as they are.",
                        "schema": {"type": "string"},
                    }
                ],
                "get": _get("getModel", "Describe one model", "Models", ModelObject, 404),
            },
            paths.LIVE: {"get": _health("healthLive", "Tell whether the server is up")},
            paths.READY: {"get": _health("healthReady", "Tell whether the default model can answer", unready=True)},
        },
        "components": {
            "securitySchemes": {"BearerAuth": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                _component(wire_type): json_schema(wire_type)
                for wire_type in (*types, ModelObject, ModelList, HealthResponse, ErrorResponse)
            },
            "responses": {str(status): _error(status) for status in _statuses()},
        },
    }


def json_schema_document() -> dict[str, Any]:
    """The JSON Schema of every wire type: a definition for each, under the name that it has in the OpenAPI document."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"{identity.DOCUMENTS}/docs/schema.json",
        "title": identity.NAME,
        "description": "The requests and responses of the embeddings API, e.g. #/$defs/EmbeddingRequest.",
        "$defs": openapi_document()["components"]["schemas"],
    }


def _post(operation: Operation) -> dict[str, Any]:
    request, response = _EXAMPLES[operation]
    first, *rest = operation.name.split("_")
    return {
        "operationId": first + "".join(word.capitalize() for word in rest),
        "summary": operation.title,
        "description": operation.description,
        "tags": ["Embeddings"],
        "requestBody": {"required": True, "content": _json(operation.request, request)},
        "responses": {
            "200": {"description": "The answer.", "content": _json(operation.response, response)},
            **_errors(*_statuses()),
        },
    }


def _get(operation_id: str, summary: str, tag: str, response: type, *statuses: int) -> dict[str, Any]:
    return {
        "operationId": operation_id,
        "summary": summary,
        "tags": [tag],
        "responses": {
            "200": {"description": "The answer.", "content": _json(response)},
            **_errors(401, 403, *statuses),
        },
    }


def _health(operation_id: str, summary: str, *, unready: bool = False) -> dict[str, Any]:
    answers = {"200": "It is."} | ({"503": "It cannot, and why."} if unready else {})
    return {
        "operationId": operation_id,
        "summary": summary,
        "tags": ["Health"],
        "security": [],
        "responses": {
            status: {"description": description, "content": _json(HealthResponse)}
            for status, description in answers.items()
        },
    }


def _json(wire_type: type, example: dict[str, Any] | None = None) -> dict[str, Any]:
    content: dict[str, Any] = {"schema": {"$ref": f"#/components/schemas/{_component(wire_type)}"}}
    if example is not None:
        content["example"] = example
    return {"application/json": content}


def _statuses() -> list[int]:
    """Every status that an error of a POST can have, HTTP's own included."""
    return sorted({form.status for form in WIRE_FORMS.values()} | set(HTTP_ERRORS))


def _errors(*statuses: int) -> dict[str, Any]:
    return {str(status): {"$ref": f"#/components/responses/{status}"} for status in statuses}


def _error(status: int) -> dict[str, Any]:
    """What a status means: the errors that have it, ours in the words of their classes."""
    meanings = [
        f"`{form.code}`: {(inspect.getdoc(error) or '').splitlines()[0]}"
        for error, form in WIRE_FORMS.items()
        if form.status == status and error is not EmbeddingsError
    ]
    if status in HTTP_ERRORS:
        meanings.append(f"`{http_form(status).code}`: {HTTP_ERRORS[status]}")
    response: dict[str, Any] = {
        "description": "\n\n".join(meanings),
        "content": _json(ErrorResponse),
    }
    if status in _HEADERS:
        name, description, value_type = _HEADERS[status]
        response["headers"] = {name: {"description": description, "schema": {"type": value_type}}}
    return response


def _component(wire_type: type) -> str:
    """The name of a type in the document; the request keeps its published one, though REST takes more fields."""
    return EmbeddingRequest.__name__ if wire_type is TypedEmbeddingRequest else wire_type.__name__

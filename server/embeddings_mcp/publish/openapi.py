"""The OpenAPI document of the REST API, and the JSON Schema of its types."""

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
"""Example requests and responses, with only the first components of vectors; those of BGE-M3 show the format only."""

_RETRY_AFTER = ("Retry-After", "Seconds to wait before retrying, if known.", "integer")
_WWW_AUTHENTICATE = (
    "WWW-Authenticate",
    "`Bearer`; if access tokens are accepted, also the URL of the metadata that names their issuer.",
    "string",
)
_HEADERS = {401: _WWW_AUTHENTICATE, 403: _WWW_AUTHENTICATE, 429: _RETRY_AFTER, 503: _RETRY_AFTER}


def openapi_document() -> dict[str, Any]:
    """Build the OpenAPI 3.1 document."""
    types = [part for operation in _EXAMPLES for part in (operation.request, operation.response)]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "embeddings-mcp",
            "summary": "OpenAI-compatible text embeddings, modelled on the NVIDIA NIM embeddings API",
            "version": __version__,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/", "description": "The server that serves this document"}],
        # The empty alternative is for servers without keys.
        "security": [{"BearerAuth": []}, {}],
        "tags": [
            {"name": "Embeddings", "description": "Vectors of texts, and scores computed from them"},
            {"name": "Models", "description": "The models served"},
            {"name": "Health", "description": "For orchestrators; no key required"},
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
                        "description": "Model id or alias; slashes need not be escaped.",
                        "schema": {"type": "string"},
                    }
                ],
                "get": _get("getModel", "Describe one model", "Models", ModelObject, 404),
            },
            paths.LIVE: {"get": _health("healthLive", "Check whether the server is up", {200: "The server is up."})},
            paths.READY: {
                "get": _health(
                    "healthReady",
                    "Check whether the default model is ready",
                    {200: "The default model is ready.", 503: "It is not; `message` says why."},
                )
            },
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
    """Build a JSON Schema with a definition for each wire type, under its name in the OpenAPI document."""
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
            "200": {"description": "The response.", "content": _json(operation.response, response)},
            **_errors(*_statuses()),
        },
    }


def _get(operation_id: str, summary: str, tag: str, response: type, *statuses: int) -> dict[str, Any]:
    return {
        "operationId": operation_id,
        "summary": summary,
        "tags": [tag],
        "responses": {
            "200": {"description": "The response.", "content": _json(response)},
            **_errors(401, 403, *statuses),
        },
    }


def _health(operation_id: str, summary: str, responses: dict[int, str]) -> dict[str, Any]:
    return {
        "operationId": operation_id,
        "summary": summary,
        "tags": ["Health"],
        "security": [],
        "responses": {
            str(status): {"description": description, "content": _json(HealthResponse)}
            for status, description in responses.items()
        },
    }


def _json(wire_type: type, example: dict[str, Any] | None = None) -> dict[str, Any]:
    content: dict[str, Any] = {"schema": {"$ref": f"#/components/schemas/{_component(wire_type)}"}}
    if example is not None:
        content["example"] = example
    return {"application/json": content}


def _statuses() -> list[int]:
    """Return every status with which a POST request can fail, including general HTTP errors."""
    return sorted({form.status for form in WIRE_FORMS.values()} | set(HTTP_ERRORS))


def _errors(*statuses: int) -> dict[str, Any]:
    return {str(status): {"$ref": f"#/components/responses/{status}"} for status in statuses}


def _error(status: int) -> dict[str, Any]:
    """Describe an error status by the errors that have it, using the first line of each class's docstring."""
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
    """Return a type's name in the document; the embedding request keeps NIM's name, though REST accepts more fields."""
    return EmbeddingRequest.__name__ if wire_type is TypedEmbeddingRequest else wire_type.__name__

"""The OpenAPI document is valid, mirrors the published one of NIM, and describes the server correctly."""

from __future__ import annotations

import json
from contextlib import aclosing
from typing import Any

import jsonschema
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from embeddings_mcp.assemble import build_service
from embeddings_mcp.errors import HTTP_ERRORS, WIRE_FORMS, EmbeddingsError, http_form
from embeddings_mcp.faces.http import rest
from embeddings_mcp.models import DEFAULT_MODEL
from embeddings_mcp.operations import ROUTES
from embeddings_mcp.publish.openapi import openapi_document
from embeddings_mcp.serialization import dump_json, parse
from embeddings_mcp.settings import Settings
from tests.published import PUBLISHED, without
from tests.support import service_of


@pytest.fixture
def document() -> dict[str, Any]:
    return openapi_document()


def test_the_document_is_valid_openapi(document: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(document).validate()


def test_the_embeddings_request_is_the_published_one_plus_the_fields_of_nim_2(document: dict[str, Any]) -> None:
    ours, published = (source["components"]["schemas"]["EmbeddingRequest"] for source in (document, PUBLISHED))
    embedding_type, modality = (ours["properties"].pop(name) for name in ("embedding_type", "modality"))

    assert embedding_type["enum"] == ["float", "int8", "uint8", "binary", "ubinary"]
    assert embedding_type["default"] == "float"
    assert "default" not in modality
    assert without({"description"}, ours) == without({"description"}, published)
    assert list(ours["properties"]) == list(published["properties"])


def test_the_embeddings_operation_is_the_published_one(document: dict[str, Any]) -> None:
    ours, published = (source["paths"]["/v1/embeddings"]["post"] for source in (document, PUBLISHED))

    assert ours["operationId"] == published["operationId"]
    body = ours["requestBody"]
    assert body["required"] is published["requestBody"]["required"]
    assert (
        body["content"]["application/json"]["schema"]
        == published["requestBody"]["content"]["application/json"]["schema"]
    )
    assert set(ours["responses"]) >= set(published["responses"])


def test_every_route_is_described_and_every_description_is_a_route(document: dict[str, Any]) -> None:
    routes = {
        (route.path.replace(":path", ""), method.lower())
        for route in rest.routes(service_of())
        for method in (route.methods or set()) - {"HEAD"}
    }

    described = {
        (path, method) for path, item in document["paths"].items() for method in item if method in {"get", "post"}
    }
    assert described == routes


def test_every_status_that_an_error_can_have_is_described(document: dict[str, Any]) -> None:
    responses = document["paths"]["/v1/embeddings"]["post"]["responses"]

    assert {str(form.status) for form in WIRE_FORMS.values()} <= set(responses)
    assert {"400", "401", "404", "413", "429", "503"} <= set(responses)
    assert {str(status) for status in HTTP_ERRORS} <= set(responses)
    for status, meaning in HTTP_ERRORS.items():
        described = document["components"]["responses"][str(status)]["description"]
        assert f"`{http_form(status).code}`: {meaning}" in described
    for error, form in WIRE_FORMS.items():
        if error is EmbeddingsError:  # looks like HTTP's 500
            continue
        assert (
            f"`{form.code}`: {(error.__doc__ or '').splitlines()[0]}"
            in (document["components"]["responses"][str(form.status)]["description"])
        )


@pytest.mark.anyio
async def test_the_default_model_reproduces_the_examples(document: dict[str, Any]) -> None:
    answered = []
    async with aclosing(build_service(Settings())) as service:
        for operation in ROUTES.values():
            described = document["paths"][operation.path]["post"]
            asked = described["requestBody"]["content"]["application/json"]["example"]
            expected = described["responses"]["200"]["content"]["application/json"]["example"]
            if expected["model"] != DEFAULT_MODEL:
                continue
            answer = json.loads(dump_json(await operation.call(service, parse(operation.request, asked), None)))
            for item in answer.get("data", []):
                item["embedding"] = [round(number, 4) for number in item["embedding"][:3]]
            assert answer == expected
            answered.append(operation.name)
    assert answered == ["create_embedding", "similarity", "search"]


@pytest.mark.parametrize("operation", ROUTES.values(), ids=lambda o: o.name)
def test_the_examples_match_their_schemas(document: dict[str, Any], operation: Any) -> None:
    described = document["paths"][operation.path]["post"]

    parse(operation.request, described["requestBody"]["content"]["application/json"]["example"])
    jsonschema.validate(
        described["responses"]["200"]["content"]["application/json"]["example"],
        document["components"]["schemas"][operation.response.__name__],
    )

"""The capability documents are valid by the official schemas and make an engine send the right requests."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from embeddings_mcp.operations import LIST_MODELS, OPERATIONS
from embeddings_mcp.publish.capability import VERSIONS, capability
from embeddings_mcp.publish.documents import FORMATS
from embeddings_mcp.serialization import parse
from tests.publish.schemas import schema_of

DIALECTS = sorted(VERSIONS)

POST_OPERATIONS = [operation for operation in OPERATIONS if operation is not LIST_MODELS]


def named(items: Any, dialect: str) -> dict[str, Any]:
    """Map objects by name, in either dialect."""
    return items if dialect == "ikanos" else {item["name"]: item for item in items}


document_of = cache(capability)


def operations(dialect: Any) -> dict[str, Any]:
    """The consumed operations by name, each with the path of its resource."""
    (api,) = document_of(dialect)["capability"]["consumes"]
    return {
        name: {**operation, "path": resource["path"]}
        for resource in named(api["resources"], dialect).values()
        for name, operation in named(resource["operations"], dialect).items()
    }


def exposed(dialect: Any, kind: str) -> dict[str, Any]:
    adapters = {adapter["type"]: adapter for adapter in document_of(dialect)["capability"]["exposes"]}
    assert sorted(adapters) == ["mcp", "rest", "skill"]
    adapter: dict[str, Any] = adapters[kind]
    return adapter


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_document_is_valid_by_the_official_schema(dialect: Any) -> None:
    schema = schema_of(f"{dialect}-{VERSIONS[dialect]}")
    document = yaml.safe_load(FORMATS[dialect].text("http://localhost:8000"))
    jsonschema.Draft202012Validator(schema).validate(document)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate({**document, "something": "else"})


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_tool_has_its_description_and_hints(dialect: Any) -> None:
    tools = named(exposed(dialect, "mcp")["tools"], dialect)

    assert list(tools) == [operation.name.replace("_", "-") for operation in OPERATIONS]
    for operation, tool in zip(OPERATIONS, tools.values(), strict=True):
        assert tool["description"] == operation.description
        assert tool["hints"] == {"readOnly": True, "destructive": False, "idempotent": True, "openWorld": False}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_reference_resolves(dialect: Any) -> None:
    (api,) = capability(dialect)["capability"]["consumes"]
    tools = exposed(dialect, "mcp")
    calls = {f"{api['namespace']}.{name}" for name in operations(dialect)}
    assert {tool["call"] for tool in named(tools["tools"], dialect).values()} == calls

    (skill,) = named(exposed(dialect, "skill")["skills"], dialect).values()
    sources = [tool["from"] for tool in named(skill["tools"], dialect).values()]
    assert {source["sourceNamespace"] for source in sources} == {tools["namespace"]}
    assert {source["action"] for source in sources} == set(named(tools["tools"], dialect))

    (resource,) = named(exposed(dialect, "rest")["resources"], dialect).values()
    assert resource["forward"] == {"targetNamespace": api["namespace"]}
    assert api["baseUri"] + resource["path"].removeprefix("/v1").replace("{{path}}", "embeddings") == (
        "http://localhost:8000/v1/embeddings"
    )


def test_namespaces_and_ports_are_unique() -> None:
    document = capability("ikanos")
    adapters = [*document["capability"]["consumes"], *document["capability"]["exposes"]]
    namespaces = [item["namespace"] for item in [*document["binds"], *adapters]]
    assert len(set(namespaces)) == len(namespaces)
    ports = [adapter["port"] for adapter in document["capability"]["exposes"]]
    assert len({*ports, 8000}) == len(ports) + 1


def test_the_key_is_referenced_by_name_only() -> None:
    document = capability("ikanos")
    (bind,) = document["binds"]
    (variable,) = bind["keys"]
    assert document["capability"]["consumes"][0]["authentication"] == {"type": "bearer", "token": f"{{{{{variable}}}}}"}


def test_a_given_url_becomes_the_base_uri() -> None:
    document = yaml.safe_load(FORMATS["ikanos"].text("https://embed.example.org"))
    assert document["capability"]["consumes"][0]["baseUri"] == "https://embed.example.org/v1"


# --- What the engine sends -------------------------------------------------------------------------------------------


def render_as_engine(template: str, arguments: dict[str, Any]) -> str:
    """Render a body as Ikanos does: JMustache without escaping; arrays become JSON, other values plain text."""

    def section(match: re.Match[str]) -> str:
        return match[2] if match[1] in arguments else ""

    def value(match: re.Match[str]) -> str:
        argument = arguments.get(match[1], "")
        return json.dumps(argument) if isinstance(argument, list) else str(argument)

    template = re.sub(r"\{\{#(\w+)\}\}(.*?)\{\{/\1\}\}", section, template, flags=re.DOTALL)
    return re.sub(r"\{\{(\w+)\}\}", value, template)


# No text with both `{{` and `}}`, which the engine would interpret as a template.
TEXTS = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="{"), min_size=1), min_size=1, max_size=4)
ARGUMENTS: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["default", "nvidia/nv-embed-v1"]),
    "input": TEXTS,
    "query": TEXTS,
    "other": TEXTS,
    "input_type": st.sampled_from(["query", "passage"]),
    "encoding_format": st.sampled_from(["float", "base64"]),
    "truncate": st.sampled_from(["NONE", "START", "END"]),
    "metric": st.sampled_from(["cosine", "dot", "euclidean"]),
    "mode": st.sampled_from(["dense", "hybrid"]),
    "dimensions": st.integers(1, 4096),
    "top_k": st.integers(1, 100),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("operation", POST_OPERATIONS, ids=lambda operation: operation.name)
@given(data=st.data())
def test_the_engine_sends_the_arguments_of_the_tool_call(dialect: Any, operation: Any, data: st.DataObject) -> None:
    name = operation.name.replace("_", "-")
    consumed = operations(dialect)[name]
    parameters = named(named(exposed(dialect, "mcp")["tools"], dialect)[name]["inputParameters"], dialect)
    assert set(parameters) == set(operation.request.model_fields) - {"user"}
    required = {name: ARGUMENTS[name] for name, parameter in parameters.items() if parameter["required"]}
    optional = {name: ARGUMENTS[name] for name, parameter in parameters.items() if not parameter["required"]}
    arguments = data.draw(st.fixed_dictionaries(required, optional=optional))

    body = json.loads(render_as_engine(consumed["body"], arguments))

    assert body == arguments
    parse(operation.request, body)
    assert f"/v1{consumed['path']}" == operation.path


@pytest.mark.parametrize("operation", POST_OPERATIONS, ids=lambda operation: operation.name)
def test_descriptions_state_choices_and_defaults(operation: Any) -> None:
    parameters = exposed("ikanos", "mcp")["tools"][operation.name.replace("_", "-")]["inputParameters"]

    for name, field in operation.request.model_json_schema()["properties"].items():
        if (default := field.get("default")) is not None:
            assert f"Default: {default}." in parameters[name]["description"]
    if "truncate" in parameters:
        assert "One of NONE, START, END." in parameters["truncate"]["description"]

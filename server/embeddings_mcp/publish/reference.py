"""Reference pages in Markdown, generated from the code that they describe."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from embeddings_mcp.caller import CALLER_KEY_HEADER
from embeddings_mcp.errors import HTTP_ERRORS, WIRE_FORMS, http_form
from embeddings_mcp.faces.cli.commands import serve
from embeddings_mcp.faces.http.instrumentation import REQUEST_ID
from embeddings_mcp.models import CARDS, DEFAULT_MODEL, CardOverride, ModelCard
from embeddings_mcp.operations import CREATE_EMBEDDING
from embeddings_mcp.publish.install import environment_variable, is_secret
from embeddings_mcp.publish.openapi import openapi_document
from embeddings_mcp.settings import EndpointSettings, Settings
from embeddings_mcp.vectors import quantize

_NOTICE = "<!-- Generated from the code by `make published`; edit the code, not this page. -->\n"


_API = """\
# REST API

Machine-readable versions: [OpenAPI 3.1](openapi.json), [JSON Schema](schema.json).

Requests and responses are JSON. Unknown fields and `null` are rejected: omit what is not needed. A server with API
keys, or with an issuer of access tokens, requires one in the header `Authorization: Bearer ...` on every route except
those in `EMBEDDINGS_MCP_WITHOUT_KEY`, by default the health probes.

In addition to these routes a server has `/mcp` for MCP clients and `/v1/metrics` for [Prometheus](operations.md). It
describes itself at `/openapi.json`, `/manifest` (the [capability](capabilities.md), or any other description with
`?format=`), `/apis.json` and `/mcp/server-card`; its Agent Skill is at `/skills`, `/skills/embeddings`,
`/skills/embeddings/download`, `/skills/embeddings/contents`, `/skills/embeddings/contents/SKILL.md` and
`/.well-known/agent-skills/index.json`.
"""

_HEADERS = [
    ("`Authorization`", "requests", "`Bearer` and a key or an access token, if the server requires one."),
    (
        f"`{CALLER_KEY_HEADER}`",
        "requests",
        "The caller's own key for an endpoint, if the server allows it (`caller_keys`).",
    ),
    (
        f"`{REQUEST_ID}`",
        "both",
        "Request id, chosen by the caller or else by the server; it also appears in the server's log.",
    ),
    (
        "`Server-Timing`",
        "responses to POST",
        "Milliseconds spent in each stage: tokenizing, waiting, encoding, writing the response.",
    ),
    ("`Retry-After`", "429, 503", "Seconds to wait before retrying."),
]

_ENVELOPE = """\
Every error has this form. `message` says what was wrong, what is accepted, and what to do; `code` is for programs;
`param` names the field, or is null. (A readiness probe that fails with 503 has the same form as a successful one.)

```json
{
  "error": {
    "message": "`input[1]` must not be an empty string",
    "type": "invalid_request_error",
    "param": "input[1]",
    "code": "invalid_request"
  }
}
```
"""

_ERRORS = """\
# Errors of the REST API

Over MCP the same messages are results with `isError`. Retry 408, 429, 504, and 503 except `missing_dependency` and
`checkpoint_invalid`, after the time in `Retry-After`, if any.
"""

_CONFIGURATION = """\
# Configuration

Every setting is an environment variable. The most common ones are also flags of `embeddings-mcp serve`, which take
precedence. `--model` and `--endpoint` can be repeated; `--transport` and `--manifest` are flags only. An empty variable
counts as not set. Invalid settings are rejected at startup, with one line that says what is accepted; a device that
this machine does not have is rejected when the model is loaded.
"""

_ENDPOINTS = """\
## Endpoints

`EMBEDDINGS_MCP_ENDPOINTS` is a list of URLs separated by spaces, or a JSON array of objects with these fields:
"""

_CARDS = """\
## Cards

`EMBEDDINGS_MCP_CARDS` is a JSON array of objects with these fields. Omitted fields are taken from the built-in card of
that name, the checkpoint's files or the endpoint.
"""

_MODELS = """\
# Models known by name

A server serves the models it is configured with; `list_models` lists them. Any other sentence-transformers checkpoint
can be served too; its own files describe it.
"""

_MODELS_NOTES = f"""\
- `input_type` required: a call without it is rejected. Ignored: both types get the same vector.
- Dimensions: the first is the full length; the others can be requested with `dimensions`.
- `default` is `{DEFAULT_MODEL}` unless the server is configured otherwise.
- Other names of the same models are accepted, in any case; the suffixes `-query` and `-passage` set the `input_type`.
"""


# --- The API ---------------------------------------------------------------------------------------------------------


def api() -> str:
    """Render ``docs/api.md``: every route with its fields and an example, the headers and the errors."""
    document = openapi_document()
    schemas = document["components"]["schemas"]
    parts = [_API]
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            if method == "parameters":
                continue
            parts += _route(f"{method.upper()} {path}", route, schemas)
            if path == CREATE_EMBEDDING.path:
                parts += _types()
    headers = _table(("Header", "Of", "Meaning"), _HEADERS)
    return _page(*parts, "## Headers\n", headers, "## Errors\n", _ENVELOPE, _errors())


def _route(title: str, route: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterable[str]:
    yield f"## {title}\n"
    yield f"{route.get('description', route['summary'] + '.')}\n"
    if "requestBody" in route:
        body = route["requestBody"]["content"]["application/json"]
        yield _fields(schemas[_name(body)])
        yield _example("Request", body["example"])
    response = route["responses"]["200"]["content"]["application/json"]
    if "example" in response:
        shortened = " (long vectors are shortened)" if "data" in response["example"] else ""
        yield _example(f"Response{shortened}", response["example"])
    else:
        yield f"Returns `{_name(response)}`:\n"
        yield _fields(schemas[_name(response)])


def _types() -> Iterable[str]:
    """Describe the embedding types with the docstring of the function that converts vectors."""
    description, _, _ = (inspect.getdoc(quantize) or "").partition("\n\nReturns:")
    yield "### What `embedding_type` makes of a vector\n"
    yield f"{description.replace('``', '`')}\n"


def _name(content: Mapping[str, Any]) -> str:
    reference: str = content["schema"]["$ref"]
    return reference.rpartition("/")[2]


def _fields(schema: Mapping[str, Any]) -> str:
    required = schema.get("required", [])
    rows = [
        (f"`{name}`", _type(field), _default_of(field, required=name in required), field.get("description", ""))
        for name, field in schema["properties"].items()
    ]
    return _table(("Field", "Type", "Default", "Meaning"), rows)


def _type(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "oneOf" in schema:
        return " or ".join(_type(one) for one in schema["oneOf"])
    kind = schema["type"]
    if kind == "array":
        return f"array of {_type(schema['items'])}"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _default_of(schema: Mapping[str, Any], *, required: bool) -> str:
    if required:
        return "required"
    return f"`{schema['default']}`" if "default" in schema else ""


def _example(title: str, value: object) -> str:
    return f"{title}:\n\n```json\n{json.dumps(value, indent=2)}\n```\n"


def _errors() -> str:
    own = [(form, (inspect.getdoc(error) or "").partition("\n")[0]) for error, form in WIRE_FORMS.items()]
    http = [(http_form(status), meaning) for status, meaning in HTTP_ERRORS.items()]
    # The base class EmbeddingsError has the same form as HTTP's 500, whose description is better.
    meanings = {(form.status, form.code, form.type): meaning for form, meaning in (*own, *http)}
    rows = [
        (str(status), f"`{code}`", f"`{kind}`", meanings[status, code, kind]) for status, code, kind in sorted(meanings)
    ]
    return _table(("Status", "Code", "Type", "Meaning"), rows)


def errors() -> str:
    """Render the skill's page of errors."""
    return _page(_ERRORS, _ENVELOPE, _errors())


# --- Settings --------------------------------------------------------------------------------------------------------


def configuration() -> str:
    """Render ``docs/configuration.md``: every setting with its environment variable and flag."""
    flags = inspect.signature(serve).parameters
    settings = [
        (
            f"`{environment_variable(name)}`",
            next((f"`--{flag.replace('_', '-')}`" for flag in (name, name.removesuffix("s")) if flag in flags), ""),
            _default(field),
            f"{field.description}{' A secret: it is never printed.' if is_secret(field) else ''}",
        )
        for name, field in Settings.model_fields.items()
    ]
    endpoint = [
        (f"`{name}`", "required" if field.is_required() else "", str(field.description))
        for name, field in EndpointSettings.model_fields.items()
    ]
    return _page(
        _CONFIGURATION,
        _table(("Variable", "Flag", "Default", "Meaning"), settings),
        _ENDPOINTS,
        _table(("Field", "", "Meaning"), endpoint),
        _CARDS,
        _table(("Field", "Type", "", "Meaning"), _card_fields()),
    )


def _card_fields() -> Iterable[Sequence[str]]:
    """Return one row per field of a card, described by the docstring of `ModelCard`."""
    _, _, attributes = (inspect.getdoc(ModelCard) or "").partition("Attributes:\n")
    meanings = dict(re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", attributes, flags=re.MULTILINE))
    schema = TypeAdapter(CardOverride).json_schema()
    for name, field in schema["properties"].items():
        meaning = " ".join(meanings[name].split()).replace("``", "`")
        required = "required" if name in schema["required"] else ""
        # The other alternative of an `anyOf` is null.
        yield f"`{name}`", _type(field.get("anyOf", [field])[0]), required, f"{meaning[0].upper()}{meaning[1:]}"


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default is None or default == ():
        return ""
    return f"`{' '.join(default) if isinstance(default, tuple) else default}`"


# --- Models ----------------------------------------------------------------------------------------------------------


def models() -> str:
    """Render the skill's page of models."""
    rows = [
        (
            f"`{card.id}`",
            " or ".join(str(length) for length in (card.dimensions, *card.matryoshka) if length is not None),
            str(card.max_tokens or ""),
            card.input_type,
            ", ".join(card.modes),
            f"{card.license or 'see its page'}{' (not for commercial use)' if card.non_commercial else ''}",
            _hosting(card),
        )
        for card in CARDS
    ]
    known = _table(("Model", "Dimensions", "Tokens", "input_type", "Modes", "License", "Where"), rows)
    names = _table(("Model", "Also called"), ((f"`{card.id}`", _names(card)) for card in CARDS if card.aliases))
    return _page(_MODELS, known, _MODELS_NOTES, names)


def _hosting(card: ModelCard) -> str:
    here = "local, from its files" if card.repository is None else "local"
    gone = f"; hosted by NVIDIA until {card.hosted_until}" if card.hosted_until else ""
    return here + gone


def _names(card: ModelCard) -> str:
    return ", ".join(f"`{alias}`" for alias in card.aliases)


def _page(*parts: str) -> str:
    return "\n".join((_NOTICE, *parts))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

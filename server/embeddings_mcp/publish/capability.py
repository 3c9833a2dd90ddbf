"""The capability: a document from which an Ikanos or Naftiko engine deploys this API as REST, MCP and Agent Skill.

Naftiko's engine has been called Ikanos since 1.0.0-beta. Ikanos documents use maps where Naftiko's use lists of objects
with a ``name``, and ``display`` instead of ``label``. Both are generated from the table of operations.

The document is shaped by how the engine works (according to its source, 1.0.0-beta5):

- Tool names consist of letters, digits and hyphens: ``create_embedding`` becomes ``create-embedding``.
- A template inserts an array into a JSON body as JSON, but a string without escaping, so a quotation mark would end it.
  Therefore texts are passed as arrays only, and strings only if they never need escaping.
- A parameter that was not given is an empty string, so every optional field is in a template section of its own.
- Parameters have neither enum nor default: their descriptions state both.
- Bound variables are available in ``authentication`` only: the key is bound, the URL is written out.
- A forwarding REST resource passes the body on unchanged, so it offers exactly the API that it forwards to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from embeddings_mcp import __version__
from embeddings_mcp.operations import LIST_MODELS, OPERATIONS, Operation
from embeddings_mcp.publish import identity
from embeddings_mcp.publish.schemas import json_schema
from embeddings_mcp.publish.skill import read_skill

Dialect = Literal["ikanos", "naftiko"]

VERSIONS: Mapping[Dialect, str] = {"ikanos": "1.0.0-beta5", "naftiko": "1.0.0-alpha3"}

KEY = "EMBEDDINGS_API_KEY"
"""Environment variable of the API key. The engine requires a key; a server without keys accepts any."""

_API = "embeddings"
_REST, _TOOLS, _SKILLS = "embeddings-rest", "embeddings-tools", "embeddings-skills"
_PORTS = {_REST: 8081, _TOOLS: 8082, _SKILLS: 8083}

_OMITTED_FIELDS = frozenset({"user"})
"""Free text that would need escaping and does not affect the response."""


@dataclass(frozen=True, slots=True)
class _Field:
    """A request field in the engine's terms.

    Attributes:
        name: name of the field in the request.
        type: the engine's type.
        description: meaning, accepted values and default.
        required: whether the field is required.
    """

    name: str
    type: str
    description: str
    required: bool

    @property
    def template(self) -> str:
        """The field in the template of the body; strings are quoted, other values are JSON already."""
        value = f'"{{{{{self.name}}}}}"' if self.type == "string" else f"{{{{{self.name}}}}}"
        return f'"{self.name}": {value}'


def capability(dialect: Dialect, url: str = identity.LOCAL_URL) -> dict[str, Any]:
    """Build the document for a server at `url`."""
    return {
        dialect: VERSIONS[dialect],
        "info": {
            _label(dialect): identity.TITLE,
            "description": (
                "Text embeddings with an OpenAI-compatible API modelled on NVIDIA NIM, and what agents need without "
                "seeing vectors: how similar texts are, and which passages answer a question."
            ),
            "tags": ["Embeddings", "Semantic Search", "RAG", "NVIDIA NIM", "MCP"],
            "created": identity.SINCE,
            "modified": identity.SINCE,
            **({"version": __version__} if dialect == "ikanos" else {}),
        },
        "binds": [
            {
                "namespace": "embeddings-env",
                "description": f"The API key, from the environment variable {KEY}.",
                "keys": {KEY: KEY},
            }
        ],
        "capability": {
            "consumes": [_api(dialect, url)],
            "exposes": [_rest(dialect), _tools(dialect), _skills(dialect)],
        },
    }


def _api(dialect: Dialect, url: str) -> dict[str, Any]:
    """Describe the API that the engine calls."""
    return {
        "namespace": _API,
        "type": "http",
        "description": (
            "An embeddings-mcp server. A NIM endpoint, hosted (https://integrate.api.nvidia.com/v1) or self-hosted, "
            "can replace it for create-embedding and list-models."
        ),
        "baseUri": f"{url}/v1",
        "authentication": {"type": "bearer", "token": f"{{{{{KEY}}}}}"},
        "resources": _named(dialect, ((_kebab(o), _consumed(o, dialect)) for o in OPERATIONS)),
    }


def _rest(dialect: Dialect) -> dict[str, Any]:
    """Expose the API as a forwarding REST resource."""
    paths = ", ".join(f"POST {operation.path}" for operation in OPERATIONS if operation.path)
    resource = {
        "path": "/v1/{{path}}",
        _label(dialect): identity.TITLE,
        "description": f"The server's own API, forwarded unchanged: {paths}, GET /v1/models.",
        "forward": {"targetNamespace": _API},
    }
    return {
        "type": "rest",
        "address": "localhost",
        "port": _PORTS[_REST],
        "namespace": _REST,
        "resources": _named(dialect, [(_API, resource)]),
    }


def _tools(dialect: Dialect) -> dict[str, Any]:
    """Expose the operations as tools."""
    return {
        "type": "mcp",
        "transport": "http",
        "address": "localhost",
        "port": _PORTS[_TOOLS],
        "namespace": _TOOLS,
        "description": f"{identity.DESCRIPTION}.",
        "tools": _named(dialect, ((_kebab(o), _tool(o, dialect)) for o in OPERATIONS)),
    }


def _skills(dialect: Dialect) -> dict[str, Any]:
    """Expose the skill with the tools above. The location of its folder on the engine's machine is unknown here."""
    skill = read_skill()
    tools = (
        (
            _kebab(operation),
            {
                "description": _summary(operation),
                "from": {"sourceNamespace": _TOOLS, "action": _kebab(operation)},
            },
        )
        for operation in OPERATIONS
    )
    metadata = {key: value for key, value in skill.frontmatter.items() if key != "name"}
    return {
        "type": "skill",
        "address": "localhost",
        "port": _PORTS[_SKILLS],
        "namespace": _SKILLS,
        "description": "How agents use embeddings well.",
        "skills": _named(dialect, [(skill.name, {**metadata, "tools": _named(dialect, tools)})]),
    }


def _label(dialect: Dialect) -> str:
    """Return the key of the human-readable name."""
    return "display" if dialect == "ikanos" else "label"


def _named(dialect: Dialect, items: Iterable[tuple[str, dict[str, Any]]]) -> Any:  # noqa: ANN401 - a map or a list
    """Combine named objects: a map for Ikanos, a list of objects with a ``name`` for Naftiko."""
    if dialect == "ikanos":
        return dict(items)
    return [{"name": name, **item} for name, item in items]


def _kebab(operation: Operation) -> str:
    return operation.name.replace("_", "-")


def _summary(operation: Operation) -> str:
    """Return the first sentence of the operation's description."""
    return operation.description.partition("\n")[0].partition(". ")[0].rstrip(".") + "."


def _consumed(operation: Operation, dialect: Dialect) -> dict[str, Any]:
    """Describe the HTTP request that the engine sends for an operation."""
    if operation is LIST_MODELS:
        consumed = {"method": "GET", "description": _summary(operation)}
    else:
        fields = _fields(operation)
        consumed = {
            "method": "POST",
            "description": _summary(operation),
            "inputParameters": _named(dialect, ((field.name, {"in": "body"}) for field in fields)),
            "body": _body(fields),
        }
    path = "/models" if operation.path is None else operation.path.removeprefix("/v1")
    return {"path": path, "operations": _named(dialect, [(_kebab(operation), consumed)])}


def _tool(operation: Operation, dialect: Dialect) -> dict[str, Any]:
    """Describe an operation as a tool."""
    fields = _fields(operation)
    parameters = _named(
        dialect,
        (
            (field.name, {"type": field.type, "description": field.description, "required": field.required})
            for field in fields
        ),
    )
    return {
        _label(dialect): operation.title,
        "description": operation.description,
        **({"inputParameters": parameters} if fields else {}),
        "call": f"{_API}.{_kebab(operation)}",
        "hints": {"readOnly": True, "destructive": False, "idempotent": True, "openWorld": False},
    }


def _fields(operation: Operation) -> list[_Field]:
    """Return the request's fields, required ones first."""
    schema = json_schema(operation.request)
    required = schema.get("required", [])
    fields = [
        _Field(name, _type(name, field_schema), _description(field_schema), name in required)
        for name, field_schema in schema.get("properties", {}).items()
        if name not in _OMITTED_FIELDS
    ]
    return sorted(fields, key=lambda field: not field.required)


def _type(name: str, schema: Mapping[str, Any]) -> str:
    """Return the engine's type for a field."""
    if "oneOf" in schema:  # one text or an array of texts
        return "array"
    kind: str = schema["type"]
    assert kind != "string" or "enum" in schema or name == "model", (
        f"{name} is free text, which the engine cannot escape"
    )
    return kind


def _description(schema: Mapping[str, Any]) -> str:
    sentences = [schema["description"]]
    if "oneOf" in schema:
        sentences.append("Always an array here, even for one text.")
    if "enum" in schema:
        sentences.append(f"One of {', '.join(schema['enum'])}.")
    if "default" in schema:
        sentences.append(f"Default: {schema['default']}.")
    return " ".join(sentences)


def _body(fields: Iterable[_Field]) -> str:
    """Return the template of the request body."""
    required = ",\n".join(f"  {field.template}" for field in fields if field.required)
    optional = "".join(
        f"{{{{#{field.name}}}}},\n  {field.template}{{{{/{field.name}}}}}" for field in fields if not field.required
    )
    return f"{{\n{required}{optional}\n}}\n"

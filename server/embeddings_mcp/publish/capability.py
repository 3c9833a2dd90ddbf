"""The capability: this API as a document that an Ikanos or Naftiko engine deploys as REST, MCP and Agent Skill.

Ikanos is what Naftiko's engine is called since 1.0.0-beta; its documents are maps where Naftiko's are lists of things
with a ``name``, and say ``display`` for ``label``. Both are made here from the table of operations.

How the engine works (read in its source, 1.0.0-beta5) decides how the document is written:

- Names of tools are letters, digits and hyphens: ``create_embedding`` is ``create-embedding`` there.
- A template puts an array into a JSON body as JSON, but a string as it stands: a quotation mark in it would end it. So
  texts travel as arrays only, and of the strings only those are passed on that never need escaping.
- A parameter that was not given is an empty string, so what is optional stands in a section of its own.
- Parameters have no enum and no default: their descriptions say both.
- A variable that a bind brings is known in ``authentication`` alone: the key is bound, the address is written out.
- A REST resource that forwards hands on the body untouched, and so is exactly the API that it forwards to.
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
"""The environment variable that holds the key. The engine wants one; a server without a key takes any."""

_API = "embeddings"
_REST, _TOOLS, _SKILLS = "embeddings-rest", "embeddings-tools", "embeddings-skills"
_PORTS = {_REST: 8081, _TOOLS: 8082, _SKILLS: 8083}

_LEFT_OUT = frozenset({"user"})
"""Free text that would have to be escaped and does not change an answer."""


@dataclass(frozen=True, slots=True)
class _Field:
    """A field of a request as the engine takes it.

    Attributes:
        name: its name in the request.
        type: the engine's type.
        description: what it is, what it accepts, and what holds where it is left out.
        required: whether a request must have it.
    """

    name: str
    type: str
    description: str
    required: bool

    @property
    def template(self) -> str:
        """The field in the template of the body; a string stands between quotation marks, all else is JSON already."""
        value = f'"{{{{{self.name}}}}}"' if self.type == "string" else f"{{{{{self.name}}}}}"
        return f'"{self.name}": {value}'


def capability(dialect: Dialect, url: str = identity.LOCAL_URL) -> dict[str, Any]:
    """The document, for a server of ours at `url`."""
    return {
        dialect: VERSIONS[dialect],
        "info": {
            _label(dialect): identity.TITLE,
            "description": (
                "Text embeddings by an OpenAI-compatible API in the manner of NVIDIA NIM, and what agents need of them "
                "without seeing a vector: how alike texts are, and which passages answer a question."
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
    """The API that the engine calls."""
    return {
        "namespace": _API,
        "type": "http",
        "description": (
            "An embeddings-mcp server. A NIM endpoint, hosted (https://integrate.api.nvidia.com/v1) or self-hosted, "
            "can stand in its place for create-embedding and list-models."
        ),
        "baseUri": f"{url}/v1",
        "authentication": {"type": "bearer", "token": f"{{{{{KEY}}}}}"},
        "resources": _named(dialect, ((_kebab(o), _consumed(o, dialect)) for o in OPERATIONS)),
    }


def _rest(dialect: Dialect) -> dict[str, Any]:
    """The same API, handed on."""
    paths = ", ".join(f"POST {operation.path}" for operation in OPERATIONS if operation.path)
    resource = {
        "path": "/v1/{{path}}",
        _label(dialect): identity.TITLE,
        "description": f"The server's own API, relayed untouched: {paths}, GET /v1/models.",
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
    """The operations as tools."""
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
    """The skill, whose tools are those above. Where its folder lies on the engine's machine, nobody knows here."""
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
    about = {key: value for key, value in skill.frontmatter.items() if key != "name"}
    return {
        "type": "skill",
        "address": "localhost",
        "port": _PORTS[_SKILLS],
        "namespace": _SKILLS,
        "description": "How agents use embeddings well.",
        "skills": _named(dialect, [(skill.name, {**about, "tools": _named(dialect, tools)})]),
    }


def _label(dialect: Dialect) -> str:
    """The key under which a thing says what people call it."""
    return "display" if dialect == "ikanos" else "label"


def _named(dialect: Dialect, items: Iterable[tuple[str, dict[str, Any]]]) -> Any:  # noqa: ANN401 - a map or a list
    """Things by their names: a map for Ikanos, a list of things with a ``name`` for Naftiko."""
    if dialect == "ikanos":
        return dict(items)
    return [{"name": name, **thing} for name, thing in items]


def _kebab(operation: Operation) -> str:
    return operation.name.replace("_", "-")


def _summary(operation: Operation) -> str:
    """The first sentence of the operation's description."""
    return operation.description.partition("\n")[0].partition(". ")[0].rstrip(".") + "."


def _consumed(operation: Operation, dialect: Dialect) -> dict[str, Any]:
    """The operation as the server offers it to the engine."""
    if operation is LIST_MODELS:
        described = {"method": "GET", "description": _summary(operation)}
    else:
        fields = _fields(operation)
        described = {
            "method": "POST",
            "description": _summary(operation),
            "inputParameters": _named(dialect, ((field.name, {"in": "body"}) for field in fields)),
            "body": _body(fields),
        }
    path = "/models" if operation.path is None else operation.path.removeprefix("/v1")
    return {"path": path, "operations": _named(dialect, [(_kebab(operation), described)])}


def _tool(operation: Operation, dialect: Dialect) -> dict[str, Any]:
    """The operation as a tool."""
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
    """The request's fields, those that are required first."""
    published = json_schema(operation.request)
    required = published.get("required", [])
    fields = [
        _Field(name, _type(name, said), _description(said), name in required)
        for name, said in published.get("properties", {}).items()
        if name not in _LEFT_OUT
    ]
    return sorted(fields, key=lambda field: not field.required)


def _type(name: str, said: Mapping[str, Any]) -> str:
    """The engine's type for what the schema says."""
    if "oneOf" in said:  # one text or several
        return "array"
    kind: str = said["type"]
    assert kind != "string" or "enum" in said or name == "model", f"{name} is free text, which the engine cannot escape"
    return kind


def _description(said: Mapping[str, Any]) -> str:
    sentences = [said["description"]]
    if "oneOf" in said:
        sentences.append("Always an array here, also of one text.")
    if "enum" in said:
        sentences.append(f"One of {', '.join(said['enum'])}.")
    if "default" in said:
        sentences.append(f"Default: {said['default']}.")
    return " ".join(sentences)


def _body(fields: Iterable[_Field]) -> str:
    """The template of the request's body."""
    required = ",\n".join(f"  {field.template}" for field in fields if field.required)
    optional = "".join(
        f"{{{{#{field.name}}}}},\n  {field.template}{{{{/{field.name}}}}}" for field in fields if not field.required
    )
    return f"{{\n{required}{optional}\n}}\n"

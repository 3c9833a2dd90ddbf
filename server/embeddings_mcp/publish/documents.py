"""The documents that describe the server, in one table: what each is, where the repository keeps it, how it is made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from embeddings_mcp.publish import identity
from embeddings_mcp.publish.apis_json import apis_index
from embeddings_mcp.publish.capability import Dialect, capability
from embeddings_mcp.publish.openapi import json_schema_document, openapi_document
from embeddings_mcp.publish.server_card import MEDIA_TYPE as SERVER_CARD_TYPE
from embeddings_mcp.publish.server_card import server_card

_JSON = "application/json"
_YAML = "application/yaml"


@dataclass(frozen=True, slots=True)
class Document:
    """One published document.

    Attributes:
        media_type: what its text is.
        path: the file of the repository that holds it for a server at `identity.LOCAL_URL`; None where there is none.
        text: makes it, for a server at the address given.
    """

    media_type: str
    path: str | None
    text: Callable[[str], str]


def to_json(content: object) -> str:
    """Readable JSON."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def to_yaml(content: object) -> str:
    """Readable YAML: keys in their order, texts of several lines as they are."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """Writes a text of several lines as a block."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _capability(dialect: Dialect) -> Callable[[str], str]:
    def text(url: str) -> str:
        made = f"# Made by `{identity.NAME} manifest --format {dialect}`; `--url` writes it for another address.\n"
        return made + to_yaml(capability(dialect, url))

    return text


def _fixed(make: Callable[[], Any]) -> Callable[[str], str]:
    """A document that is the same wherever the server is."""
    return lambda _url: to_json(make())


FORMATS: Mapping[identity.Format, Document] = {
    "ikanos": Document(_YAML, "skills/embeddings/capability.yaml", _capability("ikanos")),
    "naftiko": Document(_YAML, "skills/embeddings/capability.naftiko.yaml", _capability("naftiko")),
    "openapi": Document(_JSON, "docs/openapi.json", _fixed(openapi_document)),
    "json-schema": Document("application/schema+json", "docs/schema.json", _fixed(json_schema_document)),
    "apis-json": Document(_JSON, "apis.json", lambda url: to_json(apis_index(url))),
    "server-card": Document(SERVER_CARD_TYPE, None, lambda url: to_json(server_card(url))),
}
"""What the command line prints and the server answers with."""

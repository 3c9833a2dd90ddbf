"""A capability as configuration: the embeddings endpoints that an Ikanos or Naftiko document consumes.

Of such a document this server takes the address of each embeddings API, the name of the variable that holds its key,
the models written into its requests, and whether it knows NIM's own fields. What the document exposes needs no taking:
this server exposes the same API as REST, MCP and Agent Skill in a form of its own.

Whatever else would change what an endpoint is sent, or who may call, is refused by its name and line; what merely has
no meaning here is noted. A secret is never in the document: where one stands in the open, the document is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from pydantic import SecretStr

from embeddings_mcp.embedders.nim import HOSTED_URL
from embeddings_mcp.errors import InvalidSetting
from embeddings_mcp.settings import EndpointSettings, Settings
from embeddings_mcp.yaml_source import Members, Part, read_yaml

KNOWN_VERSIONS: Mapping[str, tuple[str, ...]] = {
    "ikanos": ("1.0.0-alpha3", "1.0.0-alpha4", *(f"1.0.0-beta{number}" for number in range(1, 6))),
    "naftiko": ("1.0.0-alpha2", "1.0.0-alpha3"),
}
"""Root keys and the versions that are read; Naftiko's engine became Ikanos in 1.0.0-alpha3."""

_DOCUMENT = {"ikanos", "naftiko", "info", "consumes", "exposes", "aggregates", "binds", "capability"}
_CAPABILITY = {"consumes", "exposes", "aggregates", "binds"}
_API = {"namespace", "type", "description", "baseUri", "authentication", "inputParameters", "resources"}
_RESOURCE = {"display", "label", "description", "tags", "path", "inputParameters", "operations"}
_OPERATION = {
    *("display", "label", "description", "tags", "method"),
    *("inputParameters", "outputRawFormat", "outputParameters", "body"),
}
_BIND = {"namespace", "description", "location", "keys"}
_IMPORT = {"import", "from", "location"}

_REQUEST_FIELDS = frozenset(
    {"model", "input", "input_type", "encoding_format", "embedding_type", "modality", "truncate", "dimensions", "user"}
)
_NIM_FIELDS = frozenset({"input_type", "truncate"})

_REFERENCE = re.compile(r"\{\{\s*(?:[\w-]+\.)?([A-Z][A-Z0-9_]*)\s*\}\}|\$env\.([A-Za-z_]\w*)")
_TEMPLATE = re.compile(r'"\{\{\s*[\w.-]+\s*\}\}"|\{\{\s*[\w.-]+\s*\}\}')
_SECTION = re.compile(r"\{\{[#/^]\s*[\w.-]+\s*\}\}")
_LONGEST_QUOTE = 40


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a capability says about where embeddings come from.

    Attributes:
        endpoints: those that it consumes, in its order.
        api_key_env: the environment variable with the key that callers of this server must send; None for none.
        notes: what it says besides and is not used here, one sentence each, with its line.
    """

    endpoints: tuple[EndpointSettings, ...]
    api_key_env: str | None
    notes: tuple[str, ...]

    @property
    def default_model(self) -> str | None:
        """The first model that it writes into a request; None where callers choose."""
        return next((model for endpoint in self.endpoints for model in endpoint.models or ()), None)

    def added_to(self, settings: Settings) -> Settings:
        """The settings with these endpoints after their own; what they say of key and default model holds.

        Raises:
            InvalidSetting: callers need a key, and the environment has none.
        """
        key = settings.api_key
        if key is None and self.api_key_env is not None:
            value = os.environ.get(self.api_key_env)
            if not value:
                raise InvalidSetting(f"the manifest takes the key that callers send from {self.api_key_env}: set it")
            key = SecretStr(value)
        return settings.model_copy(
            update={
                "endpoints": (*settings.endpoints, *self.endpoints),
                "default_model": settings.default_model or self.default_model,
                "api_key": key,
            }
        )


def read_manifest(path: Path) -> Manifest:
    """Read a capability.

    Raises:
        InvalidSetting: it cannot be read, is no capability, consumes no embeddings API, or asks for what this server
            does not do. The message names the line.
    """
    return _Reader().read(read_yaml(path))


@dataclass(slots=True)
class _Request:
    """What a document says of the requests to an endpoint.

    Attributes:
        fields: names of the fields that a request can have; empty where the caller's body is passed on.
        models: models written into them.
    """

    fields: set[str] = field(default_factory=set)
    models: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Reader:
    """Reads one document.

    Attributes:
        binds: what is behind each variable of the document: an environment variable, or the part that says where else
            it is.
        notes: see `Manifest`.
    """

    binds: dict[str, str | Part] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def read(self, root: Part) -> Manifest:
        """The document."""
        document = root.members(_DOCUMENT)
        self._check_version(document)
        capability = document.parts["capability"].members(_CAPABILITY) if "capability" in document.parts else document
        parts = [document] if capability is document else [document, capability]
        for part in parts:
            self._read_binds(part)
        endpoints = [endpoint for part in parts for api in part.items("consumes") for endpoint in self._read_api(api)]
        if not endpoints:
            root.refuse("no embeddings API is consumed here: expected a POST to a path that ends in /v1/embeddings")
        keys = {key for part in parts for key in self._read_exposes(part)}
        if len(keys) > 1:
            root.refuse(f"callers would need several keys ({', '.join(sorted(keys))}), and this server has one")
        for part in parts:
            if aggregates := part.get("aggregates"):
                self._note(aggregates, "`aggregates` is not used: it shapes what the engine exposes")
        return Manifest(tuple(dict.fromkeys(endpoints)), next(iter(keys), None), tuple(self.notes))

    # --- The parts ---------------------------------------------------------------------------------------------------

    def _check_version(self, document: Members) -> None:
        given = [engine for engine in KNOWN_VERSIONS if engine in document.parts]
        if len(given) != 1:
            document.whole.refuse(
                "this is no capability: it must say `ikanos: 1.0.0-beta5`, or another version, or the same of `naftiko`"
            )
        (engine,) = given
        version = document.parts[engine]
        if version.text not in KNOWN_VERSIONS[engine]:
            known = ", ".join(KNOWN_VERSIONS[engine])
            version.refuse(f"version {version.text!r} of {engine} is not known here; known are {known}")

    def _read_binds(self, part: Members) -> None:
        for item in part.items("binds"):
            bind = item.members(_BIND)
            location = bind.get("location")
            for variable, key in bind.need("keys").members().parts.items():
                self.binds[variable] = location or key.text

    def _read_exposes(self, part: Members) -> Iterator[str]:
        """The environment variables with the keys that callers must send."""
        for item in part.items("exposes"):
            if authentication := item.members().get("authentication"):
                yield self._read_authentication(authentication)
        if exposes := part.get("exposes"):
            self._note(
                exposes,
                "`exposes` is not used: this server exposes REST, MCP and skills in a form of its own, at --host and "
                "--port",
            )

    def _read_api(self, part: Part) -> Iterator[EndpointSettings]:
        """The endpoints that one entry of ``consumes`` comes to."""
        if part.members().parts.keys() & _IMPORT:
            part.refuse("what is imported from another file is not followed: write the API here")
        api = part.members(_API)
        for name, resource in api.named("resources", _RESOURCE):
            for operation_name, operation in resource.named("operations", _OPERATION):
                path, method = resource.need("path"), operation.text("method", "GET")
                if method == "POST" and path.text.rstrip("/").rpartition("/")[2] == "embeddings":
                    yield self._endpoint(api, resource, operation)
                else:
                    place = operation.get("method") or path
                    what = f"`{name}.{operation_name}` ({method} {path.text[:_LONGEST_QUOTE]})"
                    self._note(place, f"{what} is not used: it makes no embeddings")

    def _endpoint(self, api: Members, resource: Members, operation: Members) -> EndpointSettings:
        """The endpoint behind an operation that makes embeddings."""
        url = self._address(api.need("baseUri"), resource.need("path"))
        output = operation.get("outputRawFormat")
        if output and output.text != "json":
            output.refuse("`outputRawFormat` must be json, which is what an embeddings API answers")
        request = _Request()
        for part in (api, resource, operation):
            self._read_parameters(part, request)
        if body := operation.get("body"):
            self._read_body(body, request)
        authentication = api.get("authentication")
        return EndpointSettings(
            url=url,
            api_key_env=self._read_authentication(authentication) if authentication else None,
            models=tuple(dict.fromkeys(request.models)) or None,
            dialect="nim" if self._knows_nim(request, url, api.need("baseUri")) else "openai",
        )

    def _address(self, base: Part, path: Part) -> str:
        """Where the API is, up to and with ``/v1``."""
        if any(mark in base.text for mark in "@?#"):
            # Not repeated: what stands there may be a key.
            base.refuse("`baseUri` must be a plain address, without a user name, a query or a fragment")
        url = f"{base.text.rstrip('/')}/{path.text.strip('/')}".removesuffix("/embeddings")
        if "{" in url:
            base.refuse(f"the address {url} depends on a variable: write it out")
        try:
            urlsplit(url)
        except ValueError as error:
            base.refuse(f"the address {url} is not a URL: {error}")
        if not url.endswith("/v1"):
            base.refuse(f"an embeddings API must be at an address that ends in /v1/embeddings, not {url}/embeddings")
        return url

    def _knows_nim(self, request: _Request, url: str, place: Part) -> bool:
        """Whether requests can say what NIM alone understands."""
        if urlsplit(url).hostname == urlsplit(HOSTED_URL).hostname or request.fields & _NIM_FIELDS:
            return True
        if not request.fields:
            self._note(
                place,
                f"nothing says that {url} knows `input_type`, so it is not sent there; if this is a NIM, name "
                "`input_type` among the operation's inputParameters",
            )
        return False

    # --- Secrets -----------------------------------------------------------------------------------------------------

    def _read_authentication(self, part: Part) -> str:
        """The environment variable with the bearer token."""
        given = part.members()
        kind = given.need("type").text
        if kind == "bearer":
            # `value` is how the index of apis.io writes it.
            return self._variable(given.get("value") or given.need("token"))
        if kind != "apikey" or given.text("key").lower() != "authorization":
            part.refuse(f"authentication of type {kind!r} is not possible here: an embeddings API takes `bearer`")
        return self._variable(given.need("value"), prefix="Bearer ")

    def _variable(self, secret: Part, *, prefix: str = "") -> str:
        """The environment variable that a secret is taken from."""
        match = _REFERENCE.fullmatch(secret.text.removeprefix(prefix))
        if match is None or not secret.text.startswith(prefix):
            # Not repeated: it may be a key.
            secret.refuse(
                f"a secret must not stand in the document: write {prefix}{{{{MY_KEY}}}}, and bind MY_KEY to an "
                "environment variable"
            )
        if match[2]:
            return match[2]
        behind = self.binds.get(match[1])
        if behind is None:
            secret.refuse(f"no bind says what {match[1]} is: add it to the `keys` of `binds`")
        if isinstance(behind, Part):
            behind.refuse(f"{match[1]} must come from the environment: a bind with a `location` is not possible here")
        return behind

    # --- Requests ----------------------------------------------------------------------------------------------------

    def _read_parameters(self, part: Members, request: _Request) -> None:
        for name, parameter in part.named("inputParameters"):
            place, value = parameter.text("in", "body"), parameter.text("value")
            if place == "header" and name.lower() in {"accept", "content-type"} and value == "application/json":
                continue
            if place != "body":
                parameter.whole.refuse(
                    f"`{name}` in the {place} is not possible here: an embeddings API takes its fields in the body"
                )
            if name in _REQUEST_FIELDS:
                request.fields.add(name)
            if value and not _TEMPLATE.fullmatch(value) and not value.startswith("$"):
                self._fix(name, value, parameter.need("value"), request)

    def _read_body(self, part: Part, request: _Request) -> None:
        """Read the template of a request's body."""
        if isinstance(part.node, yaml.MappingNode):
            typed = part.members({"type", "data"})
            if typed.text("type") != "json":
                part.refuse("`body` must be of type json")
            part = typed.need("data")
        if isinstance(part.node, yaml.MappingNode):
            fields: object = {
                name: None if not isinstance(value.node, yaml.ScalarNode) or "{{" in value.text else value.text
                for name, value in part.members().parts.items()
            }
        else:
            try:
                fields = json.loads(_TEMPLATE.sub("null", _SECTION.sub("", part.text)))
            except (json.JSONDecodeError, RecursionError):
                part.refuse("`body` is not JSON once its variables are filled in")
        if fields is None:  # the caller's own body is passed on
            return
        if not isinstance(fields, dict) or "input" not in fields:
            part.refuse("`body` has no field `input`, so this is no OpenAI-style embeddings API")
        request.fields.update(fields)
        for name, value in fields.items():
            if value is not None and name != "input":
                self._fix(name, value, part, request)

    def _fix(self, name: str, value: object, place: Part, request: _Request) -> None:
        """Take over a field that the document sets for every request."""
        if name == "model" and isinstance(value, str):
            request.models.append(value)
        elif name != "encoding_format":  # which this server and the endpoint agree on by themselves
            fixed = str(value)[:_LONGEST_QUOTE]
            place.refuse(f"`{name}` cannot be fixed here, as it is to {fixed!r}: each request says it")

    def _note(self, place: Part, message: str) -> None:
        self.notes.append(f"{place.place}: {message}")

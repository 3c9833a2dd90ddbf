"""A capability as configuration: the embeddings endpoints that an Ikanos or Naftiko document consumes.

From such a document this server takes the URL of each embeddings API, the name of the variable that holds its key,
the models written into its requests, and whether it supports the fields that only NIM has. What the document exposes is
not needed: this server exposes the same API as REST, MCP and Agent Skill itself.

Anything else that would change what an endpoint is sent, or who may call, is rejected with its name and line; what has
no effect here is noted. A document never contains a secret: one with a plain-text secret is rejected.
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
from embeddings_mcp.yaml_source import YamlMapping, YamlNode, read_yaml

KNOWN_VERSIONS: Mapping[str, tuple[str, ...]] = {
    "ikanos": ("1.0.0-alpha3", "1.0.0-alpha4", *(f"1.0.0-beta{number}" for number in range(1, 6))),
    "naftiko": ("1.0.0-alpha2", "1.0.0-alpha3"),
}
"""Root keys and the supported versions; Naftiko's engine became Ikanos in 1.0.0-alpha3."""

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
_MAX_QUOTE = 40


@dataclass(frozen=True, slots=True)
class Manifest:
    """The embeddings endpoints of a capability, as settings.

    Attributes:
        endpoints: the endpoints that it consumes, in document order.
        api_key_env: the environment variable with the key that callers of this server must send; None for none.
        notes: what else the document says that is not used here, one sentence each, with its line.
    """

    endpoints: tuple[EndpointSettings, ...]
    api_key_env: str | None
    notes: tuple[str, ...]

    @property
    def default_model(self) -> str | None:
        """The first model that is written into a request; None if callers choose."""
        return next((model for endpoint in self.endpoints for model in endpoint.models or ()), None)

    def added_to(self, settings: Settings) -> Settings:
        """Return the settings with these endpoints appended; the key and default model of `settings` take precedence.

        Raises:
            InvalidSetting: callers need a key, and its environment variable is not set.
        """
        key = settings.api_key
        if key is None and self.api_key_env is not None:
            value = os.environ.get(self.api_key_env, "").strip()  # as for `Settings.api_key`
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
        InvalidSetting: the file cannot be read, is not a capability, consumes no embeddings API, or needs what this
            server does not support. The message names the line.
    """
    return _Reader().read(read_yaml(path))


@dataclass(slots=True)
class _Request:
    """What a document says about the requests to an endpoint.

    Attributes:
        fields: names of the fields that a request can have; empty if the caller's body is passed through.
        models: models written into the requests.
    """

    fields: set[str] = field(default_factory=set)
    models: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Reader:
    """Reads one document.

    Attributes:
        binds: the source of each variable of the document: an environment variable, or the node that gives another
            location.
        notes: see `Manifest`.
    """

    binds: dict[str, str | YamlNode] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def read(self, root: YamlNode) -> Manifest:
        """Read the document."""
        document = root.mapping(_DOCUMENT)
        self._check_version(document)
        capability = document.values["capability"].mapping(_CAPABILITY) if "capability" in document.values else document
        levels = [document] if capability is document else [document, capability]
        for level in levels:
            self._read_binds(level)
        endpoints = [
            endpoint for level in levels for api in level.items("consumes") for endpoint in self._read_api(api)
        ]
        if not endpoints:
            root.fail("no embeddings API is consumed here: expected a POST to a path that ends in /v1/embeddings")
        keys = {key for level in levels for key in self._read_exposes(level)}
        if len(keys) > 1:
            root.fail(f"callers would need several keys ({', '.join(sorted(keys))}), but this server has only one")
        for level in levels:
            if aggregates := level.get("aggregates"):
                self._note(aggregates, "`aggregates` is not used: it shapes what the engine exposes")
        return Manifest(tuple(dict.fromkeys(endpoints)), next(iter(keys), None), tuple(self.notes))

    # --- Sections ----------------------------------------------------------------------------------------------------

    def _check_version(self, document: YamlMapping) -> None:
        engines = [engine for engine in KNOWN_VERSIONS if engine in document.values]
        if len(engines) != 1:
            document.node.fail(
                "this is not a capability: it must have a version such as `ikanos: 1.0.0-beta5`, or one of `naftiko`"
            )
        (engine,) = engines
        version = document.values[engine]
        if version.text not in KNOWN_VERSIONS[engine]:
            known = ", ".join(KNOWN_VERSIONS[engine])
            version.fail(f"version {version.text!r} of {engine} is not supported; supported are {known}")

    def _read_binds(self, level: YamlMapping) -> None:
        for item in level.items("binds"):
            bind = item.mapping(_BIND)
            location = bind.get("location")
            for variable, key in bind.require("keys").mapping().values.items():
                self.binds[variable] = location or key.text

    def _read_exposes(self, level: YamlMapping) -> Iterator[str]:
        """Yield the environment variables with the keys that callers must send."""
        for item in level.items("exposes"):
            if authentication := item.mapping().get("authentication"):
                yield self._read_authentication(authentication)
        if exposes := level.get("exposes"):
            self._note(
                exposes,
                "`exposes` is not used: this server exposes its own REST, MCP and skills, at --host and --port",
            )

    def _read_api(self, item: YamlNode) -> Iterator[EndpointSettings]:
        """Yield the endpoints that one item of ``consumes`` describes."""
        if item.mapping().values.keys() & _IMPORT:
            item.fail("imports from other files are not followed: write the API here")
        api = item.mapping(_API)
        for name, resource in api.named("resources", _RESOURCE):
            for operation_name, operation in resource.named("operations", _OPERATION):
                path, method = resource.require("path"), operation.text("method", "GET")
                if method == "POST" and path.text.rstrip("/").rpartition("/")[2] == "embeddings":
                    yield self._endpoint(api, resource, operation)
                else:
                    node = operation.get("method") or path
                    label = f"`{name}.{operation_name}` ({method} {path.text[:_MAX_QUOTE]})"
                    self._note(node, f"{label} is not used: it makes no embeddings")

    def _endpoint(self, api: YamlMapping, resource: YamlMapping, operation: YamlMapping) -> EndpointSettings:
        """Return the endpoint of an operation that makes embeddings."""
        url = self._base_url(api.require("baseUri"), resource.require("path"))
        output = operation.get("outputRawFormat")
        if output and output.text != "json":
            output.fail("`outputRawFormat` must be json, the format in which an embeddings API responds")
        request = _Request()
        for level in (api, resource, operation):
            self._read_parameters(level, request)
        if body := operation.get("body"):
            self._read_body(body, request)
        authentication = api.get("authentication")
        return EndpointSettings(
            url=url,
            api_key_env=self._read_authentication(authentication) if authentication else None,
            models=tuple(dict.fromkeys(request.models)) or None,
            dialect="nim" if self._is_nim(request, url, api.require("baseUri")) else "openai",
        )

    def _base_url(self, base: YamlNode, path: YamlNode) -> str:
        """Return the URL of the API, up to and including ``/v1``."""
        if any(mark in base.text for mark in "@?#"):
            # Not quoted: it may contain a key.
            base.fail("`baseUri` must be a plain URL, without a user name, a query or a fragment")
        url = f"{base.text.rstrip('/')}/{path.text.strip('/')}".removesuffix("/embeddings")
        if "{" in url:
            base.fail(f"the URL {url} depends on a variable: write it out")
        try:
            urlsplit(url)
        except ValueError as error:
            base.fail(f"{url} is not a URL: {error}")
        if not url.endswith("/v1"):
            base.fail(f"an embeddings API must be at a URL that ends in /v1/embeddings, not {url}/embeddings")
        return url

    def _is_nim(self, request: _Request, url: str, base: YamlNode) -> bool:
        """Whether requests may have the fields that only NIM supports."""
        if urlsplit(url).hostname == urlsplit(HOSTED_URL).hostname or request.fields & _NIM_FIELDS:
            return True
        if not request.fields:
            self._note(
                base,
                f"nothing says that {url} supports `input_type`, so it is not sent there; if this is a NIM, name "
                "`input_type` among the operation's inputParameters",
            )
        return False

    # --- Secrets -----------------------------------------------------------------------------------------------------

    def _read_authentication(self, node: YamlNode) -> str:
        """Return the environment variable with the bearer token."""
        authentication = node.mapping()
        kind = authentication.require("type").text
        if kind == "bearer":
            # The index of apis.io calls it `value`.
            return self._variable(authentication.get("value") or authentication.require("token"))
        if kind != "apikey" or authentication.text("key").lower() != "authorization":
            node.fail(f"authentication of type {kind!r} is not supported here: an embeddings API takes `bearer`")
        return self._variable(authentication.require("value"), prefix="Bearer ")

    def _variable(self, secret: YamlNode, *, prefix: str = "") -> str:
        """Return the environment variable that a secret is taken from."""
        match = _REFERENCE.fullmatch(secret.text.removeprefix(prefix))
        if match is None or not secret.text.startswith(prefix):
            # Not quoted: it may be a key.
            secret.fail(
                f"a secret must not be written into the document: write {prefix}{{{{MY_KEY}}}}, and bind MY_KEY to an "
                "environment variable"
            )
        if match[2]:
            return match[2]
        source = self.binds.get(match[1])
        if source is None:
            secret.fail(f"{match[1]} is not bound: add it to the `keys` of `binds`")
        if isinstance(source, YamlNode):
            source.fail(f"{match[1]} must come from the environment: a bind with a `location` is not supported here")
        return source

    # --- Requests ----------------------------------------------------------------------------------------------------

    def _read_parameters(self, level: YamlMapping, request: _Request) -> None:
        for name, parameter in level.named("inputParameters"):
            location, value = parameter.text("in", "body"), parameter.text("value")
            if location == "header" and name.lower() in {"accept", "content-type"} and value == "application/json":
                continue
            if location != "body":
                parameter.node.fail(
                    f"`{name}` in the {location} is not supported here: an embeddings API takes its fields in the body"
                )
            if name in _REQUEST_FIELDS:
                request.fields.add(name)
            if value and not _TEMPLATE.fullmatch(value) and not value.startswith("$"):
                self._read_fixed(name, value, parameter.require("value"), request)

    def _read_body(self, body: YamlNode, request: _Request) -> None:
        """Read the template of a request body."""
        template = body
        if isinstance(body.node, yaml.MappingNode):
            typed = body.mapping({"type", "data"})
            if typed.text("type") != "json":
                body.fail("`body` must be of type json")
            template = typed.require("data")
        if isinstance(template.node, yaml.MappingNode):
            fields: object = {
                name: None if not isinstance(value.node, yaml.ScalarNode) or "{{" in value.text else value.text
                for name, value in template.mapping().values.items()
            }
        else:
            try:
                fields = json.loads(_TEMPLATE.sub("null", _SECTION.sub("", template.text)))
            except (json.JSONDecodeError, RecursionError):
                template.fail("`body` is not JSON once its variables are filled in")
        if fields is None:  # the caller's own body is passed through
            return
        if not isinstance(fields, dict) or "input" not in fields:
            template.fail("`body` has no field `input`, so this is not an OpenAI-style embeddings API")
        request.fields.update(fields)
        for name, value in fields.items():
            if value is not None and name != "input":
                self._read_fixed(name, value, template, request)

    def _read_fixed(self, name: str, value: object, node: YamlNode, request: _Request) -> None:
        """Read a field that the document sets for every request."""
        if name == "model" and isinstance(value, str):
            request.models.append(value)
        elif name != "encoding_format":  # which the client of the endpoint chooses
            quoted = str(value)[:_MAX_QUOTE]
            node.fail(f"`{name}` cannot be fixed to {quoted!r} here: each request sets it")

    def _note(self, node: YamlNode, message: str) -> None:
        self.notes.append(f"{node.location}: {message}")

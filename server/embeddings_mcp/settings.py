"""All settings, from environment variables (``EMBEDDINGS_MCP_...``) and command-line flags.

Flags take precedence over the environment. Secrets are `SecretStr`, so that no log and no error can print them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from embeddings_mcp.models import DEFAULT_MODEL, CardOverride, Precision

PREFIX = "EMBEDDINGS_MCP_"
"""Prefix of the environment variables that are settings."""

Load = Literal["background", "eager", "lazy"]


class EndpointSettings(BaseModel):
    """An endpoint whose models are served. Fields not set have the defaults of `embedders.nim.endpoint.Endpoint`."""

    model_config = ConfigDict(frozen=True)

    url: Annotated[str, Field(description="Its URL, such as `https://host` or `http://localhost:8000`.")]
    api_key_env: Annotated[
        str | None, Field(description="The environment variable that holds its key; recommended.")
    ] = None
    api_key: Annotated[SecretStr | None, Field(description="Its key.")] = None
    models: Annotated[
        tuple[str, ...] | None, Field(min_length=1, description="Its models, if it is not to be asked for them.")
    ] = None
    dialect: Annotated[
        Literal["nim", "openai"] | None,
        Field(description="`nim`, or `openai` for vLLM, TEI, Ollama and others; `nim` when not set."),
    ] = None
    caller_keys: Annotated[bool | None, Field(description="Whether HTTP callers may send their own keys for it.")] = (
        None
    )
    allow_http: Annotated[
        bool | None, Field(description="Accept http to another machine: texts and key are sent unencrypted.")
    ] = None
    batch_size: Annotated[int | None, Field(gt=0, description="Maximum texts per request; 50.")] = None
    concurrency: Annotated[int | None, Field(gt=0, description="Maximum requests in flight; 8.")] = None
    requests_per_minute: Annotated[
        float | None, Field(gt=0, description="Maximum requests in any minute; 40 at the hosted API, else no limit.")
    ] = None
    timeout: Annotated[
        float | None, Field(gt=0, description="Seconds of inactivity after which an attempt fails; 120.")
    ] = None
    deadline: Annotated[
        float | None, Field(gt=0, description="Seconds that a call may take, with waiting and retries; 300.")
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        """Accept a URL alone, or a JSON object as a string."""
        if isinstance(value, str):
            value = _from_json(value) if value.startswith("{") else {"url": value}
        if isinstance(value, dict):
            _refuse_unknown(value, "an endpoint", list(cls.model_fields))
        return value

    @model_validator(mode="after")
    def _check_key(self) -> EndpointSettings:
        if self.api_key is not None and self.api_key_env is not None:
            raise PydanticCustomError("two_keys", "has both `api_key` and `api_key_env`: leave one of them out")
        return self


class Settings(BaseSettings):
    """The server's settings. The environment variable of a field is ``EMBEDDINGS_MCP_`` and its name in capitals."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,  # VARIABLE= in a container's configuration means that it is not set
        frozen=True,
        extra="forbid",
        validate_by_name=True,
        hide_input_in_errors=True,  # it may be a key in the wrong place
    )

    models: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(
            min_length=1,
            description="Models to serve, each `ID` or `ID=PATH`; several are separated by spaces.",
        ),
    ] = (DEFAULT_MODEL,)
    default_model: Annotated[
        str | None, Field(description="The model that `default` refers to; the first model if not set.")
    ] = None
    cards: Annotated[
        tuple[CardOverride, ...],
        NoDecode,
        Field(
            description="Model cards of your own, as a JSON array. A card overrides what is otherwise known about its "
            "model, except for lengths that the model's files do not allow."
        ),
    ] = ()
    endpoints: Annotated[
        tuple[EndpointSettings, ...],
        NoDecode,
        Field(
            description="Endpoints whose models are served too, as a JSON array of objects, or as URLs separated by "
            "spaces."
        ),
    ] = ()
    nvidia_api_key: Annotated[
        SecretStr | None,
        Field(
            validation_alias="NVIDIA_API_KEY",
            description="Key for NVIDIA's hosted API, whose models are served when it is set.",
        ),
    ] = None

    device: Annotated[
        str,
        Field(
            description="Where the local encoder runs: `auto` (cuda, then mps, then cpu) or a torch device. Several, "
            "such as `cuda:0,cuda:1`, share the work, each with the whole model."
        ),
    ] = "auto"
    precision: Annotated[
        Precision,
        Field(
            description="Number format of the local encoder: `auto` (bfloat16 on cuda, else float32), `float32`, "
            "`bfloat16` (on CPUs: fast with AMX only), `float16`, or `int8` (CPU only: faster, approximate)."
        ),
    ] = "auto"

    workers: Annotated[
        int | None,
        Field(
            gt=0,
            description="Batches of a local model that run at the same time, each on its share of the cores; if not "
            "set, one per core for a small model on the CPU, else one, and two per GPU.",
        ),
    ] = None
    model_process: Annotated[
        bool | None,
        Field(
            description="Run each local model in a subprocess, so that the server stays responsive while the "
            "model computes, and survives its crash. If not set, only when serving HTTP (never on Windows)."
        ),
    ] = None
    cuda_graphs: Annotated[
        bool,
        Field(
            description="Capture forward passes of small batches on CUDA as graphs and replay them: queries are "
            "several times as fast, for some hundred MiB of GPU memory."
        ),
    ] = True
    load: Annotated[
        Load,
        Field(
            description="When the default model is loaded, if it is local: `background` (while already serving), "
            "`eager` (before serving), or `lazy` (on first use)."
        ),
    ] = "background"

    cache: Annotated[
        str,
        Field(description="Where vectors are cached: `memory`, `off`, or a folder, where they survive a restart."),
    ] = "memory"
    cache_memory_mb: Annotated[int, Field(gt=0, description="MiB of vectors cached in memory.")] = 64
    cache_disk_mb: Annotated[int, Field(gt=0, description="MiB of vectors cached in the folder.")] = 1024

    log_format: Annotated[
        Literal["text", "json"], Field(description="How the server logs to stderr: `text`, or `json` lines.")
    ] = "text"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Field(description="Log level; `info` logs every HTTP request. Texts are never logged."),
    ] = "warning"

    host: Annotated[str, Field(description="Address that the HTTP server listens on.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port of the HTTP server; 0 takes a free one.")] = 8000
    api_key: Annotated[
        SecretStr | None, Field(description="Key that HTTP callers must send; required unless the host is loopback.")
    ] = None
    api_keys: Annotated[
        SecretStr | None,
        Field(description="Keys of several callers, each `NAME=KEY`, separated by spaces; a name may have several."),
    ] = None
    api_keys_file: Annotated[
        Path | None,
        Field(description="File of hashed keys, as `embeddings-mcp key` prints them; reloaded when it changes."),
    ] = None
    oauth_issuer: Annotated[
        str | None,
        Field(description="URL of the OAuth authorization server whose access tokens (JWTs) are accepted too."),
    ] = None
    oauth_resource: Annotated[
        str | None,
        Field(description="This server in the `aud` claim of such tokens: the URL of its MCP, `https://host/mcp`."),
    ] = None
    oauth_scopes: Annotated[
        tuple[str, ...], NoDecode, Field(description="Scopes that such a token must have, separated by spaces.")
    ] = ()
    allow_keyless: Annotated[
        bool, Field(description="Serve without a key even if the host is not loopback: for a proxy that asks for one.")
    ] = False
    without_key: Annotated[
        tuple[Literal["health", "metrics"], ...],
        NoDecode,
        Field(description="What is served without a key: `health`, `metrics`, both, or `none`."),
    ] = ("health",)
    tls_certificate: Annotated[
        Path | None, Field(description="Certificate chain, PEM: with it the server speaks HTTPS only.")
    ] = None
    tls_key: Annotated[
        Path | None, Field(description="Private key of the certificate, PEM, if it is in a separate file.")
    ] = None
    cors_origins: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(description="Origins, such as `https://app.example`, whose pages may call the server from a browser."),
    ] = ()
    allowed_hosts: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(description="Host names besides those of this machine by which HTTP callers may address the server."),
    ] = ()
    max_body_bytes: Annotated[
        int, Field(gt=0, description="Maximum size of an HTTP request body. The hosted NIM gateway takes 25 MiB.")
    ] = 25 * 1024 * 1024
    max_bytes_in_flight: Annotated[
        int, Field(gt=0, description="Maximum total size of the bodies of all HTTP requests in flight.")
    ] = 256 * 1024 * 1024
    max_requests_in_flight: Annotated[
        int, Field(gt=0, description="Maximum HTTP requests in flight, including waiting ones.")
    ] = 256
    requests_per_minute: Annotated[
        int | None,
        Field(
            gt=0,
            description="HTTP requests per minute and caller, identified by key or token or, on a server "
            "without keys, by address; no limit if not set. Paths in EMBEDDINGS_MCP_WITHOUT_KEY are not counted.",
        ),
    ] = None
    max_inputs: Annotated[
        int, Field(gt=0, description="Maximum texts in the arrays of one request, over HTTP or MCP.")
    ] = 16_384
    max_input_characters: Annotated[
        int, Field(gt=0, description="Maximum characters in one text, even if it may be truncated.")
    ] = 20_000_000
    max_mcp_response_bytes: Annotated[
        int,
        Field(
            gt=0,
            description="Maximum response of MCP over HTTP, in bytes; clients using the Python SDK read 1 MiB by "
            "default. REST has no such limit.",
        ),
    ] = 1_000_000
    max_queued_tokens: Annotated[
        int,
        Field(
            gt=0,
            description="Maximum tokens queued for one local model; requests beyond that are told when to retry.",
        ),
    ] = 1_000_000
    request_seconds: Annotated[
        float, Field(gt=0, description="Maximum seconds for one request, including waiting.")
    ] = 600

    @field_validator("models", "allowed_hosts", "cors_origins", "oauth_scopes", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(value.split()) if isinstance(value, str) else value

    @field_validator("api_key", "nvidia_api_key", mode="before")
    @classmethod
    def _strip(cls, value: object) -> object:
        """Strip a key: one read from a mounted secret file ends with a newline."""
        return value.strip() if isinstance(value, str) else value

    @field_validator("without_key", mode="before")
    @classmethod
    def _read_keyless(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        groups = () if value == "none" else tuple(value.split())
        if not {*groups} <= {"health", "metrics"}:
            raise PydanticCustomError("without_key", "must be `health`, `metrics`, both, or `none`")
        return groups

    @field_validator("port", mode="before")
    @classmethod
    def _read_port(cls, value: object) -> object:
        """Ignore the URL that Kubernetes puts into this variable for a service called ``embeddings-mcp``."""
        return cls.model_fields["port"].default if str(value).startswith(("tcp://", "udp://", "sctp://")) else value

    @field_validator("model_process")
    @classmethod
    def _check_process(cls, enabled: bool | None) -> bool | None:  # noqa: FBT001 - as pydantic calls it
        if enabled and os.name != "posix":
            raise PydanticCustomError("model_process", "is not possible on Windows: leave it out")
        return enabled

    @field_validator("cache")
    @classmethod
    def _find_folder(cls, cache: str) -> str:
        if cache in {"memory", "off"}:
            return cache
        try:
            return str(Path(cache).expanduser())
        except RuntimeError as error:
            raise PydanticCustomError("cache", "cannot be found: {error}", {"error": str(error)}) from None

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not re.fullmatch(r"https?://[^\s/*@]+", origin):
                raise PydanticCustomError(
                    "origin",
                    "must be origins such as https://app.example, without path or `*`: {origin}",
                    {"origin": repr(origin)},
                )
        return tuple(origin.lower() for origin in origins)

    @field_validator("allowed_hosts")
    @classmethod
    def _check_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not re.fullmatch(r"[\w.:\[\]-]+", host, re.ASCII):  # could never match a Host header
                raise PydanticCustomError(
                    "host",
                    "must be names such as app.example, separated by spaces, without scheme or `*`: {host}",
                    {"host": repr(host)},
                )
        return hosts

    @field_validator("endpoints", mode="before")
    @classmethod
    def _read_endpoints(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        text = value.strip()
        if text.startswith("{"):  # a single endpoint
            return [_from_json(text)]
        return _from_json(text) if text.startswith("[") else text.split()

    @field_validator("endpoints")
    @classmethod
    def _check_caller_keys(cls, endpoints: tuple[EndpointSettings, ...]) -> tuple[EndpointSettings, ...]:
        if sum(bool(endpoint.caller_keys) for endpoint in endpoints) > 1:
            raise PydanticCustomError(
                "caller_keys", "`caller_keys` is possible for one endpoint only: a key meant for one would go to others"
            )
        return endpoints

    @field_validator("tls_key")
    @classmethod
    def _check_tls(cls, key: Path | None, others: ValidationInfo) -> Path | None:
        if key is not None and others.data.get("tls_certificate") is None:
            raise PydanticCustomError("tls", f"has no effect without {PREFIX}TLS_CERTIFICATE")
        return key

    @field_validator("cards", mode="before")
    @classmethod
    def _read_cards(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        cards = _from_json(value)
        if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
            raise PydanticCustomError("cards", "must be a JSON array of objects, one for each card")
        known = [field.name for field in fields(CardOverride)]
        for card in cards:
            _refuse_unknown(card, "a card", known)
        return cards

    @field_validator("cards")
    @classmethod
    def _check_cards(cls, cards: tuple[CardOverride, ...]) -> tuple[CardOverride, ...]:
        for card in cards:
            for name in ("dimensions", "max_tokens", "matryoshka"):
                value = getattr(card, name)
                numbers = value if isinstance(value, tuple) else (value,)
                if any(number is not None and number < 1 for number in numbers):
                    raise PydanticCustomError(
                        "card", "{name} of the card {id} must be greater than 0", {"name": name, "id": card.id}
                    )
        return cards


def _refuse_unknown(given: Iterable[str], owner: str, known: Sequence[str]) -> None:
    """Refuse fields that do not exist: pydantic would ignore them, so that a misspelt limit has no effect."""
    for name in given:
        if name not in known:
            raise PydanticCustomError(
                "unknown",
                "{owner} has no field '{name}'; its fields are {known}",
                {"owner": owner, "name": name, "known": ", ".join(known)},
            )


def _from_json(text: str) -> object:
    try:
        return orjson.loads(text)
    except ValueError as error:
        # Only the parser's message, since the text may contain a key.
        raise PydanticCustomError("json", "must be JSON: {error}", {"error": str(error)}) from None

"""Every setting, in one object: from environment variables (``EMBEDDINGS_MCP_...``) and from command-line flags.

A flag wins over the environment. Secrets are `SecretStr`, so that no log and no error can print them.
"""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from embeddings_mcp.models import DEFAULT_MODEL, OwnCard, Precision

PREFIX = "EMBEDDINGS_MCP_"
"""Begins the name of every environment variable that is a setting."""

Load = Literal["background", "eager", "lazy"]


class EndpointSettings(BaseModel):
    """An endpoint whose models are served. What is not said is as `embedders.nim.endpoint.Endpoint` has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: Annotated[str, Field(description="Its address, as in `https://host` or `http://localhost:8000`.")]
    api_key_env: Annotated[
        str | None, Field(description="The environment variable that holds its key; the recommended form.")
    ] = None
    api_key: Annotated[SecretStr | None, Field(description="Its key itself.")] = None
    models: Annotated[
        tuple[str, ...] | None, Field(min_length=1, description="Its models, where it is not to be asked for them.")
    ] = None
    dialect: Annotated[
        Literal["nim", "openai"] | None,
        Field(description="`nim`, or `openai` for vLLM, TEI, Ollama and others; `nim` when not set."),
    ] = None
    caller_keys: Annotated[
        bool | None, Field(description="Whether HTTP callers may bring keys of their own to it.")
    ] = None
    allow_http: Annotated[
        bool | None, Field(description="Accept http to another machine: texts and key travel readable.")
    ] = None
    batch_size: Annotated[int | None, Field(gt=0, description="Most texts in one request; 50.")] = None
    concurrency: Annotated[int | None, Field(gt=0, description="Most requests at the same time; 8.")] = None
    requests_per_minute: Annotated[
        float | None, Field(gt=0, description="Most requests in any minute; 40 at the hosted API, else no limit.")
    ] = None
    timeout: Annotated[
        float | None, Field(gt=0, description="Seconds of silence after which an attempt has failed; 120.")
    ] = None
    deadline: Annotated[
        float | None, Field(gt=0, description="Seconds that a call may take, waiting and retries included; 300.")
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        """An address alone is an endpoint, and so is a JSON object as text."""
        if not isinstance(value, str):
            return value
        return _from_json(value) if value.startswith("{") else {"url": value}

    @model_validator(mode="after")
    def _check_key(self) -> EndpointSettings:
        if self.api_key is not None and self.api_key_env is not None:
            raise PydanticCustomError("two_keys", "has both `api_key` and `api_key_env`: leave one of them out")
        return self


class Settings(BaseSettings):
    """What the server can be told; every field is an environment variable in capitals after ``EMBEDDINGS_MCP_``."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,  # VARIABLE= in a container's configuration means that nobody has set it
        frozen=True,
        extra="forbid",
        validate_by_name=True,
        hide_input_in_errors=True,  # it may be a key that stands in the wrong place
    )

    models: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(
            min_length=1,
            description="Models to serve, each `ID` or `ID=PATH`; in the environment, separated by spaces.",
        ),
    ] = (DEFAULT_MODEL,)
    default_model: Annotated[
        str | None, Field(description="The model that `default` means; the first of the models when not set.")
    ] = None
    cards: Annotated[
        tuple[OwnCard, ...],
        NoDecode,
        Field(
            description="Cards of your own, as a JSON array. What a card says of a model overrides what is known of it "
            "otherwise, except for lengths that its files do not allow."
        ),
    ] = ()
    endpoints: Annotated[
        tuple[EndpointSettings, ...],
        NoDecode,
        Field(
            description="Endpoints whose models are served too, as a JSON array of objects, or as addresses separated "
            "by spaces."
        ),
    ] = ()
    nvidia_api_key: Annotated[
        SecretStr | None,
        Field(
            validation_alias="NVIDIA_API_KEY",
            description="Key to NVIDIA's hosted API, whose models are served when it is set.",
        ),
    ] = None

    device: Annotated[
        str,
        Field(
            description="Where the local encoder runs: `auto` (cuda, then mps, then cpu) or a torch device. Several "
            "share the work, as `cuda:0,cuda:1`, and each holds the whole model."
        ),
    ] = "auto"
    precision: Annotated[
        Precision,
        Field(
            description="Number format of the local encoder: `auto` (bfloat16 on cuda, else float32), `float32`, "
            "`bfloat16` (on CPUs: fast with AMX only), `float16`, or `int8` (CPU only: faster, and near but not equal)."
        ),
    ] = "auto"

    workers: Annotated[
        int | None,
        Field(
            gt=0,
            description="Batches of a local model that run at the same time, each on its share of the cores; if not "
            "set, one for each core where the model is small and runs on the CPU, else one, and two for each GPU.",
        ),
    ] = None
    model_process: Annotated[
        bool | None,
        Field(
            description="Run each local model in a process of its own, so that the server answers others while it "
            "computes, and outlives it. If not set, it does where it serves HTTP (and never on Windows)."
        ),
    ] = None
    cuda_graphs: Annotated[
        bool,
        Field(
            description="Record the passes of small batches through a local model on CUDA and replay them: queries are "
            "answered several times as fast, for some hundred MiB of the GPU's memory."
        ),
    ] = True
    load: Annotated[
        Load,
        Field(
            description="When the default model is loaded, where it runs here: `background` (beside the first "
            "answers), `eager` (before the server answers), or `lazy` (when it is first needed)."
        ),
    ] = "background"

    cache: Annotated[
        str,
        Field(description="Where vectors are remembered: `memory`, `off`, or a folder, where they outlive the server."),
    ] = "memory"
    cache_memory_mb: Annotated[int, Field(gt=0, description="MiB of vectors that are remembered in memory.")] = 64
    cache_disk_mb: Annotated[int, Field(gt=0, description="MiB of vectors that are remembered in the folder.")] = 1024

    log_format: Annotated[
        Literal["text", "json"], Field(description="How the server logs to stderr: `text`, or `json` lines.")
    ] = "text"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Field(description="What it logs; at `info` a line for every HTTP request. Never a text."),
    ] = "warning"

    host: Annotated[str, Field(description="Address that the HTTP server listens on.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port of the HTTP server; 0 takes a free one.")] = 8000
    api_key: Annotated[
        SecretStr | None, Field(description="Key that HTTP callers must send; required off the loopback address.")
    ] = None
    api_keys: Annotated[
        SecretStr | None,
        Field(description="Keys of several callers, each `NAME=KEY`, separated by spaces; one name may have several."),
    ] = None
    api_keys_file: Annotated[
        Path | None,
        Field(description="File of such keys as `embeddings-mcp key` writes them, hashed; read anew when it changes."),
    ] = None
    oauth_issuer: Annotated[
        str | None,
        Field(description="OAuth authorization server whose access tokens (JWTs) open the server too, as an address."),
    ] = None
    oauth_resource: Annotated[
        str | None,
        Field(description="This server as such tokens name it in `aud`: the address of its MCP, `https://host/mcp`."),
    ] = None
    oauth_scopes: Annotated[
        tuple[str, ...], NoDecode, Field(description="Scopes that such a token must have, separated by spaces.")
    ] = ()
    allow_keyless: Annotated[
        bool, Field(description="Serve without a key off the loopback address too: where a proxy asks for one.")
    ] = False
    without_key: Annotated[
        tuple[Literal["health", "metrics"], ...],
        NoDecode,
        Field(description="What is answered without a key all the same: `health`, `metrics`, both, or `none`."),
    ] = ("health",)
    tls_certificate: Annotated[
        Path | None, Field(description="Certificate chain, PEM: with it the server speaks https only.")
    ] = None
    tls_key: Annotated[
        Path | None, Field(description="Private key of the certificate, PEM, where that file does not hold it.")
    ] = None
    cors_origins: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(description="Origins, as `https://app.example`, whose pages may call the server from a browser."),
    ] = ()
    allowed_hosts: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(description="Names, besides those of this machine, by which HTTP callers may address the server."),
    ] = ()
    max_body_bytes: Annotated[
        int, Field(gt=0, description="Largest HTTP request body. The hosted NIM gateway takes 25 MiB.")
    ] = 25 * 1024 * 1024
    max_bytes_in_flight: Annotated[
        int, Field(gt=0, description="Bytes that the bodies of all HTTP requests in flight may have together.")
    ] = 256 * 1024 * 1024
    max_requests_in_flight: Annotated[
        int, Field(gt=0, description="HTTP requests that may be in flight at the same time, those that wait included.")
    ] = 256
    requests_per_minute: Annotated[
        int | None,
        Field(
            gt=0,
            description="HTTP requests that each caller may make in a minute, told by key or token or, on a server "
            "without keys, by address; no limit if not set. Paths in EMBEDDINGS_MCP_WITHOUT_KEY are not counted.",
        ),
    ] = None
    max_inputs: Annotated[int, Field(gt=0, description="Texts in the arrays of one request, over HTTP or MCP.")] = (
        16_384
    )
    max_input_characters: Annotated[
        int, Field(gt=0, description="Characters in one text, whether or not it may be truncated.")
    ] = 20_000_000
    max_mcp_answer_bytes: Annotated[
        int,
        Field(
            gt=0,
            description="Largest answer of MCP over HTTP, in bytes; clients made with Python's SDK read 1 MiB unless "
            "they are told otherwise. REST has no such limit.",
        ),
    ] = 1_000_000
    max_queued_tokens: Annotated[
        int,
        Field(
            gt=0,
            description="Tokens that may wait for one local model; requests beyond that are told when to come back.",
        ),
    ] = 1_000_000
    request_seconds: Annotated[
        float, Field(gt=0, description="Seconds that one request may take, waiting included.")
    ] = 600

    @field_validator("models", "allowed_hosts", "cors_origins", "oauth_scopes", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(value.split()) if isinstance(value, str) else value

    @field_validator("api_key", "nvidia_api_key", mode="before")
    @classmethod
    def _strip(cls, value: object) -> object:
        """A key in a file, as secrets are mounted, ends with a line."""
        return value.strip() if isinstance(value, str) else value

    @field_validator("without_key", mode="before")
    @classmethod
    def _read_keyless(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        named = () if value == "none" else tuple(value.split())
        if not {*named} <= {"health", "metrics"}:
            raise PydanticCustomError("without_key", "must be `health`, `metrics`, both, or `none`")
        return named

    @field_validator("port", mode="before")
    @classmethod
    def _read_port(cls, value: object) -> object:
        """Beside a service called ``embeddings-mcp``, Kubernetes says in this variable where that is."""
        return cls.model_fields["port"].default if str(value).startswith(("tcp://", "udp://", "sctp://")) else value

    @field_validator("model_process")
    @classmethod
    def _check_process(cls, wanted: bool | None) -> bool | None:  # noqa: FBT001 - as pydantic calls it
        if wanted and os.name != "posix":
            raise PydanticCustomError("model_process", "is not possible on Windows: leave it out")
        return wanted

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
            if not re.fullmatch(r"[\w.:\[\]-]+", host, re.ASCII):  # and so never in the header `Host`
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
        given = value.strip()
        if given.startswith("{"):  # one alone
            return [_from_json(given)]
        return _from_json(given) if given.startswith("[") else given.split()

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
            raise PydanticCustomError("tls", "is of no use without a certificate, tls_certificate")
        return key

    @field_validator("cards", mode="before")
    @classmethod
    def _read_cards(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        cards = _from_json(value)
        if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
            raise PydanticCustomError("cards", "must be a JSON array of objects, one for each card")
        known = [field.name for field in fields(OwnCard)]
        for name in (name for card in cards for name in card if name not in known):
            # Of a dataclass pydantic drops what it does not know: a limit misspelt would be no limit.
            raise PydanticCustomError(
                "unknown", "a card has no {name}; it has {known}", {"name": name, "known": ", ".join(known)}
            )
        return cards

    @field_validator("cards")
    @classmethod
    def _check_cards(cls, cards: tuple[OwnCard, ...]) -> tuple[OwnCard, ...]:
        for card in cards:
            for name in ("dimensions", "max_tokens", "matryoshka"):
                value = getattr(card, name)
                numbers = value if isinstance(value, tuple) else (value,)
                if any(number is not None and number < 1 for number in numbers):
                    raise PydanticCustomError(
                        "card", "{name} of the card {id} must be above zero", {"name": name, "id": card.id}
                    )
        return cards


def _from_json(text: str) -> object:
    try:
        return orjson.loads(text)
    except ValueError as error:
        # Only what is wrong and where, for the text may hold a key.
        raise PydanticCustomError("json", "must be JSON: {error}", {"error": str(error)}) from None

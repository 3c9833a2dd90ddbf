"""Every setting, in one object: from environment variables (``EMBEDDINGS_MCP_...``) and from command-line flags.

A flag wins over the environment. Secrets are `SecretStr`, so that no log and no error can print them.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from embeddings_mcp.models import DEFAULT_MODEL, ModelCard

Precision = Literal["auto", "float32", "bfloat16", "float16"]


class Settings(BaseSettings):
    """What the server can be told; every field is an environment variable in capitals after ``EMBEDDINGS_MCP_``."""

    model_config = SettingsConfigDict(
        env_prefix="EMBEDDINGS_MCP_",
        env_ignore_empty=True,  # VARIABLE= in a container's configuration means that nobody has set it
        frozen=True,
        extra="forbid",
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
        tuple[ModelCard, ...],
        NoDecode,
        Field(description="Cards of your own, as a JSON array; they go before those that are built in."),
    ] = ()
    device: Annotated[
        str, Field(description="Where the local encoder runs: `auto` (cuda, then mps, then cpu) or a torch device.")
    ] = "auto"
    precision: Annotated[
        Precision, Field(description="Number format of the local encoder; `auto` is bfloat16 on cuda, else float32.")
    ] = "auto"

    host: Annotated[str, Field(description="Address that the HTTP server listens on.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port of the HTTP server; 0 takes a free one.")] = 8000
    api_key: Annotated[
        SecretStr | None, Field(description="Key that HTTP callers must send; required off the loopback address.")
    ] = None
    allowed_hosts: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(description="Names, besides those of this machine, by which HTTP callers may address the server."),
    ] = ()
    max_body_bytes: Annotated[
        int, Field(gt=0, description="Largest HTTP request body. The hosted NIM gateway takes 25 MiB.")
    ] = 25 * 1024 * 1024

    @field_validator("models", "allowed_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(value.split()) if isinstance(value, str) else value

    @field_validator("cards", mode="before")
    @classmethod
    def _read_cards(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            cards = json.loads(value)
        except ValueError as error:
            raise PydanticCustomError("json", "must be JSON: {error}", {"error": str(error)}) from None
        if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
            raise PydanticCustomError("cards", "must be a JSON array of objects, one for each card")
        known = [field.name for field in fields(ModelCard)]
        for name in (name for card in cards for name in card if name not in known):
            # Of a dataclass pydantic drops what it does not know: a limit misspelt would be no limit.
            raise PydanticCustomError(
                "unknown", "a card has no {name}; it has {known}", {"name": name, "known": ", ".join(known)}
            )
        return cards

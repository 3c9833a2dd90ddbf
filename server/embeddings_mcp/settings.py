"""Every setting, in one object: from environment variables (``EMBEDDINGS_MCP_...``) and from command-line flags.

A flag wins over the environment. Secrets are `SecretStr`, so that no log and no error can print them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from embeddings_mcp.models import DEFAULT_MODEL, ModelCard

Precision = Literal["auto", "float32", "bfloat16", "float16"]


class Settings(BaseSettings):
    """What the server can be told; every field is an environment variable in capitals after ``EMBEDDINGS_MCP_``."""

    model_config = SettingsConfigDict(env_prefix="EMBEDDINGS_MCP_", frozen=True, extra="forbid")

    models: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(description="Models to serve, each `ID` or `ID=PATH`; in the environment, separated by spaces."),
    ] = (DEFAULT_MODEL,)
    default_model: Annotated[
        str | None, Field(description="The model that `default` means; the first of the models when not set.")
    ] = None
    cards: Annotated[
        tuple[ModelCard, ...],
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

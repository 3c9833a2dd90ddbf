"""Settings as the command line has them: from its flags, and where there is none from the environment."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from embeddings_mcp.assemble import service_for
from embeddings_mcp.errors import InvalidSetting
from embeddings_mcp.models import Precision
from embeddings_mcp.service import EmbeddingService
from embeddings_mcp.settings import PREFIX, Settings


def settings_of(**flags: object) -> Settings:
    """The settings, with the flags that were given over the environment.

    Raises:
        InvalidSetting: a value is not accepted; names the flag or the variable that it came from.
    """
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name, *place = map(str, first["loc"])
        flag = {"models": "--model", "endpoints": "--endpoint"}.get(name, f"--{name.replace('_', '-')}")
        source = flag if name in given else PREFIX + name.upper()
        raise InvalidSetting(f"the setting {' '.join([source, *place])}: {first['msg']}") from None


def service_of(
    model: str | None,
    endpoints: list[str] | None,
    device: str | None,
    precision: Precision | None,
    cache: str | None = None,
) -> Callable[[], Awaitable[EmbeddingService]]:
    """How to make a service to ask one model: that of ``--model``, or else the default model."""
    settings = settings_of(endpoints=endpoints, device=device, cache=cache, precision=precision)
    return partial(service_for, settings, model, at_endpoint=bool(endpoints))


def refuse_self_endpoint(settings: Settings) -> None:
    """An endpoint where this server is about to listen would be this server, asked by itself for ever.

    Raises:
        InvalidSetting: there is one.
    """
    here = {settings.host, "localhost", "127.0.0.1", "::1"}
    for endpoint in settings.endpoints:
        try:
            address = urlsplit(endpoint.url)
            port = address.port
        except ValueError:
            continue  # no address at all, which is refused when the endpoint is made of it
        if settings.port and port == settings.port and address.hostname in here:
            raise InvalidSetting(
                f"the endpoint {endpoint.url} would be this server itself: choose another --port, or another address "
                "for the endpoint"
            )

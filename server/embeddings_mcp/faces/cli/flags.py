"""Settings of the command line: from its flags and, where a flag is not given, from the environment."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from embeddings_mcp.assemble import build_service_for_model
from embeddings_mcp.errors import InvalidSetting
from embeddings_mcp.models import Precision
from embeddings_mcp.service import EmbeddingService
from embeddings_mcp.settings import PREFIX, Settings


def settings_from_flags(**flags: object) -> Settings:
    """Read the settings; flags take precedence over the environment.

    Raises:
        InvalidSetting: a value is not accepted; the message names the flag or environment variable it came from.
    """
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name, *path = map(str, first["loc"])
        flag = {"models": "--model", "endpoints": "--endpoint"}.get(name, f"--{name.replace('_', '-')}")
        source = flag if name in given else PREFIX + name.upper()
        raise InvalidSetting(f"the setting {' '.join([source, *path])}: {first['msg']}") from None


def service_factory(
    model: str | None,
    endpoints: list[str] | None,
    device: str | None,
    precision: Precision | None,
    cache: str | None = None,
) -> Callable[[], Awaitable[EmbeddingService]]:
    """Return a factory for a service with a single model: the one given with ``--model``, or else the default."""
    settings = settings_from_flags(endpoints=endpoints, device=device, cache=cache, precision=precision)
    return partial(build_service_for_model, settings, model, at_endpoint=bool(endpoints))


def refuse_self_endpoint(settings: Settings) -> None:
    """Reject an endpoint at the URL where this server will listen: it would call itself in an endless loop.

    Raises:
        InvalidSetting: there is such an endpoint.
    """
    own_hosts = {settings.host, "localhost", "127.0.0.1", "::1"}
    for endpoint in settings.endpoints:
        try:
            url = urlsplit(endpoint.url)
            port = url.port
        except ValueError:
            continue  # not a valid URL, which is rejected when the endpoint is created
        if settings.port and port == settings.port and url.hostname in own_hosts:
            raise InvalidSetting(
                f"the endpoint {endpoint.url} would be this server itself: choose another --port, or another URL for "
                "the endpoint"
            )

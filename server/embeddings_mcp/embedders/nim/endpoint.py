"""Configuration of an endpoint: its URL, key, dialect and limits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import httpx
from pydantic import SecretStr

from embeddings_mcp.addresses import is_loopback
from embeddings_mcp.caller import CALLER_KEY_HEADER
from embeddings_mcp.errors import InvalidSetting
from embeddings_mcp.redaction import mask_keys

HOSTED_URL = "https://integrate.api.nvidia.com/v1"
"""NVIDIA's hosted API, the one behind build.nvidia.com."""

HOSTED_DEFAULT_MODEL = "nvidia/nemotron-3-embed-1b"
"""The only hosted model that every publicly reported account could call (August 2026)."""

HOSTED_MODELS = (HOSTED_DEFAULT_MODEL, "nvidia/llama-nemotron-embed-vl-1b-v2")
"""Models that the hosted API is known to serve, without discovery (August 2026)."""

HOSTED_STATUS_URL = "https://api.nvcf.nvidia.com/v2/nvcf/pexec/status"
"""URL to poll for a response of the hosted API that was not ready at once (status 202)."""

HOSTED_REQUESTS_PER_MINUTE = 40
"""As reported by users of the hosted API. NVIDIA publishes no figure, and shows an account's limit only on its site."""

KEYS_URL = "https://build.nvidia.com"
"""Where to get a key for the hosted API."""

Dialect = Literal["nim", "openai"]
"""Fields that an endpoint understands: those of OpenAI's API, and with ``nim`` also ``input_type`` and ``truncate``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A server that serves embeddings over HTTP.

    Attributes:
        url: the base URL including the version, ``https://host/v1``; ``/v1`` is appended if missing.
        api_key: sent as a bearer token; None if the server needs none.
        key_name: what holds the key (a setting, an environment variable, a header), for error messages.
        caller_keys: callers may send keys of their own, which are used instead of `api_key`.
        for_caller: `api_key` is the caller's own.
        dialect: ``nim`` for NIM and compatible servers (such as this one); ``openai`` for others (vLLM, TEI, Ollama).
            The latter are never sent fields that they would silently ignore: prompts are prepended to the texts here.
        allow_http: accept a URL without TLS that is not on this machine: texts and key travel unencrypted.
        batch_size: maximum number of texts in one request.
        concurrency: maximum number of requests in flight.
        requests_per_minute: maximum number of requests in any 60 seconds; ``inf`` for no limit. None means 40 for the
            hosted API and no limit for others.
        timeout: seconds without a byte received after which an attempt fails.
        deadline: seconds that one call may take in total, including queueing and retries.
        status_url: where to poll for a response that was not ready at once; None if the server has no such route.

    Raises:
        InvalidSetting: the URL or the key cannot be valid, or a limit is not greater than 0.
    """

    url: str
    api_key: SecretStr | None = None
    key_name: str = "NVIDIA_API_KEY"
    caller_keys: bool = False
    for_caller: bool = False
    dialect: Dialect = "nim"
    allow_http: bool = False
    batch_size: int = 50
    concurrency: int = 8
    requests_per_minute: float | None = None
    timeout: float = 120.0
    deadline: float = 300.0
    status_url: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _checked_url(self.url, allow_http=self.allow_http))
        object.__setattr__(self, "api_key", _checked_key(self.api_key, self.key_name))
        if self.hosted and self.status_url is None:
            object.__setattr__(self, "status_url", HOSTED_STATUS_URL)
        for limit in ("batch_size", "concurrency", "requests_per_minute", "timeout", "deadline"):
            value = getattr(self, limit)
            if value is not None and value <= 0:
                raise InvalidSetting(f"`{limit}` of the endpoint {self.url} must be greater than 0")

    @property
    def host(self) -> str:
        """Host name or IP address."""
        return httpx.URL(self.url).host

    @property
    def hosted(self) -> bool:
        """Whether this is NVIDIA's hosted API, which has rate limits and no health route."""
        return self.host == httpx.URL(HOSTED_URL).host

    @property
    def rate(self) -> float:
        """Maximum number of requests in any 60 seconds."""
        if self.requests_per_minute is not None:
            return self.requests_per_minute
        return HOSTED_REQUESTS_PER_MINUTE if self.hosted else math.inf

    @property
    def ready_path(self) -> str | None:
        """A route that responds with 200 when the endpoint is ready; None for the hosted API, which has none."""
        if self.hosted:
            return None
        return "/health/ready" if self.dialect == "nim" else "/models"

    @property
    def loopback(self) -> bool:
        """Whether the endpoint is on this machine."""
        return is_loopback(self.host)

    @property
    def headers(self) -> dict[str, str]:
        """Headers that authorize a request to this endpoint."""
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key.get_secret_value()}"}

    def with_caller_key(self, key: SecretStr) -> Endpoint:
        """Return a copy of the endpoint that uses a caller's key."""
        return replace(self, api_key=key, key_name=f"the header {CALLER_KEY_HEADER}", for_caller=True)

    def redact(self, text: str) -> str:
        """Mask this endpoint's key, in case the endpoint echoed it, and anything else that looks like a key."""
        if self.api_key is not None:
            text = text.replace(self.api_key.get_secret_value(), "***")
        return mask_keys(text)


_INVALID_URL = (
    "an endpoint's URL must look like https://host or http://localhost:8000; the value given is not repeated here, "
    "since it may be a key"
)


def _checked_url(text: str, *, allow_http: bool) -> str:
    try:
        url = httpx.URL(text.strip())
    except (httpx.InvalidURL, UnicodeError):
        raise InvalidSetting(_INVALID_URL) from None
    if url.port is not None and not 0 < url.port < 65536:
        raise InvalidSetting(f"the endpoint at {url.host!r} must have a port from 1 to 65535, not {url.port}")
    if url.userinfo or url.query or url.fragment:
        # The URL is not repeated, since these parts may hold a key.
        raise InvalidSetting(
            f"the URL of the endpoint at {url.host!r} must end with its path, and hold neither user name nor "
            "password: a key goes where the endpoint's `api_key_env` says"
        )
    if url.scheme not in {"http", "https"} or not url.host:
        raise InvalidSetting(_INVALID_URL)
    if url.scheme == "http" and not (allow_http or is_loopback(url.host)):
        raise InvalidSetting(
            f"the endpoint {text} must be reached over https, since texts and key would travel unencrypted; if the "
            "network in between is trusted, set the endpoint's `allow_http`"
        )
    base = str(url).rstrip("/")
    return base if base.endswith("/v1") else f"{base}/v1"


def _checked_key(key: SecretStr | None, name: str) -> SecretStr | None:
    if key is None:
        return None
    value = key.get_secret_value().strip()
    if not value:
        return None
    if not (value.isascii() and value.isprintable() and " " not in value):
        raise InvalidSetting(f"the key in {name} contains characters that no key has: copy it again")
    return SecretStr(value)

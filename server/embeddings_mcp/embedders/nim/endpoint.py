"""An endpoint: where embeddings come from over HTTP, with which key, and how much may be asked of it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

import httpx
from pydantic import SecretStr

from embeddings_mcp.addresses import is_loopback
from embeddings_mcp.caller import CALLER_KEY_HEADER
from embeddings_mcp.errors import InvalidSetting

HOSTED_URL = "https://integrate.api.nvidia.com/v1"
"""NVIDIA's hosted API, the one behind build.nvidia.com."""

HOSTED_DEFAULT_MODEL = "nvidia/nemotron-3-embed-1b"
"""The one hosted model that every account seen in public could call (August 2026)."""

HOSTED_MODELS = (HOSTED_DEFAULT_MODEL, "nvidia/llama-nemotron-embed-vl-1b-v2")
"""What the hosted API is known to serve without having been asked (August 2026)."""

HOSTED_STATUS_URL = "https://api.nvcf.nvidia.com/v2/nvcf/pexec/status"
"""Where the hosted API's answers are fetched that were not ready at once (status 202)."""

HOSTED_REQUESTS_PER_MINUTE = 40
"""What users of the hosted API report. NVIDIA publishes no figure, and shows an account's own only in its web pages."""

KEYS_URL = "https://build.nvidia.com"
"""Where keys to the hosted API come from."""

Dialect = Literal["nim", "openai"]
"""What an endpoint understands: NIM's ``input_type`` and ``truncate``, or only the fields of OpenAI's own API."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One server of embeddings.

    Attributes:
        url: its address up to and with the version, ``https://host/v1``; ``/v1`` is added where it is missing.
        api_key: sent as a bearer token; None where the server asks for none.
        key_name: what holds the key (a setting, an environment variable, a header), so that an error can name it.
        caller_keys: callers may bring keys of their own, which then go out in place of `api_key`.
        for_caller: `api_key` is the caller's own.
        dialect: ``nim`` for NIM and for servers that mirror it (ours does); ``openai`` for others (vLLM, TEI, Ollama),
            which are never sent what they would ignore in silence: prompts are put before the texts here.
        allow_http: accept an address without TLS that is not on this machine: texts and key travel readable.
        batch_size: most texts in one request.
        concurrency: most requests at the same time.
        requests_per_minute: most requests in any 60 seconds; ``inf`` for no limit. None is 40 for the hosted API and
            no limit elsewhere.
        timeout: seconds of silence after which an attempt has failed.
        deadline: seconds that one call may take in all, with its waiting and its retries.
        status_url: where an answer is fetched that was not ready at once; None where a server has no such place.

    Raises:
        InvalidSetting: the address or the key cannot be right, or a limit is not above zero.
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
        for limit in ("batch_size", "concurrency", "rate", "timeout", "deadline"):
            if getattr(self, limit) <= 0:
                raise InvalidSetting(f"`{limit}` of the endpoint {self.url} must be more than 0")

    @property
    def host(self) -> str:
        """Name or address of the machine."""
        return httpx.URL(self.url).host

    @property
    def hosted(self) -> bool:
        """Whether this is NVIDIA's hosted API, which limits its callers and has no health route."""
        return self.host == httpx.URL(HOSTED_URL).host

    @property
    def rate(self) -> float:
        """Most requests in any 60 seconds."""
        if self.requests_per_minute is not None:
            return self.requests_per_minute
        return HOSTED_REQUESTS_PER_MINUTE if self.hosted else math.inf

    @property
    def ready_path(self) -> str | None:
        """A route that answers 200 when the endpoint is ready; None on the hosted API, which has none."""
        if self.hosted:
            return None
        return "/health/ready" if self.dialect == "nim" else "/models"

    @property
    def loopback(self) -> bool:
        """Whether the endpoint is on this machine."""
        return is_loopback(self.host)

    @property
    def headers(self) -> dict[str, str]:
        """What authorises a request to this endpoint."""
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key.get_secret_value()}"}

    def with_key_of_caller(self, key: SecretStr) -> Endpoint:
        """The same endpoint as it is asked in a caller's name."""
        return replace(self, api_key=key, key_name=f"the header {CALLER_KEY_HEADER}", for_caller=True)

    def redact(self, text: str) -> str:
        """The text without the key, should the endpoint have sent it back, and without any other of NVIDIA's kind."""
        if self.api_key is not None:
            text = text.replace(self.api_key.get_secret_value(), "***")
        return re.sub(r"nvapi-[\w-]+", "***", text)


_NO_ADDRESS = (
    "an endpoint's address must look like https://host or http://localhost:8000; what is given in its place is not "
    "repeated, since it may be a key"
)


def _checked_url(text: str, *, allow_http: bool) -> str:
    try:
        url = httpx.URL(text.strip())
    except (httpx.InvalidURL, UnicodeError):
        raise InvalidSetting(_NO_ADDRESS) from None
    if url.port is not None and not 0 < url.port < 65536:
        raise InvalidSetting(f"the endpoint at {url.host!r} must have a port from 1 to 65535, not {url.port}")
    if url.userinfo or url.query or url.fragment:
        # Not repeated: what stands there may be a key.
        raise InvalidSetting(
            f"the address of the endpoint at {url.host!r} must end with its path, and hold neither user name nor "
            "password: a key goes where the endpoint's `api_key_env` says"
        )
    if url.scheme not in {"http", "https"} or not url.host:
        raise InvalidSetting(_NO_ADDRESS)
    if url.scheme == "http" and not (allow_http or is_loopback(url.host)):
        raise InvalidSetting(
            f"the endpoint {text} must be reached over https, since texts and key would travel readable; if the "
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
        raise InvalidSetting(f"the key in {name} holds characters that no key has: copy it anew")
    return SecretStr(value)

"""The signing keys of an OAuth issuer: its JSON Web Key Set (JWKS, RFC 7517), fetched over HTTP and cached.

The keys are fetched when a token first needs them, and again when a token names an unknown key or they are older than
`MAX_AGE_SECONDS`; but at most once in `REFETCH_SECONDS`, since anybody can send a token that names an unknown key.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import anyio
import httpx
import jwt
import orjson

from embeddings_mcp import content_encoding
from embeddings_mcp.addresses import is_loopback
from embeddings_mcp.errors import InvalidSetting, IssuerUnavailable

logger = logging.getLogger(__name__)

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Accepted signature algorithms; asymmetric only, since with a shared secret this server could issue tokens too."""

REFETCH_SECONDS = 30.0
"""Minimum time between two fetches of the keys, also after a failed one."""

MAX_AGE_SECONDS = 3600.0
"""Age at which the keys are fetched again, so that a key that the issuer has revoked stops being accepted."""

_TIMEOUT_SECONDS = 10.0
"""Total timeout of one request to the issuer: a caller whose token names an unknown key waits for it."""

_MAX_RESPONSE_BYTES = 1 << 20
"""Largest response of the issuer that is read."""


@dataclass(frozen=True, slots=True, eq=False)
class SigningKey:
    """A key of the issuer.

    Attributes:
        kid: the key id; None where the key has none.
        public_key: verifies signatures.
        algorithms: the signature algorithms that the key may be used with.
    """

    kid: str | None
    public_key: Any
    algorithms: tuple[str, ...]

    @classmethod
    def from_jwk(cls, jwk: object) -> SigningKey | None:
        """Parse a JWK (RFC 7517); return None if it is malformed, or for none of `ALGORITHMS`."""
        if not isinstance(jwk, dict):
            return None
        try:
            key = jwt.PyJWK.from_dict(jwk)
        except (jwt.PyJWTError, AttributeError, KeyError, TypeError, ValueError):
            return None
        candidates = [key.algorithm_name]
        if key.key_type == "RSA" and "alg" not in jwk:  # where PyJWT assumes RS256
            candidates = [name for name in ALGORITHMS if name.startswith(("RS", "PS"))]
        algorithms = tuple(name for name in candidates if name in ALGORITHMS)
        return cls(key.key_id, key.key, algorithms) if algorithms else None


class JwksClient:
    """Fetches and caches the signing keys of one issuer.

    Args:
        issuer: its identifier, as it stands in the ``iss`` claim of its tokens.
        url: the same, normalized for use in requests.
    """

    def __init__(self, issuer: str, url: str) -> None:
        self._issuer = issuer
        self._url = url
        self._http = httpx.AsyncClient(timeout=_TIMEOUT_SECONDS)
        self._keys: Mapping[str | None, SigningKey] = {}
        self._attempted_at = -REFETCH_SECONDS
        self._fetched_at = -MAX_AGE_SECONDS
        self._failure: IssuerUnavailable | None = None
        self._lock = asyncio.Lock()  # held while fetching

    async def key(self, kid: str | None) -> SigningKey | None:
        """Return the key with this id, or None if there is none; `kid` may be None where the issuer has only one key.

        Raises:
            IssuerUnavailable: the key is unknown, and the last fetch failed.
        """
        if self._needs_fetch(kid) or (kid not in self._keys and self._lock.locked()):
            async with self._lock:  # single-flight: other callers wait for the fetch in progress
                if self._needs_fetch(kid):
                    await self._refresh()
        if kid not in self._keys and self._failure is not None:
            raise self._failure.with_traceback(None)  # or its traceback would grow with each raise
        return self._keys.get(kid)

    async def check(self) -> int:
        """Fetch the keys now, and return how many of them can verify tokens.

        Raises:
            IssuerUnavailable: they cannot be fetched, or none of them is usable.
            InvalidSetting: the issuer's identifier is not the one in the settings, so that none of its tokens would be
                accepted.
        """
        metadata = await self._fetch_metadata()
        if (name := metadata.get("issuer")) != self._issuer:
            raise InvalidSetting(
                f"EMBEDDINGS_MCP_OAUTH_ISSUER is {self._issuer!r}, and the issuer there calls itself {name!r}, as its "
                "tokens will"
            )
        keys = set((await self._fetch_keys(metadata)).values())
        if not keys:
            raise self._unavailable(f"none of its keys is for one of {', '.join(ALGORITHMS)}")
        return len(keys)

    async def aclose(self) -> None:
        """Close the connections to the issuer."""
        await self._http.aclose()

    def _needs_fetch(self, kid: str | None) -> bool:
        """Whether the key is unknown or too old, and the last attempt was long enough ago."""
        now = time.monotonic()
        outdated = kid not in self._keys or now - self._fetched_at > MAX_AGE_SECONDS
        return outdated and now - self._attempted_at >= REFETCH_SECONDS

    async def _refresh(self) -> None:
        """Fetch the keys; if that fails, keep the known ones."""
        self._attempted_at = time.monotonic()
        try:
            self._keys = await self._fetch_keys(await self._fetch_metadata())
        except IssuerUnavailable as error:
            logger.warning("%s", error.message)
            self._failure = error
        else:
            self._fetched_at, self._failure = self._attempted_at, None

    async def _fetch_keys(self, metadata: Mapping[str, Any]) -> Mapping[str | None, SigningKey]:
        """The issuer's usable keys by their ids; an only key also by None."""
        jwks = await self._get(str(metadata.get("jwks_uri", "")))
        listed = jwks.get("keys")
        if not isinstance(listed, list) or not listed:
            raise self._unavailable("its JWKS lists nothing in `keys`")
        keys: dict[str | None, SigningKey] = {
            key.kid: key for key in map(SigningKey.from_jwk, listed) if key is not None
        }
        return keys | {None: next(iter(keys.values()))} if len(keys) == 1 else keys

    async def _fetch_metadata(self) -> dict[str, Any]:
        """The issuer's metadata: that of OAuth (RFC 8414) or else of OpenID Connect Discovery."""
        issuer_url = urlsplit(self._url)
        host, path = f"{issuer_url.scheme}://{issuer_url.netloc}", issuer_url.path.rstrip("/")
        try:
            return await self._get(f"{host}/.well-known/oauth-authorization-server{path}")
        except IssuerUnavailable:
            return await self._get(f"{host}{path}/.well-known/openid-configuration")

    async def _get(self, url: str) -> dict[str, Any]:
        """Fetch a JSON object from the issuer, without following redirects."""
        headers = {"Accept": "application/json", "Accept-Encoding": content_encoding.ACCEPT_ENCODING}
        try:
            if urlsplit(url).scheme != "https" and not is_loopback(urlsplit(url).hostname or ""):
                raise self._unavailable(f"it refers to {url[:200]!r}, which is not https")
            with anyio.fail_after(_TIMEOUT_SECONDS):
                async with self._http.stream("GET", url, headers=headers) as response:
                    if response.status_code != HTTPStatus.OK:
                        raise self._unavailable(f"{url} responds with {response.status_code}")
                    if not content_encoding.is_accepted(response.headers):
                        encoding = response.headers["Content-Encoding"][:100]
                        raise self._unavailable(
                            f"{url} responds with the Content-Encoding {encoding!r}, which was not asked for"
                        )
                    body = bytearray()
                    async for chunk in response.aiter_bytes():
                        body += chunk
                        if len(body) > _MAX_RESPONSE_BYTES:
                            raise self._unavailable(f"{url} responds with more than {_MAX_RESPONSE_BYTES:,} bytes")
            value = orjson.loads(body)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, TimeoutError) as error:
            raise self._unavailable(f"{url[:200]} cannot be read: {type(error).__name__} {error}") from error
        if not isinstance(value, dict):
            raise self._unavailable(f"{url} does not respond with a JSON object")
        return value

    def _unavailable(self, reason: str) -> IssuerUnavailable:
        return IssuerUnavailable(
            f"access tokens cannot be verified, since the keys of their issuer {self._issuer} are not available: "
            f"{reason}",
            retry_after=REFETCH_SECONDS,
        )

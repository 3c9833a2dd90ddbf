"""OAuth access tokens that open the server over HTTP: JWTs of one issuer, made out to this server.

The server is a resource server (RFC 9728): it makes no tokens, and checks those that it is shown against the keys that
their issuer publishes. Those are asked for when a token first needs them, and again when one names a key that is not
among them; but at most once in `PAUSE_SECONDS`, since anybody can name a key.
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
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.routes import build_resource_metadata_url, create_protected_resource_routes
from pydantic import AnyHttpUrl, ConfigDict, TypeAdapter, ValidationError
from starlette.routing import Route

from embeddings_mcp.addresses import is_loopback
from embeddings_mcp.errors import InvalidSetting, IssuerUnavailable
from embeddings_mcp.settings import Settings

logger = logging.getLogger(__name__)

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Signatures with a key pair only: a secret that the issuer shared with us could make tokens too."""

PAUSE_SECONDS = 30.0
"""Between two looks at the issuer's keys, also where the first one failed."""

FRESH_SECONDS = 3600.0
"""After which the keys are asked for anew, so that one that the issuer has withdrawn opens nothing any more."""

_LEEWAY_SECONDS = 30
"""By which the clocks of the issuer and of this machine may differ."""

_TIMEOUT_SECONDS = 10.0
"""Longest that an answer of the issuer may take in all: who shows a token with a new key waits for it."""

_MOST_BYTES = 1 << 20
"""Largest answer of an issuer that is read."""

_ADDRESS = TypeAdapter(AnyHttpUrl, config=ConfigDict(url_preserve_empty_path=True))
"""An address as it was written: issuers are compared letter by letter, and a slash more is another one."""


@dataclass(frozen=True, slots=True, eq=False)
class _IssuerKey:
    """A key that the issuer publishes.

    Attributes:
        name: its id; None where it has none.
        public: what signatures are checked with.
        algorithms: of the signatures that it makes.
    """

    name: str | None
    public: Any
    algorithms: tuple[str, ...]

    @classmethod
    def read(cls, described: object) -> _IssuerKey | None:
        """The key that a JWK describes (RFC 7517); None where it is broken, or for signatures that are not checked."""
        if not isinstance(described, dict):
            return None
        try:
            key = jwt.PyJWK.from_dict(described)
        except (jwt.PyJWTError, AttributeError, KeyError, TypeError, ValueError):
            return None
        possible = [key.algorithm_name]
        if key.key_type == "RSA" and "alg" not in described:  # PyJWT takes RS256 for granted then
            possible = [name for name in ALGORITHMS if name.startswith(("RS", "PS"))]
        algorithms = tuple(name for name in possible if name in ALGORITHMS)
        return cls(key.key_id, key.key, algorithms) if algorithms else None


class TokenVerifier:
    """Checks access tokens; it is one in the sense of `mcp.server.auth.provider.TokenVerifier`.

    Args:
        issuer: the authorization server, as its tokens name it in ``iss``.
        resource: this server, as tokens name it in ``aud``: the address of its MCP route.
        scopes: what a token must allow.

    Attributes:
        scopes: as given.
        metadata_url: where callers find out which issuer to ask for a token (RFC 9728).

    Raises:
        InvalidSetting: an address cannot be right.
    """

    def __init__(self, issuer: str, resource: str, scopes: tuple[str, ...] = ()) -> None:
        self._issuer = issuer
        self._issuer_url = _checked(issuer, "EMBEDDINGS_MCP_OAUTH_ISSUER")
        self._resource = resource
        self._resource_url = _checked(resource, "EMBEDDINGS_MCP_OAUTH_RESOURCE")
        self._http = httpx.AsyncClient(timeout=_TIMEOUT_SECONDS)
        self._keys: Mapping[str | None, _IssuerKey] = {}
        self._asked = -PAUSE_SECONDS
        self._got = -FRESH_SECONDS
        self._failure: IssuerUnavailable | None = None
        self._asking = asyncio.Lock()
        self.scopes = scopes
        self.metadata_url = str(build_resource_metadata_url(self._resource_url))

    @classmethod
    def of(cls, settings: Settings) -> TokenVerifier | None:
        """That of the settings; None where they name no issuer.

        Raises:
            InvalidSetting: they name an issuer and not what its tokens are for, or the other way round.
        """
        if settings.oauth_issuer is None and settings.oauth_resource is None:
            return None
        if settings.oauth_issuer is None or settings.oauth_resource is None:
            raise InvalidSetting(
                "EMBEDDINGS_MCP_OAUTH_ISSUER and EMBEDDINGS_MCP_OAUTH_RESOURCE go together: set both, or neither"
            )
        return cls(settings.oauth_issuer, settings.oauth_resource, settings.oauth_scopes)

    def routes(self) -> list[Route]:
        """What tells callers which issuer to ask (RFC 9728)."""
        return create_protected_resource_routes(
            self._resource_url, [self._issuer_url], list(self.scopes) or None, "embeddings-mcp"
        )

    async def verify_token(self, token: str) -> AccessToken | None:
        """What a token says; None where it is none of this issuer's, is not made out to this server, or has run out.

        Raises:
            IssuerUnavailable: its keys cannot be had, so nobody knows.
        """
        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError:
            return None
        if header.get("alg") not in ALGORITHMS:
            return None  # and the issuer is not asked
        key = await self._key(header.get("kid"))
        if key is None or header["alg"] not in key.algorithms:
            return None
        try:
            claims = jwt.decode(
                token,
                key.public,
                algorithms=[header["alg"]],
                audience=self._resource,
                issuer=self._issuer,
                leeway=_LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud"]},
            )
        except jwt.PyJWTError:
            return None
        return _access(token, claims, self._resource)

    async def check(self) -> int:
        """Ask the issuer now; how many keys it publishes that tokens are checked against.

        Raises:
            IssuerUnavailable: it does not say, or none of its keys is of use.
            InvalidSetting: it has another name than the setting, and so no token of it would open anything.
        """
        described = await self._description()
        if (name := described.get("issuer")) != self._issuer:
            raise InvalidSetting(
                f"EMBEDDINGS_MCP_OAUTH_ISSUER is {self._issuer!r}, and the issuer there calls itself {name!r}, as its "
                "tokens will"
            )
        keys = set((await self._keys_of(described)).values())
        if not keys:
            raise self._unavailable(f"none of its keys is for one of {', '.join(ALGORITHMS)}")
        return len(keys)

    async def aclose(self) -> None:
        """Close the connections to the issuer."""
        await self._http.aclose()

    async def _key(self, name: str | None) -> _IssuerKey | None:
        """The issuer's key of this name; where it has only one, a token need not name it."""
        if self._stale(name) or (name not in self._keys and self._asking.locked()):
            async with self._asking:  # or wait for the answer that another token needed
                if self._stale(name):
                    await self._refresh()
        if name not in self._keys and self._failure is not None:
            raise self._failure.with_traceback(None)  # which would grow with each raise
        return self._keys.get(name)

    def _stale(self, name: str | None) -> bool:
        """Whether the issuer is to be asked before a key of this name is believed, or believed not to be."""
        now = time.monotonic()
        return (name not in self._keys or now - self._got > FRESH_SECONDS) and now - self._asked >= PAUSE_SECONDS

    async def _refresh(self) -> None:
        """Ask for the keys; those known stay where that fails."""
        self._asked = time.monotonic()
        try:
            self._keys, self._got, self._failure = await self._keys_of(await self._description()), self._asked, None
        except IssuerUnavailable as error:
            logger.warning("%s", error.message)
            self._failure = error

    async def _keys_of(self, described: Mapping[str, Any]) -> Mapping[str | None, _IssuerKey]:
        """The issuer's keys by their names; its only one by None too."""
        published = await self._get(str(described.get("jwks_uri", "")))
        listed = published.get("keys")
        if not isinstance(listed, list) or not listed:
            raise self._unavailable("its keys cannot be read: there are none in `keys`")
        keys: dict[str | None, _IssuerKey] = {key.name: key for key in map(_IssuerKey.read, listed) if key is not None}
        return keys | {None: next(iter(keys.values()))} if len(keys) == 1 else keys

    async def _description(self) -> dict[str, Any]:
        """What the issuer says of itself."""
        address = urlsplit(str(self._issuer_url))
        host, path = f"{address.scheme}://{address.netloc}", address.path.rstrip("/")
        try:
            return await self._get(f"{host}/.well-known/oauth-authorization-server{path}")  # RFC 8414
        except IssuerUnavailable:
            return await self._get(f"{host}{path}/.well-known/openid-configuration")  # OpenID Connect Discovery

    async def _get(self, url: str) -> dict[str, Any]:
        """The JSON object at an address of the issuer; no redirect is followed."""
        try:
            if urlsplit(url).scheme != "https" and not is_loopback(urlsplit(url).hostname or ""):
                raise self._unavailable(f"it refers to {url[:200]!r}, which is not https")
            with anyio.fail_after(_TIMEOUT_SECONDS):
                async with self._http.stream("GET", url, headers={"Accept": "application/json"}) as response:
                    if response.status_code != HTTPStatus.OK:
                        raise self._unavailable(f"{url} answers {response.status_code}")
                    body = bytearray()
                    async for piece in response.aiter_bytes():
                        body += piece
                        if len(body) > _MOST_BYTES:
                            raise self._unavailable(f"{url} answers with more than {_MOST_BYTES:,} bytes")
            value = orjson.loads(body)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, TimeoutError) as error:
            raise self._unavailable(f"{url[:200]} cannot be read: {type(error).__name__} {error}") from error
        if not isinstance(value, dict):
            raise self._unavailable(f"{url} answers with something that is no JSON object")
        return value

    def _unavailable(self, reason: str) -> IssuerUnavailable:
        return IssuerUnavailable(
            f"whether an access token is good cannot be told, since its issuer {self._issuer} does not say: {reason}",
            retry_after=PAUSE_SECONDS,
        )


def _checked(address: str, setting: str) -> AnyHttpUrl:
    try:
        url = _ADDRESS.validate_python(address)
    except ValidationError:
        url = None
    if url is None or not (url.scheme == "https" or is_loopback((url.host or "").strip("[]"))):
        raise InvalidSetting(f"{setting} must be an https address, as in https://host/path, not {address[:200]!r}")
    return url


def _access(token: str, claims: Mapping[str, Any], resource: str) -> AccessToken:
    """The claims in the SDK's words."""
    scopes = claims.get("scope", claims.get("scp"))
    if isinstance(scopes, str):
        scopes = scopes.split()
    subject = claims.get("sub")
    client = claims.get("client_id") or claims.get("azp") or subject or ""
    return AccessToken(
        token=token,
        client_id=str(client),
        scopes=[str(scope) for scope in scopes] if isinstance(scopes, list) else [],
        expires_at=int(claims["exp"]),
        resource=resource,
        subject=None if subject is None else str(subject),
        claims={"iss": claims["iss"]},
    )

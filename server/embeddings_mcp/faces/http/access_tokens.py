"""Verification of OAuth access tokens: JWTs of one issuer, whose audience is this server.

The server is a resource server (RFC 9728): it issues no tokens, and verifies those it receives with the keys that
their issuer publishes (see `jwks`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jwt
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.routes import build_resource_metadata_url, create_protected_resource_routes
from pydantic import AnyHttpUrl, ConfigDict, TypeAdapter, ValidationError
from starlette.routing import Route

from embeddings_mcp.addresses import is_loopback
from embeddings_mcp.errors import InvalidSetting
from embeddings_mcp.faces.http.jwks import ALGORITHMS, JwksClient
from embeddings_mcp.settings import Settings

_LEEWAY_SECONDS = 30
"""Allowed clock skew between the issuer and this machine."""

_URL = TypeAdapter(AnyHttpUrl, config=ConfigDict(url_preserve_empty_path=True))
"""Keeps an empty path empty: issuers are compared character by character, and a trailing slash makes another one."""


class TokenVerifier:
    """Verifies access tokens; implements the protocol `mcp.server.auth.provider.TokenVerifier`.

    Args:
        issuer: the authorization server, as it stands in the ``iss`` claim.
        resource: this server, as it stands in the ``aud`` claim: the URL of its MCP route.
        scopes: the scopes that a token must have.

    Attributes:
        scopes: as given.
        metadata_url: where callers find out which issuer to ask for a token (RFC 9728).

    Raises:
        InvalidSetting: `issuer` or `resource` is not an https URL.
    """

    def __init__(self, issuer: str, resource: str, scopes: tuple[str, ...] = ()) -> None:
        self._issuer = issuer
        self._issuer_url = _https_url(issuer, "EMBEDDINGS_MCP_OAUTH_ISSUER")
        self._resource = resource
        self._resource_url = _https_url(resource, "EMBEDDINGS_MCP_OAUTH_RESOURCE")
        self._jwks = JwksClient(issuer, str(self._issuer_url))
        self.scopes = scopes
        self.metadata_url = str(build_resource_metadata_url(self._resource_url))

    @classmethod
    def from_settings(cls, settings: Settings) -> TokenVerifier | None:
        """Build the verifier that the settings describe; return None where they name no issuer.

        Raises:
            InvalidSetting: they name an issuer without a resource, or a resource without an issuer.
        """
        if settings.oauth_issuer is None and settings.oauth_resource is None:
            return None
        if settings.oauth_issuer is None or settings.oauth_resource is None:
            raise InvalidSetting(
                "EMBEDDINGS_MCP_OAUTH_ISSUER and EMBEDDINGS_MCP_OAUTH_RESOURCE go together: set both, or neither"
            )
        return cls(settings.oauth_issuer, settings.oauth_resource, settings.oauth_scopes)

    def routes(self) -> list[Route]:
        """The protected resource metadata, which tells callers which issuer to ask (RFC 9728)."""
        return create_protected_resource_routes(
            self._resource_url, [self._issuer_url], list(self.scopes) or None, "embeddings-mcp"
        )

    async def verify_token(self, token: str) -> AccessToken | None:
        """Return the claims of a token, or None if it is invalid, expired, or of another issuer or audience.

        Raises:
            IssuerUnavailable: the issuer's keys cannot be fetched, so the token cannot be verified.
        """
        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError:
            return None
        if header.get("alg") not in ALGORITHMS:
            return None  # without a request to the issuer
        key = await self._jwks.key(header.get("kid"))
        if key is None or header["alg"] not in key.algorithms:
            return None
        try:
            claims = jwt.decode(
                token,
                key.public_key,
                algorithms=[header["alg"]],
                audience=self._resource,
                issuer=self._issuer,
                leeway=_LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud"]},
            )
        except jwt.PyJWTError:
            return None
        return _access_token(token, claims, self._resource)

    async def check(self) -> int:
        """Fetch the issuer's keys now, and return how many of them can verify tokens.

        Raises:
            IssuerUnavailable: they cannot be fetched, or none of them is usable.
            InvalidSetting: the issuer's identifier is not the one in the settings, so that none of its tokens would be
                accepted.
        """
        return await self._jwks.check()

    async def aclose(self) -> None:
        """Close the connections to the issuer."""
        await self._jwks.aclose()


def _https_url(text: str, setting: str) -> AnyHttpUrl:
    """Parse the URL in a setting, which must be https, except on loopback."""
    try:
        url = _URL.validate_python(text)
    except ValidationError:
        url = None
    if url is None or not (url.scheme == "https" or is_loopback((url.host or "").strip("[]"))):
        raise InvalidSetting(f"{setting} must be an https URL, as in https://host/path, not {text[:200]!r}")
    return url


def _access_token(token: str, claims: Mapping[str, Any], resource: str) -> AccessToken:
    """The claims as the MCP SDK's type."""
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

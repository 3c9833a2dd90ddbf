"""Access control for every HTTP request: Host, Origin, authentication, rate limit, admission and size.

Listening on loopback keeps other machines out, but not the web pages in this machine's browser: a page can post to
``http://localhost`` at will, and by DNS rebinding reach 127.0.0.1 under a host name of its own. So Host, which a
browser always sends, must name this server, and so must Origin where it is sent. Only this module checks them: the MCP
SDK's own check knows neither the settings nor the other routes, and is disabled.
"""

from __future__ import annotations

import contextlib
import math
import re
from http import HTTPStatus
from urllib.parse import urlsplit

from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from pydantic import SecretStr
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from embeddings_mcp import paths
from embeddings_mcp.addresses import is_loopback, numeric_address
from embeddings_mcp.caller import CALLER_KEY_HEADER, with_caller_key, with_caller_name
from embeddings_mcp.errors import (
    AuthenticationFailed,
    EmbeddingsError,
    InsufficientScope,
    InvalidRequest,
    InvalidSetting,
    RateLimited,
)
from embeddings_mcp.faces.http.access_tokens import TokenVerifier
from embeddings_mcp.faces.http.api_keys import Keyring
from embeddings_mcp.faces.http.in_flight import InFlightLimiter
from embeddings_mcp.faces.http.rate_limit import RateLimiter
from embeddings_mcp.faces.http.rest import error_response, http_error_response
from embeddings_mcp.faces.http.scope import client_address, header_values
from embeddings_mcp.settings import Settings

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_PATHS = {"health": frozenset({paths.LIVE, paths.READY}), "metrics": frozenset({paths.METRICS})}
_CALLER_KEY = CALLER_KEY_HEADER.lower().encode()
_AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s:/?#@\[\]]+))(?::[0-9]*)?", re.IGNORECASE)


class Guard:
    """ASGI middleware that refuses requests which may not reach the application.

    Args:
        app: the application.
        settings: the host and its names, keys, routes without a key, rate limit, limits of requests in flight, and
            whether any endpoint takes ``caller_keys``.
        token_verifier: verifies access tokens, where an issuer is configured.

    Raises:
        InvalidSetting: the server would be open to other machines without a key.
    """

    def __init__(self, app: ASGIApp, settings: Settings, token_verifier: TokenVerifier | None = None) -> None:
        self._token_verifier = token_verifier
        self._keys = Keyring(settings)
        if not (self._keys.in_use or token_verifier or settings.allow_keyless or is_loopback(settings.host)):
            raise InvalidSetting(
                f"every machine that reaches {settings.host} could use this server: set an API key "
                "(EMBEDDINGS_MCP_API_KEY) or an issuer of access tokens (EMBEDDINGS_MCP_OAUTH_ISSUER), listen on "
                "127.0.0.1, or say that this is what you want (EMBEDDINGS_MCP_ALLOW_KEYLESS=true)"
            )
        self._app = app
        self._keyless_paths = frozenset[str]().union(*(_PATHS[name] for name in settings.without_key))
        if token_verifier is not None:
            self._keyless_paths |= {urlsplit(token_verifier.metadata_url).path}
        self._origins = frozenset(settings.cors_origins)
        rate = settings.requests_per_minute
        self._rate_limiter = None if rate is None else RateLimiter(rate)
        self._in_flight = InFlightLimiter(settings)
        self._hosts = _LOOPBACK_NAMES | {
            _host_in(host) or host.lower() for host in (settings.host, *settings.allowed_hosts)
        }
        self._takes_caller_keys = any(endpoint.caller_keys for endpoint in settings.endpoints)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on to the application, or respond with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_post = scope["method"] == "POST"
        keyless = scope["path"] in self._keyless_paths
        try:
            caller = await self._check_head(scope)
            name = None if caller is None else _name_of(caller)
            if is_post:
                receive = await self._in_flight.admit(scope, receive, name)
            # Routes without a key have no rate limit: others at the same address could use it up, and a health probe
            # would then fail.
            if not keyless:
                self._check_rate(client_address(scope) if name is None else name)
        except EmbeddingsError as error:
            await error_response(error)(scope, receive, send)
            return
        except HTTPException as error:
            await http_error_response(error.status_code, error.detail, error.headers)(scope, receive, send)
            return
        if header_values(scope, b"x-forwarded-proto") == ["https"]:
            # Set by a TLS-terminating proxy: URLs in responses must have its scheme. This is the only header of a proxy
            # that is trusted, since a client that forges it only gets URLs that do not work for it.
            scope["scheme"] = "https"
        with contextlib.ExitStack() as stack:
            if caller is not None:
                # By this, the MCP SDK restricts a session to the user who opened it.
                scope["user"] = AuthenticatedUser(caller)
                stack.enter_context(with_caller_name(_name_of(caller)))
            # Ignored on routes without authentication: a readiness probe sends a request to the endpoint, so anybody
            # could use one to test stolen keys.
            if not keyless and (keys := header_values(scope, _CALLER_KEY)):
                stack.enter_context(with_caller_key(SecretStr(keys[0])))
            # A GET is not counted: on the MCP route it is a stream of server messages, open while the client stays.
            if is_post:
                receive = stack.enter_context(self._in_flight.track(receive))
            await self._app(scope, receive, send)

    async def _check_head(self, scope: Scope) -> AccessToken | None:
        """Check everything in a request's head, and return its caller; None where no authentication is required.

        Raises:
            HTTPException: the head is ambiguous, names another host, or has a foreign Origin.
            EmbeddingsError: the caller is not authenticated, a header is invalid, or the body is too large.
        """
        if header_values(scope, b"content-length") and header_values(scope, b"transfer-encoding"):
            # Request smuggling (RFC 9112, section 11.2): if a proxy uses one of these headers and this server the
            # other, a part of the body for the proxy is another request here, which the proxy has not checked.
            raise HTTPException(
                HTTPStatus.BAD_REQUEST,
                "a request has either a Content-Length or a Transfer-Encoding, not both",
                {"Connection": "close"},
            )
        self._check_host_and_origin(scope)
        if scope["path"] in self._keyless_paths:
            return None
        caller = await self._authenticate(scope)
        self._check_caller_key(scope)
        self._in_flight.check_length(scope)
        return caller

    def _check_rate(self, caller: str) -> None:
        """Enforce the rate limit.

        Raises:
            RateLimited: the caller has exceeded it.
        """
        if self._rate_limiter is not None and (retry_after := self._rate_limiter.retry_after(caller)):
            raise RateLimited(
                f"too many requests in a minute from one caller: try again in {math.ceil(retry_after)} s, or send more "
                "texts in one request",
                retry_after=retry_after,
            )

    def _check_host_and_origin(self, scope: Scope) -> None:
        """Refuse a request that is addressed to another host, or sent by a page of another origin."""
        hosts = header_values(scope, b"host")
        # Probes over HTTP/1.0 send no Host; a browser always does, so without one there is no page to protect against.
        if hosts and not self._is_own_host(", ".join(hosts), scope):
            raise HTTPException(
                HTTPStatus.MISDIRECTED_REQUEST,
                f"{', '.join(hosts)[:100]!r} is not a name of this server; if it should be, ask the server's operator "
                "to add it to the allowed hosts (EMBEDDINGS_MCP_ALLOWED_HOSTS)",
            )
        for origin in header_values(scope, b"origin"):
            scheme, _, authority = origin.partition("://")
            same_host = scheme in {"http", "https"} and self._is_own_host(authority, scope)
            if not same_host and origin.lower() not in self._origins:
                raise HTTPException(
                    HTTPStatus.FORBIDDEN,
                    f"pages of {origin[:100]!r} may not use this server; if they should, ask the server's operator to "
                    "add the origin to EMBEDDINGS_MCP_CORS_ORIGINS or, where its host is a name of this server, that "
                    "name to the allowed hosts (EMBEDDINGS_MCP_ALLOWED_HOSTS)",
                )

    def _is_own_host(self, authority: str, scope: Scope) -> bool:
        """Whether this ``host:port`` names this server.

        The numeric address that the connection was made to always does: DNS rebinding needs a name, and the addresses
        of a server that listens on all of them (0.0.0.0) cannot be listed in the settings.
        """
        host = _host_in(authority)
        if host is None:
            return False
        server = scope.get("server")
        is_server_address = server is not None and host == server[0] and numeric_address(host) is not None
        return is_server_address or host in self._hosts

    async def _authenticate(self, scope: Scope) -> AccessToken | None:
        """Return the owner of the request's API key or access token; None where neither is required.

        Raises:
            AuthenticationFailed: it has neither a known key nor a valid token.
            InsufficientScope: its token lacks a required scope.
            IssuerUnavailable: its token cannot be verified.
        """
        if not self._keys.in_use and self._token_verifier is None:
            return None
        values = header_values(scope, b"authorization")
        scheme, _, credential = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        credential = credential.strip() if scheme.lower() == "bearer" else ""
        if credential and (owner := self._keys.owner(credential.encode("latin-1"))) is not None:
            return AccessToken(token="", client_id=owner, scopes=[])
        if self._token_verifier is None:
            raise AuthenticationFailed(
                "this server requires its API key, in the header `Authorization: Bearer KEY`; it is missing or wrong"
            )
        challenge = f'Bearer resource_metadata="{self._token_verifier.metadata_url}"'
        token = await self._token_verifier.verify_token(credential) if credential else None
        if token is None:
            raise AuthenticationFailed(
                "this server requires an access token, in the header `Authorization: Bearer TOKEN`; it is missing, "
                f"expired or not for this server. {self._token_verifier.metadata_url} names the issuer to get one from",
                challenge=f'{challenge}, error="invalid_token"' if credential else challenge,
            )
        if missing := [name for name in self._token_verifier.scopes if name not in token.scopes]:
            required = " ".join(self._token_verifier.scopes)
            raise InsufficientScope(
                f"the access token lacks the scope {' '.join(missing)}: ask its issuer for one with `scope` "
                f"{required!r}",
                challenge=f'{challenge}, error="insufficient_scope", scope="{required}"',
            )
        return token

    def _check_caller_key(self, scope: Scope) -> None:
        """Check the caller's own key for an endpoint, if the request has one; errors do not quote it.

        Raises:
            InvalidRequest: no endpoint takes callers' keys, or the header is malformed.
        """
        keys = header_values(scope, _CALLER_KEY)
        if not keys:
            return
        if not self._takes_caller_keys:
            raise InvalidRequest(
                f"this server takes no keys of its callers: leave the header {CALLER_KEY_HEADER} out, or ask the "
                "server's operator to set `caller_keys` for the endpoint that the key is for"
            )
        (key, *others) = keys
        if others or not (key.isascii() and key.isprintable() and key) or " " in key:
            raise InvalidRequest(
                f"the header {CALLER_KEY_HEADER} must hold one key, without characters that no key has: copy it again"
            )


def _name_of(caller: AccessToken) -> str:
    """The caller's identity: the subject of a token (its client where it has no subject), or the name of an API key."""
    return caller.subject or caller.client_id


def _host_in(authority: str) -> str | None:
    """The host in ``host:port``, ``host`` or ``[ipv6]:port``, in lower case; None if it has none of these forms."""
    match = _AUTHORITY.fullmatch(authority)
    return (match[1] or match[2]).lower() if match else None

"""What every HTTP request must pass before any route sees it: host, origin, key or token, pace, room and size.

Listening on loopback keeps other machines out, but not the web pages in this machine's browser: a page can post to
``http://localhost`` as it likes, and by DNS rebinding reach 127.0.0.1 under a name of its own. So Host, which a browser
always sends, must name this server, and so must Origin where it sends one. This is the only place that checks it: the
MCP SDK's own check knows neither our settings nor our other routes, and is switched off.
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
from embeddings_mcp.faces.http.in_flight import InFlightLimiter, address_of, values_of
from embeddings_mcp.faces.http.rate_limit import RateLimiter
from embeddings_mcp.faces.http.rest import error_response, http_error_response
from embeddings_mcp.settings import Settings

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_PATHS = {"health": frozenset({paths.LIVE, paths.READY}), "metrics": frozenset({paths.METRICS})}
_CALLER_KEY = CALLER_KEY_HEADER.lower().encode()
_AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s:/?#@\[\]]+))(?::[0-9]*)?", re.IGNORECASE)


class Guard:
    """An ASGI application that lets through to another only the requests that may pass.

    Args:
        app: what lies behind.
        settings: the host and its names, keys, routes that need none, limits of what is in flight, and whether an
            endpoint has ``caller_keys``.
        tokens: checks access tokens, where there is an issuer of them.

    Raises:
        InvalidSetting: the server would be open to other machines without a key.
    """

    def __init__(self, app: ASGIApp, settings: Settings, tokens: TokenVerifier | None = None) -> None:
        self._tokens = tokens
        self._keys = Keyring(settings)
        if not (self._keys.in_use or tokens or settings.allow_keyless or is_loopback(settings.host)):
            raise InvalidSetting(
                f"every machine that reaches {settings.host} could use this server: set an API key "
                "(EMBEDDINGS_MCP_API_KEY) or an issuer of access tokens (EMBEDDINGS_MCP_OAUTH_ISSUER), listen on "
                "127.0.0.1, or say that this is what you want (EMBEDDINGS_MCP_ALLOW_KEYLESS=true)"
            )
        self._app = app
        self._keyless_paths = frozenset[str]().union(*(_PATHS[name] for name in settings.without_key))
        if tokens is not None:
            self._keyless_paths |= {urlsplit(tokens.metadata_url).path}
        self._origins = frozenset(settings.cors_origins)
        self._rate = None if settings.requests_per_minute is None else RateLimiter(settings.requests_per_minute)
        self._room = InFlightLimiter(settings)
        self._names = _LOOPBACK_NAMES | {
            _name(host) or host.lower() for host in (settings.host, *settings.allowed_hosts)
        }
        self._takes_caller_keys = any(endpoint.caller_keys for endpoint in settings.endpoints)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request in place of the application behind, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        posts = scope["method"] == "POST"
        try:
            caller = await self._admit(scope)
            if posts:
                receive = await self._room.admit(scope, receive, None if caller is None else _called(caller))
            # Whoever watches the server shares no pace with strangers, who could have it taken for dead.
            if scope["path"] not in self._keyless_paths:
                self._check_pace(address_of(scope) if caller is None else _called(caller))
        except EmbeddingsError as error:
            await error_response(error)(scope, receive, send)
            return
        except HTTPException as error:
            await http_error_response(error.status_code, error.detail, error.headers)(scope, receive, send)
            return
        if values_of(scope, b"x-forwarded-proto") == ["https"]:
            # By a proxy with TLS before us: addresses in our answers are for its callers. Of all that proxies say this
            # alone is believed, since whoever makes it up only gets addresses that are of no use to him.
            scope["scheme"] = "https"
        with contextlib.ExitStack() as stack:
            if caller is not None:
                # By this the MCP SDK sees to it that a session is its owner's only.
                scope["user"] = AuthenticatedUser(caller)
                stack.enter_context(with_caller_name(_called(caller)))
            # Whoever is asked for no key could try out those of others otherwise: a probe asks the endpoint, too.
            if scope["path"] not in self._keyless_paths and (keys := values_of(scope, _CALLER_KEY)):
                stack.enter_context(with_caller_key(SecretStr(keys[0])))
            # A GET of MCP is a stream of what the server has to say, for as long as the client stays.
            if posts:
                receive = stack.enter_context(self._room.in_flight(receive))
            await self._app(scope, receive, send)

    async def _admit(self, scope: Scope) -> AccessToken | None:
        """Who sent a request that may pass; None where nobody is asked.

        Raises:
            HTTPException: it is addressed to another server, or comes from a foreign page.
            EmbeddingsError: it shows no key and no token, has a header that cannot be, or is too large.
        """
        if values_of(scope, b"content-length") and values_of(scope, b"transfer-encoding"):
            # A proxy before us may have believed the other one of the two: what it took for a body would be a request
            # to us, which it never checked (RFC 9112, section 11.2).
            raise HTTPException(
                HTTPStatus.BAD_REQUEST,
                "a request has either a Content-Length or a Transfer-Encoding, not both",
                {"Connection": "close"},
            )
        self._check_address(scope)
        if scope["path"] in self._keyless_paths:
            return None
        caller = await self._caller(scope)
        if (keys := values_of(scope, _CALLER_KEY)) and (problem := self._problem_of(keys)):
            raise InvalidRequest(problem)
        self._room.check_length(scope)
        return caller

    def _check_pace(self, caller: str) -> None:
        """Refuse what a caller sends beyond his number of requests in a minute.

        Raises:
            RateLimited: this is one too many.
        """
        if self._rate is not None and (wait := self._rate.wait(caller)):
            raise RateLimited(
                "so many requests in a minute are more than this server takes from one caller: try again in "
                f"{math.ceil(wait)} s, or send more texts in one request",
                retry_after=wait,
            )

    def _check_address(self, scope: Scope) -> None:
        """Refuse what is addressed to another server, or sent by a foreign page."""
        hosts = values_of(scope, b"host")
        # Probes in HTTP/1.0 send none; and whatever sends none is no browser, so there is no page behind it.
        if hosts and not self._is_ours(", ".join(hosts), scope):
            raise HTTPException(
                HTTPStatus.MISDIRECTED_REQUEST,
                f"this server is not called {', '.join(hosts)[:100]!r}; if it should be, have whoever runs it add that "
                "name to its allowed hosts (EMBEDDINGS_MCP_ALLOWED_HOSTS)",
            )
        for origin in values_of(scope, b"origin"):
            scheme, _, authority = origin.partition("://")
            ours = scheme in {"http", "https"} and self._is_ours(authority, scope)
            if not ours and origin.lower() not in self._origins:
                raise HTTPException(
                    HTTPStatus.FORBIDDEN,
                    f"pages of {origin[:100]!r} may not use this server; if they should, have whoever runs it add the "
                    "origin to EMBEDDINGS_MCP_CORS_ORIGINS or, where it is a name of this server's own, to its allowed "
                    "hosts (EMBEDDINGS_MCP_ALLOWED_HOSTS)",
                )

    def _is_ours(self, authority: str, scope: Scope) -> bool:
        """Whether this ``host:port`` names this server.

        The numeric address that the connection came in on always does: rebinding takes a name, and of a server that
        listens on all addresses (0.0.0.0) nobody could list them.
        """
        name = _name(authority)
        if name is None:
            return False
        server = scope.get("server")
        reached = server is not None and name == server[0] and numeric_address(name) is not None
        return reached or name in self._names

    async def _caller(self, scope: Scope) -> AccessToken | None:
        """Whose key or token the request shows; None where none is asked for."""
        if not self._keys.in_use and self._tokens is None:
            return None
        values = values_of(scope, b"authorization")
        scheme, _, shown = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        shown = shown.strip() if scheme.lower() == "bearer" else ""
        if shown and (owner := self._keys.owner(shown.encode("latin-1"))) is not None:
            return AccessToken(token="", client_id=owner, scopes=[])
        if self._tokens is None:
            raise AuthenticationFailed(
                "this server asks for its API key, in the header `Authorization: Bearer KEY`; there was none, or "
                "another one"
            )
        challenge = f'Bearer resource_metadata="{self._tokens.metadata_url}"'
        access = await self._tokens.verify_token(shown) if shown else None
        if access is None:
            raise AuthenticationFailed(
                "this server asks for an access token, in the header `Authorization: Bearer TOKEN`; there was none, or "
                f"one that has run out or is not for this server. {self._tokens.metadata_url} says who makes them",
                challenge=f'{challenge}, error="invalid_token"' if shown else challenge,
            )
        if missing := [wanted for wanted in self._tokens.scopes if wanted not in access.scopes]:
            wanted = " ".join(self._tokens.scopes)
            raise InsufficientScope(
                f"the access token lacks the scope {' '.join(missing)}: ask its issuer for one with `scope` {wanted!r}",
                challenge=f'{challenge}, error="insufficient_scope", scope="{wanted}"',
            )
        return access

    def _problem_of(self, caller_keys: list[str]) -> str | None:
        """Why a caller may not bring these keys for an endpoint; they are not repeated."""
        if not self._takes_caller_keys:
            return (
                f"this server takes no keys of its callers: leave the header {CALLER_KEY_HEADER} out, or have whoever "
                "runs the server set `caller_keys` for the endpoint that it is for"
            )
        (key, *others) = caller_keys
        if others or not (key.isascii() and key.isprintable() and key) or " " in key:
            return f"the header {CALLER_KEY_HEADER} must hold one key, and nothing that no key has: copy it anew"
        return None


def _called(caller: AccessToken) -> str:
    """What tells the caller from others: the name of an API key, or whom a token speaks for."""
    return caller.subject or caller.client_id


def _name(authority: str) -> str | None:
    """The name in ``name:port``, ``name`` or ``[ipv6]:port``, in lower case; None where it is none of these."""
    match = _AUTHORITY.fullmatch(authority)
    return (match[1] or match[2]).lower() if match else None

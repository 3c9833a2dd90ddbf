"""What every HTTP request must pass before any route sees it: host, origin, key and size.

Listening on loopback keeps other machines out, but not the web pages in this machine's browser: a page can post to
``http://localhost`` as it likes, and by DNS rebinding reach 127.0.0.1 under a name of its own. So Host must name this
server, and so must Origin where a browser sends one. This is the only place that checks it: the MCP SDK's own check
knows neither our settings nor our other routes, and is switched off.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from http import HTTPStatus

from pydantic import SecretStr
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embeddings_mcp.caller import CALLER_KEY_HEADER, bringing
from embeddings_mcp.errors import AuthenticationFailed, InvalidRequest, InvalidSetting, PayloadTooLarge
from embeddings_mcp.faces.rest import error_response, http_error_response
from embeddings_mcp.settings import Settings

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_KEYLESS_PATHS = frozenset({"/v1/health/live", "/v1/health/ready"})
_CALLER_KEY = CALLER_KEY_HEADER.lower().encode()
_AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s:/?#@\[\]]+))(?::[0-9]*)?", re.IGNORECASE)


class Guard:
    """An ASGI application that lets through to another only the requests that may pass.

    Args:
        app: what lies behind.
        settings: read are ``host``, ``allowed_hosts``, ``api_key``, ``max_body_bytes``, and whether an endpoint has
            ``caller_keys``.

    Raises:
        InvalidSetting: the server would be open to other machines without a key.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        key = settings.api_key.get_secret_value() if settings.api_key else ""
        if not key and not _is_loopback(settings.host):
            raise InvalidSetting(
                f"every machine that reaches {settings.host} could use this server: set an API key "
                "(EMBEDDINGS_MCP_API_KEY), or listen on 127.0.0.1"
            )
        self._app = app
        self._key = key.encode()
        self._names = _LOOPBACK_NAMES | {
            _name(host) or host.lower() for host in (settings.host, *settings.allowed_hosts)
        }
        self._max_body_bytes = settings.max_body_bytes
        self._takes_caller_keys = any(endpoint.caller_keys for endpoint in settings.endpoints)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request in place of the application behind, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif refusal := self._refusal(scope):
            await refusal(scope, receive, send)
        elif keys := _values(scope, _CALLER_KEY):
            with bringing(SecretStr(keys[0])):
                await self._app(scope, self._limited(receive), send)
        else:
            await self._app(scope, self._limited(receive), send)

    def _refusal(self, scope: Scope) -> Response | None:
        """The answer to a request that may not pass."""
        hosts = _values(scope, b"host")
        if len(hosts) != 1 or not self._is_ours(hosts[0], scope):
            return http_error_response(
                HTTPStatus.MISDIRECTED_REQUEST,
                f"this server has no name {', '.join(hosts)[:100]!r}; names to add to its own are set as allowed hosts "
                "(EMBEDDINGS_MCP_ALLOWED_HOSTS)",
            )
        for origin in _values(scope, b"origin"):
            scheme, _, authority = origin.partition("://")
            if scheme not in {"http", "https"} or not self._is_ours(authority, scope):
                return http_error_response(
                    HTTPStatus.FORBIDDEN,
                    f"pages of {origin[:100]!r} may not use this server; the hosts whose pages may are set as allowed "
                    "hosts (EMBEDDINGS_MCP_ALLOWED_HOSTS)",
                )
        if self._key and scope["path"] not in _KEYLESS_PATHS and not self._shows_key(scope):
            return error_response(
                AuthenticationFailed(
                    "this server asks for its API key, in the header `Authorization: Bearer KEY`; there was none, or "
                    "another one"
                )
            )
        if (keys := _values(scope, _CALLER_KEY)) and (problem := self._problem_of(keys)):
            return error_response(InvalidRequest(problem))
        if any(_number(value) > self._max_body_bytes for value in _values(scope, b"content-length")):
            return error_response(self._too_large())
        return None

    def _is_ours(self, authority: str, scope: Scope) -> bool:
        """Whether this ``host:port`` names this server.

        The numeric address that the connection came in on always does: rebinding takes a name, and of a server that
        listens on all addresses (0.0.0.0) nobody could list them.
        """
        name = _name(authority)
        if name is None:
            return False
        server = scope.get("server")
        reached = server is not None and name == server[0] and _address(name) is not None
        return reached or name in self._names

    def _shows_key(self, scope: Scope) -> bool:
        values = _values(scope, b"authorization")
        scheme, _, key = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        # As bytes, since comparing strings in constant time works for ASCII only.
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), self._key)

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

    def _limited(self, receive: Receive) -> Receive:
        """`receive`, which raises `PayloadTooLarge` in place of a body's byte too many."""
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(
            f"the request body is over the limit of {self._max_body_bytes:,} bytes: send fewer texts in one request"
        )


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The numeric address that `host` is; None where it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _values(scope: Scope, name: bytes) -> list[str]:
    """The header's values; latin-1 reads every byte, so no header can fail here."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _name(authority: str) -> str | None:
    """The name in ``name:port``, ``name`` or ``[ipv6]:port``, in lower case; None where it is none of these."""
    match = _AUTHORITY.fullmatch(authority)
    return (match[1] or match[2]).lower() if match else None


def _number(value: str) -> int:
    """A Content-Length; one that is no number is the HTTP server's to refuse."""
    try:
        return int(value)
    except ValueError:
        return 0

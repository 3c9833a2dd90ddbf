"""The HTTP application: the REST and the MCP face behind one guard, with one life, on one port."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from mcp.server.mcpserver import MCPServer
from mcp.server.transport_security import TransportSecuritySettings
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from embeddings_mcp import paths
from embeddings_mcp.errors import InvalidSetting
from embeddings_mcp.faces.http import descriptions, rest
from embeddings_mcp.faces.http.access_tokens import TokenVerifier
from embeddings_mcp.faces.http.connection import Connection
from embeddings_mcp.faces.http.guard import Guard
from embeddings_mcp.faces.http.instrumentation import Instrumented, metrics_route
from embeddings_mcp.faces.preload import preloaded
from embeddings_mcp.request_limits import Limits
from embeddings_mcp.service import EmbeddingService
from embeddings_mcp.settings import Load, Settings

if sys.platform != "win32":
    import resource

logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 7
"""How long requests in progress may go on after the server was told to stop; then they are refused."""

_LAST_SECONDS = 2  # for the refusals to be written; container managers kill what is still there 10 s after its signal

_OPEN_FILES = 10_240
"""Files that this process wants to have open, of which a connection is one; macOS allows no more to be asked for."""

_ACCEPTED_AT_ONCE = 32
"""Connections that asyncio accepts in one step. Where files run out it fails as often, and tries again a second later
for each failure by itself: with many of them that is soon all that it does."""

_WAITING = 2048
"""Connections that may wait in the system until they are accepted."""

_SILENCE = 60.0
"""Seconds for which it is not said again that connections cannot be accepted."""


def create_app(service: EmbeddingService, mcp_server: MCPServer, settings: Settings) -> ASGIApp:
    """The application: ``/v1``, ``/mcp`` and what is published; `service` is closed when its life ends.

    Raises:
        InvalidSetting: the server would be open to other machines without a key.
    """
    mcp_app = mcp_server.streamable_http_app(
        streamable_http_path=paths.MCP,
        # Up to protocol 2025-11-25 a client cancels a call by a second request, which finds the first only through
        # their session; later protocols have none, whatever is set here. Answers in JSON only would leave out the
        # progress of long calls.
        stateless_http=False,
        json_response=False,
        # The guard limits and checks first; two rules for one thing would only contradict each other.
        max_request_body_size=settings.max_body_bytes,
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
    )

    tokens = TokenVerifier.of(settings)

    @contextlib.asynccontextmanager
    async def life(_app: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            if tokens is not None:
                stack.push_async_callback(tokens.aclose)
            await stack.enter_async_context(contextlib.aclosing(service))
            await stack.enter_async_context(mcp_server.session_manager.run())
            yield

    app = Starlette(
        routes=[
            *rest.routes(service, Limits.of(settings)),
            metrics_route(),
            *descriptions.routes(),
            *(tokens.routes() if tokens is not None else ()),
            *mcp_app.routes,
        ],
        exception_handlers=rest.EXCEPTION_HANDLERS,
        lifespan=life,
    )
    guard = Guard(app, settings, tokens)
    if not settings.cors_origins:
        return Instrumented(guard)
    # Outside of the guard, since a browser shows no key when it asks beforehand whether a page may.
    pages = CORSMiddleware(
        guard,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=["Mcp-Session-Id", "Retry-After", "Server-Timing", "WWW-Authenticate", "X-Request-Id"],
    )
    return Instrumented(pages)


def serve_http(service: EmbeddingService, mcp_server: MCPServer, settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; what is in progress then may go on for `SHUTDOWN_SECONDS`, and is refused after.

    The address is said in one line on stderr once the server listens: port 0 takes a free one.

    Raises:
        InvalidSetting: it cannot listen there, has no usable certificate, or would be open to other machines without a
            key.
        ModelUnavailable: the default model is to be loaded first, and cannot be.
    """
    config = uvicorn.Config(
        create_app(service, mcp_server, settings),
        http=Connection,
        loop="asyncio",  # whatever else is installed: uvloop hangs up on those for whom there is no open file
        lifespan="on",
        ws="none",
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
        log_config=None,  # what is logged and how is settled for the whole process, not here
        access_log=False,
        server_header=False,
        proxy_headers=False,  # or whoever comes from loopback chooses his address, and with it his pace
        backlog=_ACCEPTED_AT_ONCE,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS + _LAST_SECONDS,
    )
    try:
        config.load()
    except OSError as error:  # which those of TLS are too
        raise InvalidSetting(
            f"the certificate {settings.tls_certificate} cannot be used: {error.strerror or error}; "
            "EMBEDDINGS_MCP_TLS_CERTIFICATE and, where that file does not hold it, EMBEDDINGS_MCP_TLS_KEY must name "
            "PEM files that belong together"
        ) from error
    _allow_open_files()
    with _listen(settings.host, settings.port) as listener, contextlib.suppress(KeyboardInterrupt):
        _Server(config, listener, service, settings.load).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Says where it listens once it does, and what keeps it from that; leaves no request without an answer."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket, service: EmbeddingService, load: Load) -> None:
        super().__init__(config)
        self._load = load
        self._listener = listener
        self._silent_until = 0.0  # by the event loop's clock
        self._url = _url(listener, "https" if config.is_ssl else "http")
        self._service = service

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._on_error)
        async with preloaded(self._service, self._load):
            await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listener.listen(_WAITING)  # for which, and for what is accepted at once, uvicorn has one number
        sys.stderr.write(f"embeddings-mcp: serving MCP at {self._url}{paths.MCP} and REST at {self._url}/v1\n")
        sys.stderr.flush()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        refusing = asyncio.create_task(self._refuse_late())
        try:
            await super().shutdown(sockets)
        finally:
            refusing.cancel()

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log what went wrong outside of all requests; that no connection can be accepted, once in a while only."""
        if "socket" not in context:
            loop.default_exception_handler(context)
        elif loop.time() >= self._silent_until:
            self._silent_until = loop.time() + _SILENCE
            logger.error(
                "No connection can be accepted (%s): raise the limit of open files (ulimit -n), or have a proxy before "
                "the server that holds fewer",
                context["exception"],
            )

    async def _refuse_late(self) -> None:
        """Have the embedders fail what is still in progress: it gets an error, where uvicorn would only hang up."""
        await asyncio.sleep(SHUTDOWN_SECONDS)
        await self._service.aclose()


def _allow_open_files() -> None:
    """Raise the limit of open files, which is 1,024 or 256 on most systems, as far as it may be."""
    if sys.platform != "win32":
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, _OPEN_FILES)), hard))


def _listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address, for the server to listen on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is said, since asyncio switches Nagle's algorithm off only where it is: else every answer waits
    # 40 ms for the client's delayed acknowledgement of its own head.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # elsewhere it would let two servers have one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, TypeError) as error:  # the latter of a name that is not UTF-8
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidSetting(
            f"cannot listen on {host} port {port}: {reason}; choose another host or port (port 0 takes a free one)"
        ) from error
    return listener


def _url(listener: socket.socket, scheme: str) -> str:
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

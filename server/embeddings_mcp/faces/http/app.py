"""The HTTP application, with REST and MCP on one port behind one guard, and the server that runs it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from types import FrameType
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
from embeddings_mcp.faces.http.instrumentation import InstrumentationMiddleware, metrics_route
from embeddings_mcp.faces.preload import preloaded
from embeddings_mcp.request_limits import Limits
from embeddings_mcp.service import EmbeddingService
from embeddings_mcp.settings import Load, Settings

if sys.platform != "win32":
    import resource

logger = logging.getLogger(__name__)

SHUTDOWN_GRACE_SECONDS = 7
"""Grace period for requests in flight after a signal to stop; after it they are failed with an error."""

_LAST_RESPONSES_SECONDS = 2  # to send those errors; container runtimes kill a process 10 s after the signal

_OPEN_FILES = 10_240
"""Soft limit of open files to ask for, since each connection is one; macOS allows no higher value."""

_ACCEPT_BATCH = 32
"""Connections that asyncio accepts in one iteration of the event loop. When the process is out of files, each of these
accepts fails and schedules a retry of its own one second later; with a large value the event loop would soon do nothing
else."""

_BACKLOG = 2048
"""Connections that the kernel queues until they are accepted."""

_ACCEPT_ERROR_LOG_SECONDS = 60.0
"""Minimum time between two log records that connections cannot be accepted."""


def create_app(service: EmbeddingService, mcp_server: MCPServer, settings: Settings) -> ASGIApp:
    """Build the application with ``/v1``, ``/mcp`` and the published documents; its lifespan closes `service`.

    Raises:
        InvalidSetting: the server would be open to other machines without a key.
    """
    mcp_app = mcp_server.streamable_http_app(
        streamable_http_path=paths.MCP,
        # Up to protocol 2025-11-25 a client cancels a call by a second request, which finds the first only through
        # their session; later protocols have no sessions, whatever is set here. With JSON responses only, the progress
        # of long calls could not be reported.
        stateless_http=False,
        json_response=False,
        # The guard enforces the body limit, Host and Origin first; the SDK's own checks could only contradict it.
        max_request_body_size=settings.max_body_bytes,
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
    )

    token_verifier = TokenVerifier.from_settings(settings)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            if token_verifier is not None:
                stack.push_async_callback(token_verifier.aclose)
            await stack.enter_async_context(contextlib.aclosing(service))
            await stack.enter_async_context(mcp_server.session_manager.run())
            yield

    app = Starlette(
        routes=[
            *rest.routes(service, Limits.from_settings(settings)),
            metrics_route(),
            *descriptions.routes(),
            *(token_verifier.routes() if token_verifier is not None else ()),
            *mcp_app.routes,
        ],
        exception_handlers=rest.EXCEPTION_HANDLERS,
        lifespan=lifespan,
    )
    guard = Guard(app, settings, token_verifier)
    if not settings.cors_origins:
        return InstrumentationMiddleware(guard)
    # Outside the guard, since a browser sends no key with a preflight request.
    cors = CORSMiddleware(
        guard,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=["Mcp-Session-Id", "Retry-After", "Server-Timing", "WWW-Authenticate", "X-Request-Id"],
    )
    return InstrumentationMiddleware(cors)


def serve_http(service: EmbeddingService, mcp_server: MCPServer, settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; requests then in flight have `SHUTDOWN_GRACE_SECONDS` to complete.

    Once the server listens, it writes its URL to stderr in one line; port 0 picks a free port.

    Raises:
        InvalidSetting: the server cannot listen on the address, the certificate is unusable, or the server would be
            open to other machines without a key.
        ModelUnavailable: the default model is to be loaded before the server starts, and cannot be.
    """
    config = uvicorn.Config(
        create_app(service, mcp_server, settings),
        http=Connection,
        loop="asyncio",  # even where uvloop is installed, which drops connections when it is out of files
        lifespan="on",
        ws="none",
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
        log_config=None,  # logging is configured for the whole process (see `logs`)
        access_log=False,
        server_header=False,
        proxy_headers=False,  # or a client on loopback could forge its address, and so evade the rate limit
        backlog=_ACCEPT_BATCH,
        timeout_graceful_shutdown=SHUTDOWN_GRACE_SECONDS + _LAST_RESPONSES_SECONDS,
    )
    try:
        config.load()
    except OSError as error:  # includes ssl.SSLError
        raise InvalidSetting(
            f"the certificate {settings.tls_certificate} cannot be used: {error.strerror or error}; "
            "EMBEDDINGS_MCP_TLS_CERTIFICATE and, where that file does not hold it, EMBEDDINGS_MCP_TLS_KEY must name "
            "PEM files that belong together"
        ) from error
    _raise_open_files_limit()
    with _listen(settings.host, settings.port) as listener, contextlib.suppress(KeyboardInterrupt):
        _Server(config, listener, service, settings.load).run(sockets=[listener])


class _Server(uvicorn.Server):
    """uvicorn's server; announces its URL, logs accept errors, and responds to all requests at shutdown."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket, service: EmbeddingService, load: Load) -> None:
        super().__init__(config)
        self._load = load
        self._listener = listener
        self._log_accept_error_at = 0.0  # by the event loop's clock
        self._url = _url(listener, "https" if config.is_ssl else "http")
        self._service = service

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._on_loop_error)
        async with preloaded(self._service, self._load):
            await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listener.listen(_BACKLOG)  # again: uvicorn uses one number for the backlog and for the accept batch
        sys.stderr.write(f"embeddings-mcp: serving MCP at {self._url}{paths.MCP} and REST at {self._url}/v1\n")
        sys.stderr.flush()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        failing = asyncio.create_task(self._fail_late_requests())
        try:
            await super().shutdown(sockets)
        finally:
            failing.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        # A second Ctrl-C ends the process at once: uvicorn would log the traceback of everything that it interrupts.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log an error raised outside of any request; accept errors at a limited rate."""
        if "socket" not in context:
            loop.default_exception_handler(context)
        elif loop.time() >= self._log_accept_error_at:
            self._log_accept_error_at = loop.time() + _ACCEPT_ERROR_LOG_SECONDS
            logger.error(
                "No connection can be accepted (%s): raise the limit of open files (ulimit -n), or put a proxy that "
                "opens fewer connections in front of the server",
                context["exception"],
            )

    async def _fail_late_requests(self) -> None:
        """After the grace period, close the embedders: requests in flight get an error, not a dropped connection."""
        await asyncio.sleep(SHUTDOWN_GRACE_SECONDS)
        await self._service.aclose()


def _raise_open_files_limit() -> None:
    """Raise the soft limit of open files, 1,024 or 256 on most systems, to `_OPEN_FILES` or the hard limit."""
    if sys.platform != "win32":
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, _OPEN_FILES)), hard))


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is given explicitly, since asyncio disables Nagle's algorithm (TCP_NODELAY) only then; otherwise the
    # body of every response would wait 40 ms for the client's delayed ACK of the head.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # on Windows it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, TypeError) as error:  # TypeError: a host name that is not valid UTF-8
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidSetting(
            f"cannot listen on {host} port {port}: {reason}; choose another host or port (port 0 takes a free one)"
        ) from error
    return listener


def _url(listener: socket.socket, scheme: str) -> str:
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

"""The outermost middleware of the HTTP server: request ids, metrics, a span and an access log record per request."""

from __future__ import annotations

import re
import time
import uuid

from opentelemetry import trace
from opentelemetry.propagate import extract
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embeddings_mcp import logs, paths, telemetry
from embeddings_mcp.operations import ROUTES

REQUEST_ID = "X-Request-Id"

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS"})
_PATHS = frozenset(
    {
        *ROUTES,
        "/apis.json",
        "/manifest",
        paths.MCP,
        "/mcp/server-card",
        "/openapi.json",
        "/v1/models",
        paths.LIVE,
        paths.READY,
        paths.METRICS,
    }
)
_PREFIXES = ("/v1/models/", "/skills", "/.well-known/")

_tracer = trace.get_tracer("embeddings-mcp")


class InstrumentationMiddleware:
    """ASGI middleware that identifies, traces, counts and logs requests.

    The request id is the caller's ``X-Request-Id``, or a generated one where that is missing or unsafe to log. It is
    returned in the same header, and added to the log records of the request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; record its metrics and log it when it has ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        route = route_of(scope["path"])
        method = scope["method"] if scope["method"] in _METHODS else "other"
        status = 499  # stays where the client disconnects before a response is started
        started = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        token = logs.request_id.set(request_id)
        try:
            with _tracer.start_as_current_span(
                f"{method} {route}",
                context=extract(dict(headers)),
                kind=SpanKind.SERVER,
                attributes={"http.request.method": method, "http.route": route, "request.id": request_id},
                record_exception=False,  # an exception's message may quote input
            ) as span:
                await self._app(scope, receive, send_with_id)
                span.set_attribute("http.response.status_code", status)
                if status >= 500:
                    span.set_status(StatusCode.ERROR)
        except Exception:
            status = 500
            raise
        finally:
            seconds = time.perf_counter() - started
            telemetry.HTTP_REQUESTS.labels(method, route, status).inc()
            telemetry.HTTP_SECONDS.labels(route).observe(seconds)
            logs.log_access(method=method, route=route, status=status, seconds=round(seconds, 4))
            logs.request_id.reset(token)


def route_of(path: str) -> str:
    """The route of a path, as one of a fixed set of labels."""
    if path in _PATHS:
        return path
    return next((f"{prefix.rstrip('/')}/*" for prefix in _PREFIXES if path.startswith(prefix)), "other")


def metrics_route() -> Route:
    """The route that Prometheus scrapes."""

    async def metrics(_request: Request) -> Response:
        return Response(generate_latest(telemetry.REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return Route(paths.METRICS, metrics)

"""The REST interface: the OpenAI and NIM routes under ``/v1``, and every error in OpenAI's envelope.

One handler serves every operation in `operations` that has a path. A client that disconnects cancels its request. Large
responses are serialized in chunks: the JSON encoder holds the GIL, so one long call would block all other requests, on
any thread.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import numpy as np
import orjson
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ExceptionHandler, Receive

from embeddings_mcp import paths, telemetry
from embeddings_mcp.errors import AuthenticationFailed, EmbeddingsError, InvalidRequest, WireForm, http_form, wire_form
from embeddings_mcp.operations import ROUTES, Operation
from embeddings_mcp.request_limits import DEFAULT_LIMITS, Limits
from embeddings_mcp.schema import ErrorResponse, HealthResponse, ModelEntry, ModelList, ModelObject
from embeddings_mcp.serialization import dump_json, parse
from embeddings_mcp.service import EmbeddingService

logger = logging.getLogger(__name__)

READINESS_TIMEOUT_SECONDS = 5.0
"""Timeout of a readiness probe that waits for the default model."""

_LARGE_BODY_BYTES = 1024 * 1024
"""Larger request bodies are parsed on a worker thread: a million short texts take 0.2 s to validate."""

_MAX_ROWS_PER_CHUNK = 128
"""Rows of a response that are serialized before other requests get a turn."""

_MAX_NUMBERS_PER_CHUNK = 128 * 384
"""Numbers in those rows, which take 1 ms to serialize; a longer row is a chunk of its own."""

# --- Routes ----------------------------------------------------------------------------------------------------------


def routes(service: EmbeddingService, limits: Limits = DEFAULT_LIMITS) -> list[Route]:
    """The REST routes of `service`, with `limits` for each request."""
    started = int(time.time())

    async def list_models(_request: Request) -> Response:
        models = [_model_object(entry, started) for entry in (await service.list_models())["models"]]
        return _json(ModelList(object="list", data=models))

    async def get_model(request: Request) -> Response:
        return _json(_model_object(await service.describe(request.path_params["model"]), started))

    async def live(_request: Request) -> Response:
        return _json(HealthResponse(object="health.response", message="live", live=True))

    async def ready(_request: Request) -> Response:
        problem = await _readiness_problem(service)
        health = HealthResponse(object="health.response", message=problem or "ready", ready=problem is None)
        return _json(health, HTTPStatus.OK if problem is None else HTTPStatus.SERVICE_UNAVAILABLE)

    return [
        *(
            Route(path, partial(_run_operation, service, limits, operation), methods=["POST"], name=operation.name)
            for path, operation in ROUTES.items()
        ),
        Route("/v1/models", list_models),
        Route("/v1/models/{model:path}", get_model),
        Route(paths.LIVE, live),
        Route(paths.READY, ready),
    ]


async def _run_operation(service: EmbeddingService, limits: Limits, operation: Operation, request: Request) -> Response:
    """Handle a request for one operation."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "the request must be JSON, with the header Content-Type: application/json",
        )
    if (coding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise HTTPException(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"the header Content-Encoding is {coding[:100]!r}: send the body uncompressed, without that header",
            {"Accept-Encoding": "identity"},
        )
    body = await request.body()
    parse_body = partial(_parse_body, operation.request, body)
    parsed = parse_body() if len(body) <= _LARGE_BODY_BYTES else await anyio.to_thread.run_sync(parse_body)
    with telemetry.collect_stages() as stages:
        started = time.perf_counter()
        response = await _unless_disconnected(request.receive, limits.run(service, operation, parsed))
        response.headers["Server-Timing"] = _server_timing(stages, time.perf_counter() - started)
    return response


def _server_timing(stages: Mapping[telemetry.Stage, float], total: float) -> str:
    """The value of the header Server-Timing (W3C), in milliseconds; a large response is serialized only after it."""
    times = [*stages.items(), ("total", total)]
    return ", ".join(f"{name};dur={seconds * 1000:.1f}" for name, seconds in times)


def _parse_body(request_type: type[BaseModel], body: bytes) -> BaseModel:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the request body is not JSON: {error}") from None
    return parse(request_type, value)


async def _unless_disconnected(receive: Receive, work: Awaitable[Mapping[str, Any]]) -> Response:
    """Respond with the result of `work`; cancel it if the client disconnects first.

    The request's body has been read, so the only message that `receive` can still return is the disconnect.
    """
    with anyio.CancelScope() as scope:

        async def cancel_on_disconnect() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            scope.cancel()

        # Not a task group, which would wrap an exception of `work` in an ExceptionGroup.
        watcher = asyncio.create_task(cancel_on_disconnect())
        try:
            return _json(await work)
        finally:
            watcher.cancel()
    return _client_closed_request()


async def _readiness_problem(service: EmbeddingService) -> str | None:
    """Why the default model is not ready; None if it is.

    A probe needs no key, so details (paths, URLs) only go to the log, and the response has the error's code.
    """
    try:
        with anyio.fail_after(READINESS_TIMEOUT_SECONDS):
            await service.check()
    except TimeoutError:
        return f"not ready: the default model was not ready within {READINESS_TIMEOUT_SECONDS:.0f} s"
    except EmbeddingsError as error:
        logger.warning("Not ready: %s", error.message)
        return f"not ready: {wire_form(error).code}"
    return None


def _model_object(entry: ModelEntry, created: int) -> ModelObject:
    owner, slash, _ = entry["id"].partition("/")
    return {**entry, "object": "model", "created": created, "owned_by": owner if slash else "embeddings-mcp"}


# --- Responses -------------------------------------------------------------------------------------------------------


def _json(content: Mapping[str, Any], status: int = HTTPStatus.OK) -> Response:
    if any(isinstance(value, list) and len(value) > _rows_per_chunk(value) for value in content.values()):
        return StreamingResponse(_json_chunks(content), status, media_type="application/json")
    with telemetry.stage("serialize"):
        body = dump_json(content)
    return Response(body, status, media_type="application/json")


async def _json_chunks(content: Mapping[str, Any]) -> AsyncIterator[bytes]:
    """Serialize the content, its lists in slices, and yield to the event loop after each slice."""
    seconds = 0.0
    separator = b"{"
    for key, value in content.items():
        yield separator + dump_json(key) + b":"
        if isinstance(value, list) and value:
            separator = b"["
            step = _rows_per_chunk(value)
            for start in range(0, len(value), step):
                started = time.perf_counter()
                # Strip the slice's own brackets: the whole list has only one pair.
                chunk = separator + dump_json(value[start : start + step])[1:-1]
                seconds += time.perf_counter() - started
                yield chunk
                separator = b","
                await anyio.lowlevel.checkpoint()
            yield b"]"
        else:
            yield dump_json(value)
        separator = b","
    yield b"}"
    telemetry.record("serialize", seconds)


def _rows_per_chunk(rows: Sequence[object]) -> int:
    """How many of these rows, which all have the same size, go into one chunk."""
    vector = rows[0].get("embedding") if rows and isinstance(rows[0], dict) else None
    if not isinstance(vector, np.ndarray):
        return _MAX_ROWS_PER_CHUNK
    return max(1, min(_MAX_ROWS_PER_CHUNK, _MAX_NUMBERS_PER_CHUNK // max(1, vector.size)))


def error_response(error: EmbeddingsError) -> Response:
    """The response for an error of the service, with Retry-After and WWW-Authenticate where they apply."""
    response = _envelope(wire_form(error), error.message, error.param)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(math.ceil(error.retry_after))
    if isinstance(error, AuthenticationFailed):
        response.headers["WWW-Authenticate"] = error.challenge
    return response


def http_error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """The response for an error of HTTP itself (no such route, wrong method), in the same envelope."""
    response = _envelope(http_form(status), message)
    response.headers.update(headers or {})
    return response


def _envelope(form: WireForm, message: str, param: str | None = None) -> Response:
    """An error in OpenAI's format."""
    error: ErrorResponse = {"error": {"message": message, "type": form.type, "param": param, "code": form.code}}
    return _json(error, form.status)


def _client_closed_request() -> Response:
    """An empty response for a client that has disconnected, with the status that nginx logs for it."""
    return Response(status_code=499)


async def _on_embeddings_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, EmbeddingsError)
    if wire_form(error).status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.warning("%s failed: %s", request.url.path, error.message)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == HTTPStatus.NOT_FOUND:
        message = f"nothing is served at {request.url.path[:100]}; GET /openapi.json lists what is"
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{request.method} is not allowed at {request.url.path[:100]}, which takes {allowed}"
    return http_error_response(error.status_code, message, error.headers)


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return _client_closed_request()


async def _on_unexpected_exception(_request: Request, _error: Exception) -> Response:
    # Starlette re-raises the exception once this is sent: the HTTP server logs its traceback and closes the connection.
    return http_error_response(
        HTTPStatus.INTERNAL_SERVER_ERROR, "an error inside the server; its log says more", {"Connection": "close"}
    )


EXCEPTION_HANDLERS: Mapping[Any, ExceptionHandler] = {
    EmbeddingsError: _on_embeddings_error,
    HTTPException: _on_http_exception,
    ClientDisconnect: _on_disconnect,
    Exception: _on_unexpected_exception,
}
"""Exception handlers for the application that mounts the routes."""

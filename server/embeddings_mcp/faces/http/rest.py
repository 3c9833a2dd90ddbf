"""The REST face: the OpenAI and NIM routes under ``/v1``, and every error in OpenAI's envelope.

One handler serves every operation of the table that has a path. A caller who hangs up cancels the work. Large answers
are written in pieces: the JSON encoder holds the interpreter lock, so one long call would stop all other requests, on
whatever thread it runs.
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

READY_SECONDS = 5.0
"""Longest that a readiness probe waits for the default model."""

_LARGE_BODY = 1024 * 1024
"""Request bodies above this many bytes are read on a worker thread: a million short texts take 0.2 s to validate."""

_ROWS_AT_ONCE = 128
"""Rows of an answer that are written without letting other requests in."""

_NUMBERS_AT_ONCE = 128 * 384
"""And numbers in them, which take 1 ms; a row that has more is written as a whole."""

# --- Routes ----------------------------------------------------------------------------------------------------------


def routes(service: EmbeddingService, limits: Limits = DEFAULT_LIMITS) -> list[Route]:
    """The REST routes, answered by `service` within `limits`."""
    started = int(time.time())

    async def list_models(_request: Request) -> Response:
        models = [_model_object(entry, started) for entry in (await service.list_models())["models"]]
        return _json(ModelList(object="list", data=models))

    async def get_model(request: Request) -> Response:
        return _json(_model_object(await service.describe(request.path_params["model"]), started))

    async def live(_request: Request) -> Response:
        return _json(HealthResponse(object="health.response", message="live", live=True))

    async def ready(_request: Request) -> Response:
        problem = await _why_not_ready(service)
        health = HealthResponse(object="health.response", message=problem or "ready", ready=problem is None)
        return _json(health, HTTPStatus.OK if problem is None else HTTPStatus.SERVICE_UNAVAILABLE)

    return [
        *(
            Route(path, partial(_post, service, limits, operation), methods=["POST"], name=operation.name)
            for path, operation in ROUTES.items()
        ),
        Route("/v1/models", list_models),
        Route("/v1/models/{model:path}", get_model),
        Route(paths.LIVE, live),
        Route(paths.READY, ready),
    ]


async def _post(service: EmbeddingService, limits: Limits, operation: Operation, request: Request) -> Response:
    """Answer one operation."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "the request must be JSON, with the header Content-Type: application/json",
        )
    if (coding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise HTTPException(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"the body is said to be {coding[:100]!r} by its header Content-Encoding: send it as it is, without one",
            {"Accept-Encoding": "identity"},
        )
    body = await request.body()
    read = partial(_read, operation.request, body)
    asked = read() if len(body) <= _LARGE_BODY else await anyio.to_thread.run_sync(read)
    with telemetry.staged() as stages:
        began = time.perf_counter()
        response = await _unless_gone(request.receive, limits.answer(service, operation, asked))
        response.headers["Server-Timing"] = _timing(stages, time.perf_counter() - began)
    return response


def _timing(stages: Mapping[telemetry.Stage, float], total: float) -> str:
    """The stages in milliseconds, as the header wants them (W3C Server Timing); a large answer is written later."""
    times = [*stages.items(), ("total", total)]
    return ", ".join(f"{name};dur={seconds * 1000:.1f}" for name, seconds in times)


def _read(request_type: type[BaseModel], body: bytes) -> BaseModel:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the request body is not JSON: {error}") from None
    return parse(request_type, value)


async def _unless_gone(receive: Receive, work: Awaitable[Mapping[str, Any]]) -> Response:
    """The answer that `work` gives; a caller who hangs up before cancels it.

    The request's body has been read, so all that `receive` still has to say is that the caller is gone.
    """
    with anyio.CancelScope() as scope:

        async def cancel_when_gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            scope.cancel()

        # Not a task group, which would wrap whatever `work` raises into a group.
        watcher = asyncio.create_task(cancel_when_gone())
        try:
            return _json(await work)
        finally:
            watcher.cancel()
    return _nobody_there()


async def _why_not_ready(service: EmbeddingService) -> str | None:
    """What keeps the default model from answering, None where nothing does.

    A probe needs no key, so details (paths, addresses) go to the log and only the error's code goes out.
    """
    try:
        with anyio.fail_after(READY_SECONDS):
            await service.check()
    except TimeoutError:
        return f"not ready: the default model did not come up within {READY_SECONDS:.0f} s"
    except EmbeddingsError as error:
        logger.warning("Not ready: %s", error.message)
        return f"not ready: {wire_form(error).code}"
    return None


def _model_object(entry: ModelEntry, created: int) -> ModelObject:
    owner, slash, _ = entry["id"].partition("/")
    return {**entry, "object": "model", "created": created, "owned_by": owner if slash else "embeddings-mcp"}


# --- Answers ---------------------------------------------------------------------------------------------------------


def _json(answer: Mapping[str, Any], status: int = HTTPStatus.OK) -> Response:
    if any(isinstance(value, list) and len(value) > _at_once(value) for value in answer.values()):
        return StreamingResponse(_pieces(answer), status, media_type="application/json")
    with telemetry.stage("serialise"):
        body = dump_json(answer)
    return Response(body, status, media_type="application/json")


async def _pieces(answer: Mapping[str, Any]) -> AsyncIterator[bytes]:
    """The answer's JSON, its lists in slices, with room for other requests after each."""
    seconds = 0.0
    opening = b"{"
    for key, value in answer.items():
        yield opening + dump_json(key) + b":"
        if isinstance(value, list) and value:
            opening = b"["
            step = _at_once(value)
            for start in range(0, len(value), step):
                began = time.perf_counter()
                # A slice's own brackets make way for those of the whole list.
                piece = opening + dump_json(value[start : start + step])[1:-1]
                seconds += time.perf_counter() - began
                yield piece
                opening = b","
                await anyio.lowlevel.checkpoint()
            yield b"]"
        else:
            yield dump_json(value)
        opening = b","
    yield b"}"
    telemetry.record("serialise", seconds)


def _at_once(rows: Sequence[object]) -> int:
    """How many of these rows, which are alike, are written at once."""
    vector = rows[0].get("embedding") if rows and isinstance(rows[0], dict) else None
    if not isinstance(vector, np.ndarray):
        return _ROWS_AT_ONCE
    return max(1, min(_ROWS_AT_ONCE, _NUMBERS_AT_ONCE // max(1, vector.size)))


def error_response(error: EmbeddingsError) -> Response:
    """The error as an answer, with the headers that belong to it."""
    response = _envelope(wire_form(error), error.message, error.param)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(math.ceil(error.retry_after))
    if isinstance(error, AuthenticationFailed):
        response.headers["WWW-Authenticate"] = error.challenge
    return response


def http_error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error of HTTP itself (no such route, wrong method) in the same envelope."""
    response = _envelope(http_form(status), message)
    response.headers.update(headers or {})
    return response


def _envelope(form: WireForm, message: str, param: str | None = None) -> Response:
    """An error as OpenAI writes it."""
    error: ErrorResponse = {"error": {"message": message, "type": form.type, "param": param, "code": form.code}}
    return _json(error, form.status)


def _nobody_there() -> Response:
    """What is said to a caller who hung up: nothing, under the status that web servers log for it."""
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
        message = f"{request.method} is not possible at {request.url.path[:100]}, which takes {allowed}"
    return http_error_response(error.status_code, message, error.headers)


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return _nobody_there()


async def _on_crash(_request: Request, _error: Exception) -> Response:
    # Starlette raises the exception again once this is sent: the HTTP server logs its traceback and hangs up.
    return http_error_response(
        HTTPStatus.INTERNAL_SERVER_ERROR, "an error inside the server; its log says more", {"Connection": "close"}
    )


EXCEPTION_HANDLERS: Mapping[Any, ExceptionHandler] = {
    EmbeddingsError: _on_embeddings_error,
    HTTPException: _on_http_exception,
    ClientDisconnect: _on_disconnect,
    Exception: _on_crash,
}
"""How an exception becomes an answer, for the application that holds the routes."""

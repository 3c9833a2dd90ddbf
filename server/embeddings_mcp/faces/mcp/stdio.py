"""MCP over stdio, for the host that started this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
from typing import TYPE_CHECKING, Any

import anyio
from mcp.server.stdio import stdio_server
from mcp.shared.message import SessionMessage
from mcp_types import INVALID_REQUEST, PARSE_ERROR, ErrorData, JSONRPCError
from pydantic import ValidationError

from embeddings_mcp.errors import first_error
from embeddings_mcp.faces.mcp.server import EmbeddingsServer
from embeddings_mcp.faces.preload import preloaded
from embeddings_mcp.service import EmbeddingService
from embeddings_mcp.settings import Settings

if TYPE_CHECKING:
    from anyio.abc import ObjectSendStream
    from mcp.shared._stream_protocols import ReadStream, WriteStream

_WRITE_SECONDS = 0.1
"""Time allowed for writing a response before loading starts: importing torch holds the GIL for longer than that."""

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, which JSON can express as an escape but UTF-8 cannot encode."""


def serve_stdio(service: EmbeddingService, server: EmbeddingsServer, settings: Settings) -> None:
    """Serve until the host closes stdin or stops reading responses.

    Raises:
        ModelUnavailable: the default model should be loaded at start-up and cannot be.
        OSError: stdin cannot be read, or stdout cannot be written to.
    """

    async def tools_received() -> None:
        """Wait until the host has received the list of tools, its first request."""
        await server.tools_listed.wait()
        await asyncio.sleep(_WRITE_SECONDS)

    async def serve() -> None:
        async with (
            contextlib.aclosing(service),
            preloaded(service, settings.load, after=tools_received),
            stdio_server() as (from_host, to_host),
            anyio.create_task_group() as tasks,
        ):
            to_server, messages = anyio.create_memory_object_stream[SessionMessage | Exception]()
            tasks.start_soon(_forward, from_host, to_server, to_host)
            await server.run_on(messages, to_host)

    # Ctrl-C kills the process at once: a worker thread is blocked reading stdin, and only end of file would wake it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        anyio.run(serve)
    except* BrokenPipeError:
        pass  # the host is gone, so nobody waits for a response
    except* OSError as errors:
        raise first_error(errors) from None


async def _forward(
    from_host: ReadStream[SessionMessage | Exception],
    to_server: ObjectSendStream[SessionMessage | Exception],
    to_host: WriteStream[SessionMessage],
) -> None:
    """Forward messages from the host to the server, and respond to invalid lines with an error.

    The SDK ignores an invalid line silently, so its sender would wait forever. A text that was cut in the middle of an
    emoji is enough to make a line invalid.
    """
    async with to_server:
        async for item in from_host:
            if isinstance(item, Exception):
                await to_host.send(SessionMessage(_error_response(item)))
            else:
                await to_server.send(item)


def _error_response(error: Exception) -> JSONRPCError:
    """Return the response to an invalid line, with the id of the request in it where that can be recovered."""
    unknown = [{"type": "", "loc": (), "msg": str(error), "input": None}]
    problems: list[Any] = error.errors(include_url=False) if isinstance(error, ValidationError) else unknown
    # Validation tries each type of message in turn: the first problem says why the line is not a request, and the input
    # of the last one is the whole message.
    first, last = problems[0], problems[-1]
    code, message, received = INVALID_REQUEST, "the line is not a JSON-RPC message", last["input"]
    if first["type"] == "json_invalid":
        code, message = PARSE_ERROR, f"the line is not valid JSON: {first['msg']}"
        with contextlib.suppress(ValueError, RecursionError):  # this parser is more lenient than the SDK's
            received = json.loads(received, parse_int=lambda digits: int(digits[:20]))
    elif field := first["loc"][1:2]:
        message += f": `{field[0]}`: {first['msg']}"
    request_id = received.get("id") if isinstance(received, dict) else None
    usable = type(request_id) is int or (type(request_id) is str and not _LONE_SURROGATE.search(request_id))
    return JSONRPCError(jsonrpc="2.0", id=request_id if usable else None, error=ErrorData(code=code, message=message))

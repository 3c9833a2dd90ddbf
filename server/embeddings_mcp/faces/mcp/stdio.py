"""MCP over stdio, for the one host that started this process."""

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

from embeddings_mcp.faces.mcp.server import EmbeddingsServer
from embeddings_mcp.faces.preload import preloaded
from embeddings_mcp.service import EmbeddingService
from embeddings_mcp.settings import Settings

if TYPE_CHECKING:
    from anyio.abc import ObjectSendStream
    from mcp.shared._stream_protocols import ReadStream, WriteStream

_WRITTEN_SECONDS = 0.1
"""Within these an answer is written: to import torch takes the interpreter lock for longer than that takes."""

_HALF = re.compile("[\ud800-\udfff]")
"""Half of a character, which JSON can spell and no line can hold."""


def serve_stdio(service: EmbeddingService, server: EmbeddingsServer, settings: Settings) -> None:
    """Serve until the host closes stdin, or reads no answer any more.

    Raises:
        ModelUnavailable: the default model is to be loaded first, and cannot be.
    """

    async def listed() -> None:
        """Return once the host has its list of tools, which is the first that it asks for."""
        await server.listed.wait()
        await asyncio.sleep(_WRITTEN_SECONDS)

    async def serve() -> None:
        async with (
            contextlib.aclosing(service),
            preloaded(service, settings.load, after=listed),
            stdio_server() as (sent, answers),
            anyio.create_task_group() as tasks,
        ):
            passed, messages = anyio.create_memory_object_stream[SessionMessage | Exception]()
            tasks.start_soon(_pass_on, sent, passed, answers)
            await server.run_on(messages, answers)

    # Ctrl-C ends the process at once: a thread of it waits for stdin, and nothing but its end would wake it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        anyio.run(serve)
    except* BrokenPipeError:
        pass  # the host is gone, and with it whoever waits for an answer


async def _pass_on(
    sent: ReadStream[SessionMessage | Exception],
    messages: ObjectSendStream[SessionMessage | Exception],
    answers: WriteStream[SessionMessage],
) -> None:
    """Pass on what the host sends; a line that is no message is answered.

    The SDK passes it over in silence, and whoever sent it would wait for ever: half of an emoji, where a program cut a
    text, is enough.
    """
    async with messages:
        async for item in sent:
            if isinstance(item, Exception):
                await answers.send(SessionMessage(_answer_to(item)))
            else:
                await messages.send(item)


def _answer_to(error: Exception) -> JSONRPCError:
    """The answer to a line that could not be read, to the request in it as far as that can be told."""
    unknown = [{"type": "", "loc": (), "msg": str(error), "input": None}]
    problems: list[Any] = error.errors(include_url=False) if isinstance(error, ValidationError) else unknown
    first, last = problems[0], problems[-1]  # why it is no request; and, of the whole of it, why it is no error
    code, what, sent = INVALID_REQUEST, "the line is no JSON-RPC message", last["input"]
    if first["type"] == "json_invalid":
        code, what = PARSE_ERROR, f"the line is not JSON that can be read: {first['msg']}"
        with contextlib.suppress(ValueError, RecursionError):  # this reader takes more than the SDK's
            sent = json.loads(sent, parse_int=lambda digits: int(digits[:20]))
    elif field := first["loc"][1:2]:
        what += f": `{field[0]}`: {first['msg']}"
    asked = sent.get("id") if isinstance(sent, dict) else None
    answerable = type(asked) is int or (type(asked) is str and not _HALF.search(asked))
    return JSONRPCError(jsonrpc="2.0", id=asked if answerable else None, error=ErrorData(code=code, message=what))

"""Input and output shared by the commands: texts from arguments and stdin, one service call, its result on stdout."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import anyio

from embeddings_mcp.embedders.base import OnProgress
from embeddings_mcp.errors import InvalidRequest
from embeddings_mcp.operations import Operation
from embeddings_mcp.schema import total_texts
from embeddings_mcp.serialization import parse
from embeddings_mcp.service import EmbeddingService

_PROGRESS_MIN_TEXTS = 64
"""Minimum number of texts for which a progress bar is shown."""

_PIPE_WIDTH = 1000
"""Maximum line width in characters where stdout is not a terminal."""


def expand_stdin(texts: list[str]) -> list[str]:
    """Replace ``-`` with the lines of stdin, without empty lines."""
    return [line for text in texts for line in (_stdin_lines() if text == "-" else [text])]


def _stdin_lines() -> list[str]:
    """Read the lines of stdin, decoded as UTF-8 regardless of the locale.

    Raises:
        InvalidRequest: stdin is not UTF-8.
    """
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"stdin must be UTF-8 text: {error.reason} at byte {error.start}") from None
    # Not splitlines(), which also splits at form feeds and U+2028.
    return [line for line in text.replace("\r\n", "\n").split("\n") if line]


def run_operation(
    operation: Operation, make_service: Callable[[], Awaitable[EmbeddingService]], **fields: object
) -> Any:  # noqa: ANN401 - the operation's response
    """Create a service, run one operation with it and close it.

    Args:
        operation: the operation to run.
        make_service: factory of the service.
        fields: the fields of the request; those that are None are omitted.

    Raises:
        EmbeddingsError: the service rejects the request or fails.
    """
    if "model" in operation.request.model_fields:
        fields["model"] = "default"
    request = parse(operation.request, {name: value for name, value in fields.items() if value is not None})

    async def call() -> Mapping[str, Any]:
        async with contextlib.aclosing(await make_service()) as service, _progress(total_texts(request)) as on_progress:
            return await operation.call(service, request, on_progress)

    return anyio.run(call)


@contextlib.asynccontextmanager
async def _progress(texts: int) -> AsyncIterator[OnProgress | None]:
    """Show a progress bar on stderr if it is a terminal and there are enough texts to wait for."""
    if texts < _PROGRESS_MIN_TEXTS or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("embedding", total=texts)

        async def on_progress(done: int) -> None:
            progress.update(task, completed=done)

        yield on_progress


def write_result(result: object) -> None:
    """Write a result to stdout: bytes unchanged, anything else rendered by rich."""
    if isinstance(result, bytes):
        sys.stdout.buffer.write(result + b"\n")
        sys.stdout.flush()
        return
    from rich.console import Console

    # Files and pipes have no width to which table columns would have to be cropped.
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(result)

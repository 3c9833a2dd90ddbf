"""What commands have in common: texts from arguments and stdin, one question to a service, its answer on stdout."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import anyio

from embeddings_mcp.embedders.base import OnProgress
from embeddings_mcp.errors import InvalidRequest
from embeddings_mcp.operations import Operation
from embeddings_mcp.schema import count_texts, texts_of
from embeddings_mcp.serialization import parse
from embeddings_mcp.service import EmbeddingService

_PROGRESS_FROM = 64
"""Texts from which on a progress bar is worth its lines."""

_WIDEST = 1000
"""Characters of a line that nobody reads on a terminal."""


def lines_of(texts: list[str]) -> list[str]:
    """The texts, with the lines of stdin in the place of ``-``; empty lines are left out."""
    return [line for text in texts for line in (_stdin_lines() if text == "-" else [text])]


def _stdin_lines() -> list[str]:
    """The lines of stdin, which is UTF-8 whatever the locale says.

    Raises:
        InvalidRequest: it is not.
    """
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"stdin must be UTF-8 text: {error.reason} at byte {error.start}") from None
    # Not by splitlines, for which a line also ends at form feeds and at U+2028.
    return [line for line in text.replace("\r\n", "\n").split("\n") if line]


def ask(operation: Operation, make: Callable[[], Awaitable[EmbeddingService]], **fields: object) -> Any:  # noqa: ANN401 - the operation's response
    """Ask a service of our own, made for this one question.

    Raises:
        EmbeddingsError: whatever the service refuses or fails with.
    """
    if "model" in operation.request.model_fields:
        fields["model"] = "default"
    request = parse(operation.request, {name: value for name, value in fields.items() if value is not None})
    count = sum(map(count_texts, texts_of(request).values()))

    async def answer() -> Mapping[str, Any]:
        async with contextlib.aclosing(await make()) as service, _progress(count) as on_progress:
            return await operation.call(service, request, on_progress)

    return anyio.run(answer)


@contextlib.asynccontextmanager
async def _progress(texts: int) -> AsyncIterator[OnProgress | None]:
    """A progress bar on stderr, where somebody watches and there is something to wait for."""
    if texts < _PROGRESS_FROM or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("embedding", total=texts)

        async def on_progress(done: int) -> None:
            progress.update(task, completed=done)

        yield on_progress


def write(answer: object) -> None:
    """Write an answer to stdout: bytes as they are, and whatever rich can show."""
    if isinstance(answer, bytes):
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.flush()
        return
    from rich.console import Console

    # A file or a pipe has no edge at which a table's columns would have to be cut.
    Console(width=None if sys.stdout.isatty() else _WIDEST).print(answer)

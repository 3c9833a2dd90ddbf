"""When the default model is loaded: before the server starts (eager), in the background, or on first use (lazy)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from embeddings_mcp.errors import EmbeddingsError
from embeddings_mcp.service import EmbeddingService
from embeddings_mcp.settings import Load

logger = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def preloaded(
    service: EmbeddingService, load: Load, *, after: Callable[[], Awaitable[object]] | None = None
) -> AsyncIterator[None]:
    """Load the default model of `service` as the setting says: before this block, concurrently with it, or not at all.

    Args:
        service: the service whose default model is loaded.
        load: the setting.
        after: awaited before loading in the background, so that loading does not delay a response that the host is
            waiting for.

    Raises:
        ModelUnavailable: `load` is "eager", and the model cannot be loaded.
    """
    if load == "eager":
        await service.load_default()
    task = asyncio.create_task(_load_in_background(service, after)) if load == "background" else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()


async def _load_in_background(service: EmbeddingService, after: Callable[[], Awaitable[object]] | None) -> None:
    if after is not None:
        await after()
    try:
        await service.load_default()
    except EmbeddingsError as error:  # the first request tries again, and gets the error too
        logger.warning("The default model is not loaded: %s", error.message)

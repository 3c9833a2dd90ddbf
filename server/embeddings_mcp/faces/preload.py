"""When the default model is loaded: before the server answers, beside its first answers, or when it is first needed."""

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
    """Load the default model of `service` before this block, or beside it, as the setting says.

    Args:
        service: whose default model.
        load: the setting.
        after: what loading beside the block waits for, so that it holds up no answer that a host waits for.

    Raises:
        ModelUnavailable: it is to be loaded before the block, and cannot be.
    """
    if load == "eager":
        await service.load_default()
    beside = asyncio.create_task(_load_beside(service, after)) if load == "background" else None
    try:
        yield
    finally:
        if beside is not None:
            beside.cancel()


async def _load_beside(service: EmbeddingService, after: Callable[[], Awaitable[object]] | None) -> None:
    if after is not None:
        await after()
    try:
        await service.load_default()
    except EmbeddingsError as error:  # who asks for a vector tries again, and gets to hear it too
        logger.warning("The default model is not loaded: %s", error.message)

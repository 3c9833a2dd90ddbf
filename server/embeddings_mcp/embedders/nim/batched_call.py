"""One call to embed texts, split into batches that are embedded concurrently."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import anyio

from embeddings_mcp.embedders.base import Embeddings, OnProgress, OnRows
from embeddings_mcp.errors import EmbeddingsError


class BatchedCall:
    """Embeds the batches of one call concurrently; the first failure cancels the others.

    Args:
        texts: of the whole call.
        batch_size: maximum number of texts in a batch.
        embed: embeds a batch, given the index of its first text.
        on_progress: called with the number of texts done.
        on_rows: called with the rows of each batch as it completes.

    Attributes:
        requests: number of batches.
        done: number of texts embedded so far.
    """

    def __init__(
        self,
        texts: Sequence[str],
        batch_size: int,
        embed: Callable[[Sequence[str], int], Awaitable[Embeddings]],
        on_progress: OnProgress | None,
        on_rows: OnRows | None,
    ) -> None:
        self._texts = texts
        self._batch_size = batch_size
        self._embed = embed
        self._on_progress = on_progress
        self._on_rows = on_rows
        self._results: dict[int, Embeddings] = {}
        self._failures: list[EmbeddingsError] = []
        starts = range(0, len(texts), batch_size)
        self._pending = iter(starts)
        self.requests = len(starts)
        self.done = 0

    async def run(self, workers: int) -> list[Embeddings]:
        """Embed all batches and return their results in the order of the texts."""
        async with anyio.create_task_group() as group:
            for _ in range(workers):
                group.start_soon(self._work, group.cancel_scope)
        if self._failures:
            raise self._failures[0]
        return [self._results[start] for start in sorted(self._results)]

    async def _work(self, all_workers: anyio.CancelScope) -> None:
        for start in self._pending:
            batch = self._texts[start : start + self._batch_size]
            try:
                embeddings = self._results[start] = await self._embed(batch, start)
            except EmbeddingsError as error:
                self._failures.append(error)
                all_workers.cancel()
                return
            if self._on_rows is not None:
                self._on_rows(range(start, start + len(batch)), embeddings)
            self.done += len(batch)
            if self._on_progress is not None:
                await self._on_progress(self.done)

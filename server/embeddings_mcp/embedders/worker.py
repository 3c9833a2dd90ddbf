"""The local encoder behind the embedder protocol: loaded on first use, and never run on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import numpy as np

from embeddings_mcp.embedders.base import Embeddings, OnProgress
from embeddings_mcp.errors import ServerStopped
from embeddings_mcp.models import InputType, ModelCard, Truncate

if TYPE_CHECKING:
    from embeddings_mcp.embedders.local.encoder import Encoder


class LocalEmbedder:
    """Embeds with a model that runs in this process.

    The model is loaded when it is first needed, once for all who wait for it, while the event loop goes on. Its batches
    run one at a time on worker threads, and callers take turns batch by batch: a short request waits for one batch of a
    long one, not for all of them.

    Args:
        card: what is known of the model before it is loaded.
        load: loads it; called on a thread of its own.
    """

    origin = "local"

    def __init__(self, card: ModelCard, load: Callable[[], Encoder]) -> None:
        self.card = card
        self._load = load
        self._loading: asyncio.Future[Encoder] | None = None
        self._turn = anyio.CapacityLimiter(1)
        self._closed = False

    async def embed(
        self,
        texts: Sequence[str],
        *,
        input_type: InputType | None,
        truncate: Truncate,
        on_progress: OnProgress | None = None,
    ) -> Embeddings:
        """See `Embedder.embed`."""
        encoder = await self._encoder()
        tokens = await anyio.to_thread.run_sync(
            lambda: encoder.tokenize(texts, input_type=input_type, truncate=truncate)
        )
        vectors = np.empty((len(texts), encoder.dimensions), dtype=np.float32)
        done = 0
        for batch in encoder.batches(tokens):
            vectors[batch] = await anyio.to_thread.run_sync(encoder.forward, tokens, batch, limiter=self._turn)
            done += len(batch)
            if on_progress is not None:
                await on_progress(done)
        return Embeddings(vectors, prompt_tokens=tokens.count)

    async def check(self) -> None:
        """See `Embedder.check`: loads the model if it is not loaded yet."""
        await self._encoder()

    async def aclose(self) -> None:
        """Take no more work; a batch that is running ends by itself."""
        self._closed = True

    async def _encoder(self) -> Encoder:
        """The loaded model; who is cancelled while it loads does not disturb the others who wait."""
        if self._closed:
            raise ServerStopped("the server is shutting down")
        if self._loading is None:
            self._loading = self._start_loading()
        loading = self._loading
        try:
            encoder = await asyncio.shield(loading)
        except Exception:
            # What failed may be a network or a disk: whoever asks next tries again.
            if self._loading is loading:
                self._loading = None
            raise
        self.card = encoder.card
        return encoder

    def _start_loading(self) -> asyncio.Future[Encoder]:
        """Load on a daemon thread, since neither a download nor a disk that hangs may hold up the server's end."""
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[Encoder] = loop.create_future()

        def settle(outcome: Callable[[], None]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(outcome)

        def work() -> None:
            try:
                encoder = self._load()
            except Exception as error:  # noqa: BLE001 - raised again where it is awaited
                failure = error
                settle(lambda: loaded.set_exception(failure))
            else:
                settle(lambda: loaded.set_result(encoder))

        threading.Thread(target=work, name=f"load {self.card.id}", daemon=True).start()
        # With nobody left to await it, a failure is told to the next who asks, not to the log.
        loaded.add_done_callback(lambda future: future.cancelled() or future.exception())
        return loaded

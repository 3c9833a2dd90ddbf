"""The local encoder behind the embedder protocol: loaded on first use, and never run on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import numpy as np

from embeddings_mcp.embedders.base import Embeddings, OnProgress, Representations
from embeddings_mcp.errors import ServerStopped
from embeddings_mcp.models import InputType, ModelCard, Truncate
from embeddings_mcp.vectors import FloatMatrix, SparseVector

if TYPE_CHECKING:
    from embeddings_mcp.embedders.local.encoder import Encoder, Tokens


_STOPPED = "the server is shutting down"


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
        vectors = np.empty((len(texts), encoder.dimensions), dtype=np.float32)

        def forward(tokens: Tokens, batch: list[int]) -> None:
            vectors[batch] = encoder.forward(tokens, batch)

        tokens = await self._in_batches(
            encoder, texts, forward, input_type=input_type, truncate=truncate, on_progress=on_progress
        )
        return Embeddings(vectors, prompt_tokens=tokens.count)

    async def represent(
        self,
        texts: Sequence[str],
        *,
        input_type: InputType | None,
        truncate: Truncate,
        on_progress: OnProgress | None = None,
    ) -> Representations:
        """See `MultiEmbedder.represent`."""
        encoder = await self._encoder()
        vectors = np.empty((len(texts), encoder.dimensions), dtype=np.float32)
        others: dict[int, tuple[SparseVector, FloatMatrix]] = {}

        def forward(tokens: Tokens, batch: list[int]) -> None:
            vectors[batch], sparse, colbert = encoder.forward_all(tokens, batch)
            others.update(zip(batch, zip(sparse, colbert, strict=True), strict=True))

        tokens = await self._in_batches(
            encoder, texts, forward, input_type=input_type, truncate=truncate, on_progress=on_progress
        )
        in_order = [others[index] for index in range(len(texts))]
        return Representations(
            vectors,
            sparse=[sparse for sparse, _ in in_order],
            colbert=[colbert for _, colbert in in_order],
            prompt_tokens=tokens.count,
        )

    async def _in_batches(
        self,
        encoder: Encoder,
        texts: Sequence[str],
        forward: Callable[[Tokens, list[int]], None],
        *,
        input_type: InputType | None,
        truncate: Truncate,
        on_progress: OnProgress | None,
    ) -> Tokens:
        """Tokenize `texts`, and have `forward` called on a worker thread for one batch after the other."""

        def tokenize() -> tuple[Tokens, list[list[int]]]:
            tokens = encoder.tokenize(texts, input_type=input_type, truncate=truncate)
            return tokens, encoder.batches(tokens)

        def in_turn(batch: list[int]) -> None:
            self._check_open()  # once it is this batch's turn
            forward(tokens, batch)

        tokens, batches = await anyio.to_thread.run_sync(tokenize)
        done = 0
        for batch in batches:
            await anyio.to_thread.run_sync(in_turn, batch, limiter=self._turn)
            done += len(batch)
            if on_progress is not None:
                await on_progress(done)
        return tokens

    async def check(self) -> None:
        """See `Embedder.check`: loads the model if it is not loaded yet."""
        await self._encoder()

    async def aclose(self) -> None:
        """Take no more work, and let the model go; a batch that is running ends by itself."""
        self._closed = True
        if self._loading is not None and not self._loading.done():
            self._loading.set_exception(ServerStopped(_STOPPED))
        self._loading = None

    def _check_open(self) -> None:
        if self._closed:
            raise ServerStopped(_STOPPED)

    async def _encoder(self) -> Encoder:
        """The loaded model; who is cancelled while it loads does not disturb the others who wait."""
        self._check_open()
        if self._loading is None:
            self._loading = self._start_loading()
        encoder = await asyncio.shield(self._loading)
        self.card = encoder.card
        return encoder

    def _start_loading(self) -> asyncio.Future[Encoder]:
        """Load on a daemon thread, since neither a download nor a disk that hangs may hold up the server's end."""
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[Encoder] = loop.create_future()
        loaded.add_done_callback(self._forget_failure)

        def report(outcome: Callable[[Any], None], value: object) -> None:
            def settle() -> None:
                if not loaded.done():  # as it is once the embedder was closed
                    outcome(value)

            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(settle)

        def work() -> None:
            try:
                encoder = self._load()
            except Exception as error:  # noqa: BLE001 - raised again where it is awaited
                report(loaded.set_exception, error)
            else:
                report(loaded.set_result, encoder)

        threading.Thread(target=work, name=f"load {self.card.id}", daemon=True).start()
        return loaded

    def _forget_failure(self, loading: asyncio.Future[Encoder]) -> None:
        """What failed may be a network or a disk: whoever asks next tries again."""
        if loading.exception() is not None and self._loading is loading:
            self._loading = None

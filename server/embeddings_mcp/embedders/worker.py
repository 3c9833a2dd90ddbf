"""The local encoder behind the embedder protocol: loaded on first use, and never run on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import anyio
import anyio.to_thread
import numpy as np

from embeddings_mcp.embedders.base import Embeddings, OnProgress, OnRows, Representations
from embeddings_mcp.errors import ServerStopped
from embeddings_mcp.models import InputType, ModelCard, Truncate
from embeddings_mcp.vectors import FloatMatrix, SparseVector

if TYPE_CHECKING:
    from embeddings_mcp.embedders.local.encoder import Encoder, Tokens

_Made = TypeVar("_Made")

_STOPPED = "the server is shutting down"


class LocalEmbedder:
    """Embeds with a model that runs in this process.

    The model is loaded when it is first needed, once for all who wait for it, while the event loop goes on. Its batches
    run one at a time on worker threads, and callers take turns batch by batch: a short request waits for one batch of a
    long one, not for all of them.

    Args:
        card: what is known of the model before it is loaded.
        load: loads it; called on a thread of its own.
        identify: finds its files without loading them, and says what identifies its vectors and what its card is;
            called on a thread of its own.
    """

    origin = "local"

    def __init__(
        self, card: ModelCard, load: Callable[[], Encoder], identify: Callable[[], tuple[str, ModelCard]]
    ) -> None:
        self.card = card
        self._loaded = _Once(f"load {card.id}", load)
        self._identified = _Once(f"identify {card.id}", identify)
        self._turn = anyio.CapacityLimiter(1)
        self._closed = False

    async def identify(self) -> str:
        """See `Embedder.identify`."""
        self._check_open()
        identity, self.card = await self._identified.get()
        return identity

    async def embed(
        self,
        texts: Sequence[str],
        *,
        input_type: InputType | None,
        truncate: Truncate,
        on_progress: OnProgress | None = None,
        on_rows: OnRows | None = None,
    ) -> Embeddings:
        """See `Embedder.embed`."""
        encoder = await self._encoder()
        vectors = np.empty((len(texts), encoder.dimensions), dtype=np.float32)

        def forward(tokens: Tokens, batch: list[int]) -> None:
            vectors[batch] = encoder.forward(tokens, batch)

        def pass_on(batch: list[int], counts: list[int]) -> None:
            if on_rows is not None:
                on_rows(batch, Embeddings(vectors[batch], counts))

        tokens = await self._in_batches(
            encoder, texts, forward, pass_on, input_type=input_type, truncate=truncate, on_progress=on_progress
        )
        return Embeddings(vectors, tokens.counts)

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
            encoder, texts, forward, lambda *_: None, input_type=input_type, truncate=truncate, on_progress=on_progress
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
        pass_on: Callable[[list[int], list[int]], None],
        *,
        input_type: InputType | None,
        truncate: Truncate,
        on_progress: OnProgress | None,
    ) -> Tokens:
        """Tokenize `texts`, and have one batch after the other made by `forward` on a worker thread and passed on."""

        def tokenize() -> tuple[Tokens, list[list[int]]]:
            tokens = encoder.tokenize(texts, input_type=input_type, truncate=truncate)
            return tokens, encoder.batches(tokens)

        def in_turn(batch: list[int]) -> None:
            self._check_open()  # once it is this batch's turn
            forward(tokens, batch)

        tokens, batches = await anyio.to_thread.run_sync(tokenize)
        counts = tokens.counts
        done = 0
        for batch in batches:
            await anyio.to_thread.run_sync(in_turn, batch, limiter=self._turn)
            pass_on(batch, [counts[index] for index in batch])
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
        self._loaded.close()
        self._identified.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ServerStopped(_STOPPED)

    async def _encoder(self) -> Encoder:
        self._check_open()
        encoder = await self._loaded.get()
        self.card = encoder.card
        return encoder


class _Once(Generic[_Made]):
    """Something that is made when it is first needed, and once for all who wait for it.

    It is made on a daemon thread, since neither a download nor a disk that hangs may hold up the server's end. Who is
    cancelled while waiting does not disturb the others.
    """

    def __init__(self, name: str, make: Callable[[], _Made]) -> None:
        self._name = name
        self._make = make
        self._made: asyncio.Future[_Made] | None = None

    async def get(self) -> _Made:
        """What was made; raises what making it raised."""
        if self._made is None:
            self._made = self._start()
        return await asyncio.shield(self._made)

    def close(self) -> None:
        """Let it go; those who still wait for it are refused."""
        if self._made is not None and not self._made.done():
            self._made.set_exception(ServerStopped(_STOPPED))
        self._made = None

    def _start(self) -> asyncio.Future[_Made]:
        loop = asyncio.get_running_loop()
        made: asyncio.Future[_Made] = loop.create_future()
        made.add_done_callback(self._forget_failure)

        def report(outcome: Callable[[Any], None], value: object) -> None:
            def settle() -> None:
                if not made.done():  # as it is once this was closed
                    outcome(value)

            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(settle)

        def work() -> None:
            try:
                value = self._make()
            except Exception as error:  # noqa: BLE001 - raised again where it is awaited
                report(made.set_exception, error)
            else:
                report(made.set_result, value)

        threading.Thread(target=work, name=self._name, daemon=True).start()
        return made

    def _forget_failure(self, made: asyncio.Future[_Made]) -> None:
        """What failed may be a network or a disk: whoever asks next tries again."""
        if made.exception() is not None and self._made is made:
            self._made = None

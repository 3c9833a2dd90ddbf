"""The embedder protocol: texts in, vectors and token counts out.

Everything that produces vectors (the local encoder, a NIM endpoint, a cache in front of either) implements `Embedder`,
so that the service depends on none of them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from embeddings_mcp.models import InputType, ModelCard, Truncate
from embeddings_mcp.vectors import FloatMatrix, SparseVector

OnProgress = Callable[[int], Awaitable[None]]
"""Called on the event loop with the number of the request's texts that are done so far, which never decreases."""


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The embeddings of a list of texts.

    Attributes:
        vectors: float32 ``[n, d]``, row i for text i, at the model's full dimension.
        tokens: number of tokens of each text as the model saw it: with prompt and special tokens, after truncation. An
            endpoint counts per request; its count is distributed over the request's texts by their length.
        served_model: the model id in an endpoint's response; None if there is only the card's id.
    """

    vectors: FloatMatrix
    tokens: Sequence[int]
    served_model: str | None = None

    @property
    def prompt_tokens(self) -> int:
        """Total number of tokens."""
        return sum(self.tokens)


OnRows = Callable[[Sequence[int], Embeddings], None]
"""Called on the event loop with the indices of some of a call's texts and their embeddings, as soon as they are done.

Each text is passed exactly once, before the call returns and before the progress that includes it is reported. What was
passed stays valid if the call fails later."""


@dataclass(frozen=True, slots=True)
class Representations:
    """The dense, sparse and multi-vector representations of a list of texts.

    Attributes:
        vectors: dense vectors, float32 ``[n, d]``.
        sparse: lexical weights of each text.
        colbert: token vectors of each text, float32 ``[tokens, d]``.
        prompt_tokens: total number of tokens, counted as in `Embeddings`.
        served_model: as in `Embeddings`.
    """

    vectors: FloatMatrix
    sparse: Sequence[SparseVector]
    colbert: Sequence[FloatMatrix]
    prompt_tokens: int
    served_model: str | None = None


class Embedder(Protocol):
    """A source of vectors for one model."""

    @property
    def card(self) -> ModelCard:
        """The model's capabilities and limits; may become more exact once the model has been loaded."""
        ...

    @property
    def origin(self) -> str:
        """Where the vectors are computed: ``local``, or the URL of an endpoint. Contains no secret."""
        ...

    async def identify(self) -> str:
        """Return a string that identifies this source of vectors: equal only where the vectors are equal.

        It covers everything that is neither in a request nor in `card`: weights, number format, URL. After this
        call, `card` is exact in all that affects vectors; the weights themselves are not loaded.

        Raises:
            ModelUnavailable: the model's files cannot be obtained.
        """
        ...

    async def embed(
        self,
        texts: Sequence[str],
        *,
        input_type: InputType | None,
        truncate: Truncate,
        on_progress: OnProgress | None = None,
        on_rows: OnRows | None = None,
    ) -> Embeddings:
        """Embed `texts`, each independently of the others.

        Cancelling the call removes from the queue what has not started.

        Raises:
            InputUnusable: a text cannot be embedded, for instance one that is too long where `truncate` is NONE;
                ``index`` is its index in `texts`.
            ModelUnavailable: the model cannot be loaded or reached.
            Overloaded: the queue is full.
            EmbeddingsError: an endpoint refuses the request for another reason.
        """
        ...

    async def check(self) -> None:
        """Return once the model is ready to embed.

        Raises:
            EmbeddingsError: it cannot be made ready; the error says why.
        """
        ...

    async def aclose(self) -> None:
        """Stop the work in progress and release all resources."""
        ...


@runtime_checkable
class MultiEmbedder(Embedder, Protocol):
    """An embedder whose card has more modes than ``dense``."""

    async def represent(
        self,
        texts: Sequence[str],
        *,
        input_type: InputType | None,
        truncate: Truncate,
        on_progress: OnProgress | None = None,
    ) -> Representations:
        """Return all representations that the model has of `texts`; otherwise like `Embedder.embed`.

        Raises:
            InputUnusable: a text cannot be embedded; ``index`` is its index in `texts`.
            ModelUnavailable: the model cannot be loaded, or has dense vectors only.
            Overloaded: the queue is full.
        """
        ...

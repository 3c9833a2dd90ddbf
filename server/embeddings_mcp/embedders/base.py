"""The one thing an embedder is: texts in, vectors and a token count out.

Everything that gives vectors (the local encoder, a NIM endpoint, a cache before either) follows `Embedder`, so the
service above needs to know none of them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from embeddings_mcp.models import InputType, ModelCard, Truncate
from embeddings_mcp.vectors import FloatMatrix, SparseVector

OnProgress = Callable[[int], Awaitable[None]]
"""Told, on the event loop, how many of the request's texts are done so far; the same again while it has to wait."""


@dataclass(frozen=True, slots=True)
class Embeddings:
    """What an embedder made of a list of texts.

    Attributes:
        vectors: float32 ``[n, d]``, row i for text i, at the model's full length.
        tokens: of each text, as the model saw it: prompt and special tokens included, after truncation. An endpoint
            counts by the request; its count is shared out over the request's texts by their length.
        served_model: the id under which an endpoint says that it served the model; None where the card's id is all
            there is.
    """

    vectors: FloatMatrix
    tokens: Sequence[int]
    served_model: str | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all the texts."""
        return sum(self.tokens)


OnRows = Callable[[Sequence[int], Embeddings], None]
"""Given, on the event loop, what was made of some of a call's texts as soon as it is: their positions, and their rows.

Every text comes once before the call returns, and before the progress that it makes. What has come stays good when the
call fails later."""


@dataclass(frozen=True, slots=True)
class Representations:
    """What a model that compares texts in more than one way made of a list of them.

    Attributes:
        vectors: the dense vectors, float32 ``[n, d]``.
        sparse: lexical weights of each text.
        colbert: vectors of each text's tokens, float32 ``[tokens, d]``.
        prompt_tokens: of all the texts, as in `Embeddings`.
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
        """What the model takes and gives; may become more exact once the model has been loaded."""
        ...

    @property
    def origin(self) -> str:
        """Where the vectors are made: ``local``, or the address of an endpoint. Holds no secret."""
        ...

    async def identify(self) -> str:
        """What tells this source of vectors from every other: the same only where the vectors are the same.

        It stands for all that is not in a request and not in `card`: weights, number format, address. From now on
        `card` is exact in what decides about vectors; the weights themselves are not loaded.

        Raises:
            ModelUnavailable: the model's files are not to be had.
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
        """Embed `texts`, each independent of its neighbours.

        Cancelling the call stops the work that has not begun.

        Raises:
            InputUnusable: a text cannot be embedded, as one that is too long where `truncate` is NONE; ``index`` says
                which.
            ModelUnavailable: the model cannot be loaded or reached.
            Overloaded: no room in the queue.
            EmbeddingsError: what an endpoint refuses besides.
        """
        ...

    async def check(self) -> None:
        """Return once the model can answer.

        Raises:
            EmbeddingsError: it cannot, and why.
        """
        ...

    async def aclose(self) -> None:
        """Stop the work in progress and free what the embedder holds."""
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
        """All that the model makes of `texts`; in the rest as `Embedder.embed`.

        Raises:
            InputUnusable: a text cannot be embedded; ``index`` says which.
            ModelUnavailable: the model cannot be loaded, or has only dense vectors.
            Overloaded: no room in the queue.
        """
        ...

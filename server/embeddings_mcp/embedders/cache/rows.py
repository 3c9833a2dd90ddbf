"""The rows of the cache, one per text, and their keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from embeddings_mcp.embedders.base import Embeddings
from embeddings_mcp.models import InputType, ModelCard, Truncate

Key = bytes
"""A 32-byte digest of a text and of everything else that its vector depends on."""

Kind = tuple[str | None, int]
"""The model id reported by the endpoint, if any, and the bytes of the vector; the same for all rows of a result."""


class Row(NamedTuple):
    """The embedding of one text.

    Attributes:
        vector: float32, little-endian.
        tokens: number of tokens, as in `Embeddings.tokens`.
        served_model: model that produced the vector, as in `Embeddings.served_model`.
    """

    vector: bytes
    tokens: int
    served_model: str | None = None

    @property
    def kind(self) -> Kind:
        """Only vectors of the same kind can be compared."""
        return self.served_model, len(self.vector)


def keys_of(
    texts: Sequence[str],
    *,
    identity: str,
    generation: str,
    card: ModelCard,
    input_type: InputType | None,
    truncate: Truncate,
) -> list[Key]:
    """Return the key of each text; equal keys imply equal vectors.

    Args:
        texts: not normalized in any way.
        identity: of the embedder (`Embedder.identify`).
        generation: of its rows (`Cache.generation`), so that rows computed while the cache is cleared are not found.
        card: of the embedder, read after `Embedder.identify`.
        input_type: part of the key in addition to its prompt, since an endpoint may prepend a prompt of its own.
        truncate: part of the key of every text, since it is not known here which texts are too long.
    """
    effective_type = None if card.input_type == "ignored" else input_type
    context = json.dumps([identity, generation, effective_type, card.prompt(input_type), truncate, card.max_tokens])
    salt = hashlib.blake2b(context.encode()).digest()
    return [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=salt, digest_size=32).digest() for text in texts]


def rows_of(embeddings: Embeddings) -> list[Row]:
    """Split embeddings into one row per text."""
    data = np.ascontiguousarray(embeddings.vectors, dtype="<f4").tobytes()
    size = len(data) // len(embeddings.tokens)
    return [
        Row(data[index * size : (index + 1) * size], int(tokens), embeddings.served_model)
        for index, tokens in enumerate(embeddings.tokens)
    ]


def embeddings_of(rows: Sequence[Row]) -> Embeddings:
    """Join one or more rows of the same kind; the array of vectors is read-only."""
    data = np.frombuffer(b"".join([row.vector for row in rows]), dtype="<f4")
    vectors = data.astype(np.float32, copy=False).reshape(len(rows), -1)
    return Embeddings(vectors, [row.tokens for row in rows], rows[0].served_model)

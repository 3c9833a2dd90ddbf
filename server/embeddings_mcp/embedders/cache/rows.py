"""What is remembered of a text, and the key under which it is found again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from embeddings_mcp.embedders.base import Embeddings
from embeddings_mcp.models import InputType, ModelCard, Truncate

Key = bytes
"""A digest of 32 bytes of a text and of everything else that decides about its vector."""


Kind = tuple[str | None, int]
"""The model that made a row, as far as an endpoint tells, and the bytes of its vector: alike for all of an answer."""


class Row(NamedTuple):
    """What was made of one text.

    Attributes:
        vector: float32, little-endian.
        tokens: of the text, as `Embeddings.tokens` has them.
        served_model: the model that made it, as `Embeddings.served_model` has it.
    """

    vector: bytes
    tokens: int
    served_model: str | None = None

    @property
    def kind(self) -> Kind:
        """What must be alike for vectors to be compared."""
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
    """The key of each text: the same only where the vectors are the same.

    Args:
        texts: taken as they are, to the character.
        identity: of the embedder (`Embedder.identify`).
        generation: of its rows (`Cache.generation`): what is still being made while they are cleared is found no more.
        card: of the embedder, once it is exact.
        input_type: counts by itself beside its prompt, for an endpoint may put a prompt of its own before the text.
        truncate: counts for every text, since how long a text is for the model is not known here.
    """
    asked_type = None if card.input_type == "ignored" else input_type
    context = json.dumps([identity, generation, asked_type, card.prompt(input_type), truncate, card.max_tokens])
    salt = hashlib.blake2b(context.encode()).digest()
    return [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=salt, digest_size=32).digest() for text in texts]


def rows_of(made: Embeddings) -> list[Row]:
    """What an embedder made, text by text."""
    data = np.ascontiguousarray(made.vectors, dtype="<f4").tobytes()
    size = len(data) // len(made.tokens)
    return [
        Row(data[place * size : (place + 1) * size], int(tokens), made.served_model)
        for place, tokens in enumerate(made.tokens)
    ]


def gathered(rows: Sequence[Row]) -> Embeddings:
    """Rows of one model, at least one, as an embedder would give them; the vectors cannot be written to."""
    data = np.frombuffer(b"".join([row.vector for row in rows]), dtype="<f4")
    vectors = data.astype(np.float32, copy=False).reshape(len(rows), -1)
    return Embeddings(vectors, [row.tokens for row in rows], rows[0].served_model)

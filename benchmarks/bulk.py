"""Many texts through an encoder on one thread, as a program has them embedded that needs no server and no queue."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from embeddings_mcp.embedders.base import Embeddings
from embeddings_mcp.embedders.local.encoder import Encoder
from embeddings_mcp.embedders.local.inputs import Row
from embeddings_mcp.models import InputType, Truncate


def encode(
    encoder: Encoder, texts: Sequence[str], *, input_type: InputType | None = None, truncate: Truncate = "NONE"
) -> Embeddings:
    """Embed texts from the first to the last step.

    Raises:
        InputTooLong: a text is too long and `truncate` is NONE.
    """
    # A CPU would only compute them earlier, and padding costs least in batches that are made of all texts.
    computes_meanwhile = encoder.facts.packed and encoder.device.type != "cpu"
    rows: list[Row] = []
    waiting: list[int] = []  # those of them that are not launched
    made: list[tuple[list[int], torch.Tensor]] = []

    def launch(batches: Iterable[list[int]]) -> None:
        made.extend((batch, encoder.launch([rows[index] for index in batch], tokens.skip)) for batch in batches)

    for tokens in encoder.tokenize(texts, input_type=input_type, truncate=truncate):
        waiting += range(len(rows), len(rows) + len(tokens.rows))
        rows += tokens.rows
        if computes_meanwhile:
            *full, waiting = _batches(encoder, rows, waiting)
            launch(full)
    # All are launched before any is waited for, so that a GPU never waits for the next.
    launch(_batches(encoder, rows, waiting))
    vectors = np.empty((len(texts), encoder.facts.dimensions), dtype=np.float32)
    for batch, some in made:
        vectors[batch] = some.cpu().numpy()
    return Embeddings(vectors, [len(row) for row in rows])


def _batches(encoder: Encoder, rows: Sequence[Row], which: Iterable[int]) -> list[list[int]]:
    """Which of some rows go through the model together: neighbours in length, within the token budget."""
    order = sorted(which, key=lambda index: len(rows[index]), reverse=True)
    batches: list[list[int]] = []
    spent = encoder.facts.tokens_per_batch
    for index in order:
        # Padded, every text of a batch costs as much as its longest, which is its first.
        cost = len(rows[index if encoder.facts.packed or not batches else batches[-1][0]])
        if spent + cost > encoder.facts.tokens_per_batch:
            batches.append([])
            cost, spent = len(rows[index]), 0
        batches[-1].append(index)
        spent += cost
    return batches

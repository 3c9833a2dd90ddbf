"""Embed many texts with an encoder on one thread, as a program does without a server and its queue."""

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
    """Tokenize and embed texts.

    Raises:
        InputTooLong: a text is too long and `truncate` is NONE.
    """
    # On a CPU, starting early gains nothing, and padding costs least when batches are chosen from all texts.
    launch_early = encoder.info.packed and encoder.device.type != "cpu"
    rows: list[Row] = []
    waiting: list[int] = []  # indices of rows that are not launched yet
    launched: list[tuple[list[int], torch.Tensor]] = []

    def launch(batches: Iterable[list[int]]) -> None:
        launched.extend((batch, encoder.launch([rows[index] for index in batch], tokens.skip)) for batch in batches)

    for tokens in encoder.tokenize(texts, input_type=input_type, truncate=truncate):
        waiting += range(len(rows), len(rows) + len(tokens.rows))
        rows += tokens.rows
        if launch_early:
            *full, waiting = _batches(encoder, rows, waiting)
            launch(full)
    # Launch all batches before waiting for any, so that a GPU never idles between them.
    launch(_batches(encoder, rows, waiting))
    vectors = np.empty((len(texts), encoder.info.dimensions), dtype=np.float32)
    for batch, output in launched:
        vectors[batch] = output.cpu().numpy()
    return Embeddings(vectors, [len(row) for row in rows])


def _batches(encoder: Encoder, rows: Sequence[Row], indices: Iterable[int]) -> list[list[int]]:
    """Group rows of similar length into batches within the token budget."""
    order = sorted(indices, key=lambda index: len(rows[index]), reverse=True)
    batches: list[list[int]] = []
    spent = encoder.info.tokens_per_batch
    for index in order:
        # With padding, every text costs as much as the longest in its batch, which is the first.
        cost = len(rows[index if encoder.info.packed or not batches else batches[-1][0]])
        if spent + cost > encoder.info.tokens_per_batch:
            batches.append([])
            cost, spent = len(rows[index]), 0
        batches[-1].append(index)
        spent += cost
    return batches

"""BGE-M3's outputs in addition to the dense vector: lexical weights, and a vector per token (arXiv 2402.03216).

The layers, the tokens that they exclude and the scoring (see `vectors`) follow FlagEmbedding's `BGEM3FlagModel`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch

from embeddings_mcp.embedders.local.checkpoint import M3_FILES
from embeddings_mcp.embedders.local.packing import Packing
from embeddings_mcp.embedders.local.weights import load_weights
from embeddings_mcp.vectors import FloatMatrix, SparseVector


class M3Heads:
    """The output heads for lexical weights and for token vectors (ColBERT); they compute in float32.

    Args:
        folder: the checkpoint.
        hidden_size: length of a token vector.
        weightless: ids of the special tokens, which have no lexical weight.
        device: the device to compute on.
    """

    def __init__(self, folder: Path, *, hidden_size: int, weightless: Collection[int], device: torch.device) -> None:
        self._sparse = torch.nn.Linear(hidden_size, 1)
        self._colbert = torch.nn.Linear(hidden_size, hidden_size)
        for layer, name in zip((self._sparse, self._colbert), M3_FILES, strict=True):
            load_weights(layer, folder / name)
            layer.eval().to(device)
        self._weightless = np.array(sorted(weightless), dtype=np.int64)

    def sparse(self, hidden: torch.Tensor, rows: Sequence[Sequence[int]]) -> list[SparseVector]:
        """Return the lexical weights of each text: per token id, the maximum over its occurrences, if above zero.

        Args:
            hidden: ``[tokens, d]``, the token vectors of the packed row.
            rows: the token ids of each text.
        """
        weights = torch.relu(self._sparse(hidden.float()))[:, 0].cpu().numpy()
        ends = np.cumsum([len(row) for row in rows])
        return [
            self._lexical(np.array(row, dtype=np.int64), weights[end - len(row) : end])
            for row, end in zip(rows, ends, strict=True)
        ]

    def _lexical(self, ids: np.ndarray[tuple[int], np.dtype[np.int64]], weights: FloatMatrix) -> SparseVector:
        unique_ids, inverse = np.unique(ids, return_inverse=True)
        maxima = np.zeros(len(unique_ids), dtype=np.float32)
        np.maximum.at(maxima, inverse, weights)
        kept = (maxima > 0) & ~np.isin(unique_ids, self._weightless)
        return SparseVector(unique_ids[kept], maxima[kept])

    def colbert(self, hidden: torch.Tensor, packing: Packing) -> list[FloatMatrix]:
        """Return a unit vector for every token of each text except the first (``<s>``), float32 ``[tokens - 1, d]``."""
        vectors = torch.nn.functional.normalize(self._colbert(hidden.float()), dim=1).cpu().numpy()
        ends = np.cumsum(packing.lengths)
        return [vectors[end - length + 1 : end] for length, end in zip(packing.lengths, ends, strict=True)]

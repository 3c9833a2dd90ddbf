"""Vector mathematics: pure numpy functions without I/O.

Matrices are float32 ``[n, d]``, one vector a row.
"""

from __future__ import annotations

import base64
from typing import Literal

import numpy as np
import numpy.typing as npt

FloatMatrix = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float32]
Positions = npt.NDArray[np.intp]

Metric = Literal["cosine", "dot", "euclidean"]

_SCORES_AT_ONCE = 1 << 20
"""Scores that are held at the same time in a search for the closest pairs."""


def normalize(vectors: FloatMatrix) -> FloatMatrix:
    """Scale each row to Euclidean length 1; a row of zeros stays zero.

    The floor under the length is that of ``torch.nn.functional.normalize``.
    """
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    normalized: FloatMatrix = vectors / np.maximum(lengths, np.float32(1e-12))
    return normalized


def shorten(vectors: FloatMatrix, dimensions: int) -> FloatMatrix:
    """Keep the first `dimensions` components of each row and renormalise.

    Meaningful only for models trained so that a prefix is a vector of its own (Matryoshka representation learning,
    arXiv 2205.13147).
    """
    return normalize(vectors[:, :dimensions])


def to_base64(vector: npt.NDArray[np.float32]) -> str:
    """The vector's bytes, little-endian float32, in base64: what OpenAI clients decode with ``frombuffer``."""
    return base64.b64encode(vector.astype("<f4", copy=False).tobytes()).decode("ascii")


def compare(left: FloatMatrix, right: FloatMatrix, metric: Metric) -> FloatMatrix:
    """Score every row of `left` ``[n, d]`` against every row of `right` ``[m, d]``.

    Returns:
        ``[n, m]``: cosine or dot product (higher is closer), or Euclidean distance (lower is closer).
    """
    if metric == "cosine":
        return normalize(left) @ normalize(right).T
    if metric == "dot":
        return left @ right.T
    # |a-b|^2 = |a|^2 - 2ab + |b|^2 needs no [n, m, d] array; in float64, since the terms cancel for near vectors.
    wide_left, wide_right = left.astype(np.float64), right.astype(np.float64)
    squares = (wide_left**2).sum(axis=1)[:, None] + (wide_right**2).sum(axis=1)[None, :]
    distances: FloatMatrix = np.sqrt(np.maximum(squares - 2 * (wide_left @ wide_right.T), 0.0)).astype(np.float32)
    return distances


def best_first(scores: Scores, metric: Metric, top_k: int | None) -> Positions:
    """Positions in the flat array `scores`, closest first, at most `top_k` of them; ties keep their order."""
    closeness = scores if metric == "euclidean" else -scores
    if top_k is None or top_k >= len(scores):
        return np.argsort(closeness, kind="stable")
    # Only what is as close as the last to be kept needs sorting.
    last = np.partition(closeness, top_k - 1)[top_k - 1]
    candidates = np.flatnonzero(closeness <= last)
    return candidates[np.argsort(closeness[candidates], kind="stable")][:top_k]


def closest_pairs(
    left: FloatMatrix, right: FloatMatrix | None, metric: Metric, top_k: int
) -> tuple[Positions, Positions, Scores]:
    """The `top_k` closest of all pairs of a row of `left` and a row of `right`, closest first.

    Without `right` the rows of `left` are paired with each other: two rows are one pair, and a row is none with itself.
    Ties keep the order of the matrix, row by row. Scores are made and dropped a block at a time, so that memory grows
    with `top_k` and not with the number of pairs.

    Returns:
        Positions in `left`, positions in `right` (or `left`), and scores, each at most `top_k` long.
    """
    within = right is None
    right = left if right is None else right
    furthest = np.float32(np.inf if metric == "euclidean" else -np.inf)
    rows, columns, scores = np.empty(0, np.intp), np.empty(0, np.intp), np.empty(0, np.float32)
    step = max(1, _SCORES_AT_ONCE // len(right))
    for start in range(0, len(left), step):
        block = compare(left[start : start + step], right, metric)
        if within:
            block[np.tri(*block.shape, k=start, dtype=np.bool_)] = furthest
        found = best_first(block.ravel(), metric, top_k)
        row, column = np.divmod(found, len(right))
        rows, columns = np.append(rows, row + start), np.append(columns, column)
        scores = np.append(scores, block.ravel()[found])
        kept = best_first(scores, metric, top_k)
        rows, columns, scores = rows[kept], columns[kept], scores[kept]
    pairs = columns > rows if within else np.ones(len(rows), np.bool_)
    return rows[pairs], columns[pairs], scores[pairs]

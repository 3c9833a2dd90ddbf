"""Vector mathematics: pure numpy functions without I/O.

Matrices are float32 ``[n, d]``, one vector a row.
"""

from __future__ import annotations

import base64
from typing import Literal

import numpy as np
import numpy.typing as npt

FloatMatrix = npt.NDArray[np.float32]

Metric = Literal["cosine", "dot", "euclidean"]


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


def best_first(scores: npt.NDArray[np.float32], metric: Metric, top_k: int | None) -> npt.NDArray[np.int64]:
    """Positions in the flat array `scores`, closest first, at most `top_k` of them; ties keep their order."""
    closeness = scores if metric == "euclidean" else -scores
    return np.argsort(closeness, kind="stable")[:top_k].astype(np.int64)

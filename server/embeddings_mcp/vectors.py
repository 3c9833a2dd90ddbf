"""Vector mathematics: pure numpy functions without I/O.

Matrices are float32 ``[n, d]``, one vector per row.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

FloatMatrix = npt.NDArray[np.float32]
FloatVector = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]

BlockScorer = Callable[[slice], Scores]
"""Returns the scores ``[k, m]`` of a slice of k texts on one side against all m texts on the other."""

Metric = Literal["cosine", "dot", "euclidean"]

EmbeddingType = Literal["float", "int8", "uint8", "binary", "ubinary"]

_BLOCK_SCORES = 1 << 20
"""Scores per block in `closest_pairs` and `column_maxima`, which bounds their memory."""


def normalize(vectors: FloatMatrix) -> FloatMatrix:
    """Scale each row to Euclidean length 1; a row of zeros stays zero.

    The lower bound on the length is that of ``torch.nn.functional.normalize``.
    """
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    normalized: FloatMatrix = vectors / np.maximum(lengths, np.float32(1e-12))
    return normalized


def shorten(vectors: FloatMatrix, dimensions: int) -> FloatMatrix:
    """Keep the first `dimensions` components of each row and renormalize.

    Meaningful only for models trained so that a prefix is itself an embedding (Matryoshka representation learning,
    arXiv 2205.13147).
    """
    return normalize(vectors[:, :dimensions])


def quantize(vectors: FloatMatrix, embedding_type: EmbeddingType) -> npt.NDArray[np.generic]:
    """Quantize each vector on its own, so that vectors of different requests can be compared.

    Calibration, with m the largest magnitude in the vector:

    - ``int8``: ``round(127 v / m)``, -127 to 127;
    - ``uint8``: the same plus 128, 1 to 255: subtract 128 before comparing;
    - ``ubinary``: one bit per component, 1 if it is above 0, eight to a byte, most significant bit first, the last
      byte padded with 0;
    - ``binary``: the same bytes minus 128, as signed integers.

    The scale of a vector is lost, which does not affect cosines. NVIDIA does not document the NIM's calibration; bits
    are packed as in sentence-transformers' ``quantize_embeddings``.

    Returns:
        ``[n, d]`` float32, int8 or uint8, or ``[n, ceil(d / 8)]`` int8 or uint8.
    """
    if embedding_type == "float":
        return vectors
    if embedding_type in {"binary", "ubinary"}:
        packed: npt.NDArray[np.uint8] = np.packbits(vectors > 0, axis=1)
        return packed if embedding_type == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)
    largest = np.maximum(np.abs(vectors).max(axis=1, keepdims=True), np.float32(1e-12))
    levels: npt.NDArray[np.int16] = np.rint(vectors * (127 / largest)).astype(np.int16)
    return levels.astype(np.int8) if embedding_type == "int8" else (levels + 128).astype(np.uint8)


def to_base64(vector: npt.NDArray[np.generic]) -> str:
    """Encode the vector's little-endian bytes in base64, which OpenAI clients decode as float32 with ``frombuffer``."""
    return base64.b64encode(vector.astype(vector.dtype.newbyteorder("<"), copy=False).tobytes()).decode("ascii")


def dense_scorer(right: FloatMatrix, metric: Metric) -> Callable[[FloatMatrix], Scores]:
    """Return a function that scores vectors against every row of `right` ``[m, d]``, which is preprocessed only once.

    Returns:
        A function from vectors ``[n, d]`` to scores ``[n, m]``: cosine or dot product (higher is closer), or Euclidean
        distance (lower is closer).
    """
    if metric == "cosine":
        unit_right = normalize(right)
        return lambda left: normalize(left) @ unit_right.T
    if metric == "dot":
        return lambda left: left @ right.T
    # |a-b|^2 = |a|^2 - 2ab + |b|^2 needs no [n, m, d] array; in float64, because the terms cancel for close vectors.
    wide_right = right.astype(np.float64)
    right_squares = (wide_right**2).sum(axis=1)[None, :]

    def distances(left: FloatMatrix) -> Scores:
        wide_left = left.astype(np.float64)
        squares = (wide_left**2).sum(axis=1)[:, None] + right_squares
        scores: Scores = np.sqrt(np.maximum(squares - 2 * (wide_left @ wide_right.T), 0.0)).astype(np.float32)
        return scores

    return distances


def best_first(scores: Scores, metric: Metric, top_k: int) -> Indices:
    """Return at most `top_k` indices into the flat array `scores`, closest first; ties keep their order."""
    closeness = scores if metric == "euclidean" else -scores
    if top_k >= len(scores):
        return np.argsort(closeness, kind="stable")
    # Only scores at least as close as the last one returned need sorting.
    last = np.partition(closeness, top_k - 1)[top_k - 1]
    candidates = np.flatnonzero(closeness <= last)
    return candidates[np.argsort(closeness[candidates], kind="stable")][:top_k]


def closest_pairs(
    score: BlockScorer, rows: int, columns: int | None, metric: Metric, top_k: int
) -> tuple[Indices, Indices, Scores]:
    """Return the `top_k` closest pairs of a row and a column, closest first.

    If `columns` is None, the rows are paired with each other: two rows form one pair, and no row is paired with itself.
    Ties keep the row-major order of the matrix. Scores are computed block by block, so that memory grows with `top_k`
    and not with the number of pairs.

    Args:
        score: returns the scores ``[k, columns]`` of a slice of k rows.
        rows: number of rows.
        columns: number of columns, or None.
        metric: determines whether higher or lower scores are closer.
        top_k: maximum number of pairs.

    Returns:
        Row indices, column indices and scores, each at most `top_k` long.
    """
    symmetric = columns is None
    width = rows if columns is None else columns
    furthest = np.float32(np.inf if metric == "euclidean" else -np.inf)
    left, right, scores = np.empty(0, np.intp), np.empty(0, np.intp), np.empty(0, np.float32)
    step = max(1, _BLOCK_SCORES // width)
    for start in range(0, rows, step):
        block = score(slice(start, start + step))
        if symmetric:
            block[np.tri(len(block), width, k=start, dtype=np.bool_)] = furthest
        best = best_first(block.ravel(), metric, top_k)
        row, column = np.divmod(best, width)
        left, right = np.append(left, row + start), np.append(right, column)
        scores = np.append(scores, block.ravel()[best])
        kept = best_first(scores, metric, top_k)
        left, right, scores = left[kept], right[kept], scores[kept]
    pairs = right > left if symmetric else np.ones(len(left), np.bool_)
    return left[pairs], right[pairs], scores[pairs]


def column_maxima(score: BlockScorer, rows: int, columns: int) -> Scores:
    """Return the highest score of each column, ``[columns]``, computed block by block like `closest_pairs`."""
    step = max(1, _BLOCK_SCORES // columns)
    return functools.reduce(np.maximum, (score(slice(start, start + step)).max(0) for start in range(0, rows, step)))


# --- Sparse and multi-vector representations -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SparseVector:
    """The lexical weights of a text's tokens; tokens that are not listed have weight 0.

    Attributes:
        ids: token ids ``[k]``, ascending and unique.
        weights: float32 ``[k]``, above 0.
    """

    ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]


def lexical_scorer(right: Sequence[SparseVector]) -> Callable[[Sequence[SparseVector]], Scores]:
    """Return a function that scores lexical weights against all m of `right`, which are preprocessed only once.

    Returns:
        A function from n texts to scores ``[n, m]``: the sum, over the tokens that two texts share, of the product of
        their weights; higher is closer.
    """
    ids = np.concatenate([vector.ids for vector in right])
    weights = np.concatenate([vector.weights for vector in right])
    columns = np.repeat(np.arange(len(right)), [len(vector.ids) for vector in right])

    def score(left: Sequence[SparseVector]) -> Scores:
        scores = np.empty((len(left), len(right)), dtype=np.float32)
        # The weights of one left text, indexed by token id, are multiplied with those of all right texts at once.
        largest_id = max(int(token_ids.max(initial=0)) for token_ids in (ids, *(vector.ids for vector in left)))
        dense = np.zeros(largest_id + 1, np.float32)
        for row, vector in enumerate(left):
            dense[vector.ids] = vector.weights
            scores[row] = np.bincount(columns, dense[ids] * weights, minlength=len(right))
            dense[vector.ids] = 0
        return scores

    return score


def late_interaction_scores(left: Sequence[FloatMatrix], right: Sequence[FloatMatrix]) -> Scores:
    """Compute ColBERT's MaxSim: the mean, over a left text's tokens, of each one's best match in the right text.

    Args:
        left: unit-length token vectors ``[tokens, d]`` of each text; queries go on this side.
        right: the same for the other texts.

    Returns:
        Scores ``[n, m]``; higher is closer, not symmetric.
    """
    scores = np.zeros((len(left), len(right)), dtype=np.float32)
    for row, left_tokens in enumerate(left):
        for column, right_tokens in enumerate(right):
            scores[row, column] = (left_tokens @ right_tokens.T).max(axis=1).mean()
    return scores


def hybrid_scores(dense: Scores, lexical: Scores, late_interaction: Scores) -> Scores:
    """Combine the three kinds of scores, weighted 0.4, 0.2 and 0.4 as in BGE-M3's model card."""
    combined: Scores = np.float32(0.4) * dense + np.float32(0.2) * lexical + np.float32(0.4) * late_interaction
    return combined

"""Vector mathematics: pure numpy functions without I/O.

Matrices are float32 ``[n, d]``, one vector a row.
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
Positions = npt.NDArray[np.intp]

ScoreBlock = Callable[[slice], Scores]
"""The scores ``[k, m]`` of k texts of one side with all m of the other."""

Metric = Literal["cosine", "dot", "euclidean"]

EmbeddingType = Literal["float", "int8", "uint8", "binary", "ubinary"]

_SCORES_AT_ONCE = 1 << 20
"""Scores that are held at the same time in a search for the closest pairs, or for what is closest to any of some."""


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


def quantize(vectors: FloatMatrix, embedding_type: EmbeddingType) -> npt.NDArray[np.generic]:
    """Write each vector in fewer bits; none depends on another, so that those of different requests can be compared.

    Calibration, with m the largest magnitude of the vector:

    - ``int8``: ``round(127 v / m)``, -127 to 127;
    - ``uint8``: the same plus 128, 1 to 255: subtract 128 before comparing;
    - ``ubinary``: one bit a component, 1 where it is above 0, eight to a byte, the first in the highest bit, the last
      byte filled up with 0;
    - ``binary``: the same bytes minus 128, as signed numbers.

    The scale of a vector is lost, which changes no cosine. NVIDIA does not say how the NIM calibrates; bits are packed
    as in sentence-transformers' ``quantize_embeddings``.

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
    """The vector's bytes in base64, little-endian: of float32, what OpenAI clients decode with ``frombuffer``."""
    return base64.b64encode(vector.astype(vector.dtype.newbyteorder("<"), copy=False).tobytes()).decode("ascii")


def comparing(right: FloatMatrix, metric: Metric) -> Callable[[FloatMatrix], Scores]:
    """Makes ready to score vectors against every row of `right` ``[m, d]``: what that takes of `right` is done once.

    Returns:
        Scores vectors ``[n, d]``: ``[n, m]``, cosine or dot product (higher is closer), or Euclidean distance (lower is
        closer).
    """
    if metric == "cosine":
        directions = normalize(right)
        return lambda left: normalize(left) @ directions.T
    if metric == "dot":
        return lambda left: left @ right.T
    # |a-b|^2 = |a|^2 - 2ab + |b|^2 needs no [n, m, d] array; in float64, since the terms cancel for near vectors.
    wide_right = right.astype(np.float64)
    right_squares = (wide_right**2).sum(axis=1)[None, :]

    def distances(left: FloatMatrix) -> Scores:
        wide_left = left.astype(np.float64)
        squares = (wide_left**2).sum(axis=1)[:, None] + right_squares
        made: Scores = np.sqrt(np.maximum(squares - 2 * (wide_left @ wide_right.T), 0.0)).astype(np.float32)
        return made

    return distances


def best_first(scores: Scores, metric: Metric, top_k: int) -> Positions:
    """Positions in the flat array `scores`, closest first, at most `top_k` of them; ties keep their order."""
    closeness = scores if metric == "euclidean" else -scores
    if top_k >= len(scores):
        return np.argsort(closeness, kind="stable")
    # Only what is as close as the last to be kept needs sorting.
    last = np.partition(closeness, top_k - 1)[top_k - 1]
    candidates = np.flatnonzero(closeness <= last)
    return candidates[np.argsort(closeness[candidates], kind="stable")][:top_k]


def closest_pairs(
    score: ScoreBlock, rows: int, columns: int | None, metric: Metric, top_k: int
) -> tuple[Positions, Positions, Scores]:
    """The `top_k` closest of all pairs of one of `rows` and one of `columns`, closest first.

    Without `columns` the rows are paired with each other: two rows are one pair, and a row is none with itself. Ties
    keep the order of the matrix, row by row. Scores are made and dropped a block at a time, so that memory grows with
    `top_k` and not with the number of pairs.

    Args:
        score: makes the scores ``[k, columns]`` of a slice of k rows.
        rows: how many rows there are.
        columns: how many columns there are, or None.
        metric: says which way closer is.
        top_k: how many pairs at most.

    Returns:
        Positions of the rows, positions of the columns, and scores, each at most `top_k` long.
    """
    within = columns is None
    width = rows if columns is None else columns
    furthest = np.float32(np.inf if metric == "euclidean" else -np.inf)
    left, right, scores = np.empty(0, np.intp), np.empty(0, np.intp), np.empty(0, np.float32)
    step = max(1, _SCORES_AT_ONCE // width)
    for start in range(0, rows, step):
        block = score(slice(start, start + step))
        if within:
            block[np.tri(len(block), width, k=start, dtype=np.bool_)] = furthest
        found = best_first(block.ravel(), metric, top_k)
        row, column = np.divmod(found, width)
        left, right = np.append(left, row + start), np.append(right, column)
        scores = np.append(scores, block.ravel()[found])
        kept = best_first(scores, metric, top_k)
        left, right, scores = left[kept], right[kept], scores[kept]
    pairs = right > left if within else np.ones(len(left), np.bool_)
    return left[pairs], right[pairs], scores[pairs]


def best_of_rows(score: ScoreBlock, rows: int, columns: int) -> Scores:
    """The highest score of each column, ``[columns]``, made a block at a time as those of `closest_pairs`."""
    step = max(1, _SCORES_AT_ONCE // columns)
    return functools.reduce(np.maximum, (score(slice(start, start + step)).max(0) for start in range(0, rows, step)))


# --- More than one vector a text -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SparseVector:
    """Weights of the tokens that a text is about, all others being 0.

    Attributes:
        ids: token ids ``[k]``, ascending, each once.
        weights: float32 ``[k]``, above 0.
    """

    ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]


def comparing_weights(right: Sequence[SparseVector]) -> Callable[[Sequence[SparseVector]], Scores]:
    """As `comparing`, for lexical weights: what is made ready of `right` serves all texts that are scored against it.

    Returns:
        Scores n texts, ``[n, m]``: sums, over the tokens that two texts share, of the product of their weights; higher
        is closer.
    """
    ids = np.concatenate([vector.ids for vector in right])
    weights = np.concatenate([vector.weights for vector in right])
    columns = np.repeat(np.arange(len(right)), [len(vector.ids) for vector in right])

    def scores(left: Sequence[SparseVector]) -> Scores:
        made = np.empty((len(left), len(right)), dtype=np.float32)
        # A left text's weights stand by token id, so that all right texts are gone through at once.
        ours = np.zeros(1 + max(int(some.max(initial=0)) for some in (ids, *(one.ids for one in left))), np.float32)
        for row, one in enumerate(left):
            ours[one.ids] = one.weights
            made[row] = np.bincount(columns, ours[ids] * weights, minlength=len(right))
            ours[one.ids] = 0
        return made

    return scores


def late_interaction_scores(left: Sequence[FloatMatrix], right: Sequence[FloatMatrix]) -> Scores:
    """ColBERT's MaxSim: the mean, over a left text's tokens, of each one's best match in the right text.

    Args:
        left: for each text the vectors of its tokens ``[tokens, d]``, of length 1; those of a query come here.
        right: the same of the other texts.

    Returns:
        ``[n, m]``, higher is closer; not symmetric.
    """
    scores = np.zeros((len(left), len(right)), dtype=np.float32)
    for row, one in enumerate(left):
        for column, other in enumerate(right):
            scores[row, column] = (one @ other.T).max(axis=1).mean()
    return scores


def hybrid_scores(dense: Scores, lexical: Scores, late_interaction: Scores) -> Scores:
    """The three kinds of scores in one, weighed 0.4, 0.2 and 0.4 as in BGE-M3's model card."""
    mixed: Scores = np.float32(0.4) * dense + np.float32(0.2) * lexical + np.float32(0.4) * late_interaction
    return mixed

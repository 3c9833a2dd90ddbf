"""Vector mathematics, checked against the formulas in float64."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embeddings_mcp import vectors
from embeddings_mcp.vectors import (
    Metric,
    SparseVector,
    best_first,
    closest_pairs,
    column_maxima,
    dense_scorer,
    lexical_scorer,
    normalize,
    shorten,
    to_base64,
)

METRICS: list[Metric] = ["cosine", "dot", "euclidean"]

# Magnitudes from 2**-30 to 2**10, and 0: no model returns smaller ones, whose squares underflow in float32.
numbers = st.just(0.0) | st.floats(2**-30, 2**10, width=32) | st.floats(-(2**10), -(2**-30), width=32)
lengths = st.integers(1, 6)


def matrices(columns: int, min_rows: int = 1) -> st.SearchStrategy[npt.NDArray[np.float32]]:
    return hnp.arrays(np.float32, st.tuples(st.integers(min_rows, 6), st.just(columns)), elements=numbers)


def score(one: Any, other: Any, metric: Metric) -> float:
    """One score, by its definition, in float64."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    if metric == "euclidean":
        return float(np.sqrt(((a - b) ** 2).sum()))
    lengths = np.sqrt((a**2).sum()) * np.sqrt((b**2).sum()) if metric == "cosine" else 1.0
    return float((a * b).sum() / lengths) if lengths else 0.0


def closeness(scores: Any, metric: Metric) -> Any:
    return -scores if metric == "euclidean" else scores


# --- One vector ------------------------------------------------------------------------------------------------------


@given(lengths.flatmap(matrices))
def test_a_normalized_vector_has_length_one_and_keeps_its_direction(matrix: npt.NDArray[np.float32]) -> None:
    normalized = normalize(matrix)
    assert normalized.dtype == np.float32
    for vector, given_vector in zip(normalized.astype(np.float64), matrix.astype(np.float64), strict=True):
        length = np.sqrt((given_vector**2).sum())
        np.testing.assert_allclose(vector, given_vector / length if length else 0.0, rtol=1e-5, atol=1e-7)


def test_a_zero_vector_stays_zero() -> None:
    np.testing.assert_array_equal(normalize(np.zeros((1, 4), np.float32)), np.zeros((1, 4)))


@given(lengths.flatmap(matrices), st.data())
def test_a_shortened_vector_is_its_normalized_prefix(matrix: npt.NDArray[np.float32], data: st.DataObject) -> None:
    dimensions = data.draw(st.integers(1, matrix.shape[1]))
    before = matrix.copy()
    shortened = shorten(matrix, dimensions)
    assert shortened.shape == (len(matrix), dimensions)
    np.testing.assert_array_equal(shortened, normalize(matrix[:, :dimensions]))
    np.testing.assert_array_equal(matrix, before)


@given(hnp.arrays(np.float32, st.integers(0, 8), elements=st.floats(width=32, allow_nan=False)))
def test_base64_holds_the_bytes_of_little_endian_float32(vector: npt.NDArray[np.float32]) -> None:
    for order in ("<f4", ">f4"):
        decoded = np.frombuffer(base64.b64decode(to_base64(vector.astype(order))), dtype="<f4")
        assert decoded.tobytes() == vector.tobytes()


def test_a_column_of_a_matrix_is_encoded_like_any_vector() -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(to_base64(matrix[:, 1])), "<f4"), [1, 4])


# --- Scores ----------------------------------------------------------------------------------------------------------


def rounding_error(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32], metric: Metric) -> float:
    """Return the absolute rounding error of a score, which is relative to the largest terms of its sum."""
    if metric == "cosine":
        return 1e-5
    largest = max(float(np.abs(left).max()), float(np.abs(right).max()))
    square = left.shape[1] * largest**2
    return 1e-5 * max(1.0, square) if metric == "dot" else float(np.sqrt(16 * np.finfo(np.float64).eps * square))


@pytest.mark.parametrize("metric", METRICS)
@given(data=st.data(), columns=lengths)
def test_every_pair_has_the_score_of_the_definition(metric: Metric, data: st.DataObject, columns: int) -> None:
    left, right = data.draw(matrices(columns)), data.draw(matrices(columns))
    expected = np.array([[score(one, other, metric) for other in right] for one in left])
    scores = dense_scorer(right, metric)(left)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=rounding_error(left, right, metric))


def test_the_distance_of_close_vectors_survives_rounding() -> None:
    left = np.full((1, 384), 100, np.float32)
    right = left.copy()
    right[0, 0] += np.float32(2**-10)
    assert dense_scorer(right, "euclidean")(left)[0, 0] == pytest.approx(2**-10, rel=1e-3)
    assert dense_scorer(left, "euclidean")(left)[0, 0] == 0


weighted_texts = st.lists(
    st.dictionaries(st.integers(0, 9), st.floats(2**-10, 2, width=32), max_size=5), min_size=1, max_size=4
)


def sparse(weights: dict[int, float]) -> SparseVector:
    ids = sorted(weights)
    return SparseVector(np.array(ids, np.int64), np.array([weights[token] for token in ids], np.float32))


@given(left=weighted_texts, right=weighted_texts)
def test_the_lexical_score_of_two_texts_sums_over_the_tokens_they_share(
    left: list[dict[int, float]], right: list[dict[int, float]]
) -> None:
    expected = [[sum(one[token] * other[token] for token in one.keys() & other) for other in right] for one in left]
    scores = lexical_scorer([sparse(other) for other in right])([sparse(one) for one in left])
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_the_right_texts_are_preprocessed_once_for_all_left_ones() -> None:
    reads = 0

    class CountingVector(SparseVector):
        """Counts how often its weights are read."""

        def __getattribute__(self, name: str) -> Any:
            nonlocal reads
            reads += name == "weights"
            return super().__getattribute__(name)

    text = sparse({3: 0.5})
    score = lexical_scorer([CountingVector(text.ids, text.weights)] * 20)
    for _ in range(3):
        assert (score([text] * 50) == 0.25).all()
    assert reads == 20


# --- Ranking ---------------------------------------------------------------------------------------------------------

few_values = hnp.arrays(np.float32, st.integers(0, 30), elements=st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0]))


@pytest.mark.parametrize("metric", METRICS)
@given(scores=few_values, top_k=st.integers(1, 40))
def test_the_closest_come_first_and_ties_keep_their_order(metric: Metric, scores: Any, top_k: int) -> None:
    expected = sorted(range(len(scores)), key=lambda index: -closeness(scores[index], metric))[:top_k]
    assert best_first(scores, metric, top_k).tolist() == expected


@pytest.mark.parametrize("block_scores", [1, 7, 1 << 20])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("symmetric", [True, False])
@given(data=st.data(), top_k=st.integers(1, 40))
def test_the_closest_pairs_are_those_of_the_full_matrix(
    *, block_scores: int, metric: Metric, symmetric: bool, data: st.DataObject, top_k: int
) -> None:
    rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    columns = rows if symmetric else columns
    matrix = data.draw(hnp.arrays(np.float32, (rows, columns), elements=st.sampled_from([-1.0, 0.0, 0.5, 1.0])))
    candidates = [(row, column) for row in range(rows) for column in range(row + 1 if symmetric else 0, columns)]
    expected = sorted(candidates, key=lambda pair: -closeness(matrix[pair], metric))[:top_k]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "_BLOCK_SCORES", block_scores)
        left, right, scores = closest_pairs(
            lambda block: matrix[block].copy(), rows, None if symmetric else columns, metric, top_k
        )
    assert list(zip(left.tolist(), right.tolist(), strict=True)) == expected
    assert scores.tolist() == [matrix[pair] for pair in expected]


def test_column_maxima_are_found_without_the_full_matrix() -> None:
    matrix = np.random.default_rng(0).normal(size=(100, 7)).astype(np.float32)
    block_sizes: list[int] = []

    def block(rows: slice) -> npt.NDArray[np.float32]:
        block_sizes.append(matrix[rows].size)
        return matrix[rows]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "_BLOCK_SCORES", 30)
        best = column_maxima(block, *matrix.shape)
    assert best.tolist() == matrix.max(axis=0).tolist()
    assert max(block_sizes) <= 30
    assert sum(block_sizes) == matrix.size

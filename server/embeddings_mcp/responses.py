"""Build response data from an embedder's results: encode vectors, compare texts, rank and round scores."""

from __future__ import annotations

from dataclasses import replace

import anyio.from_thread
import numpy as np

from embeddings_mcp.embedders.base import Embeddings, Representations
from embeddings_mcp.models import Mode
from embeddings_mcp.schema import (
    ColbertEmbedding,
    Embedding,
    EncodingFormat,
    SearchHit,
    SimilarPair,
    SparseEmbedding,
    Usage,
)
from embeddings_mcp.vectors import (
    BlockScorer,
    EmbeddingType,
    FloatMatrix,
    Metric,
    Scores,
    best_first,
    closest_pairs,
    column_maxima,
    dense_scorer,
    hybrid_scores,
    late_interaction_scores,
    lexical_scorer,
    quantize,
    to_base64,
)

EmbedderResult = Embeddings | Representations


# --- Vectors ---------------------------------------------------------------------------------------------------------


def encode_embeddings(
    vectors: FloatMatrix, encoding_format: EncodingFormat, embedding_type: EmbeddingType
) -> list[Embedding]:
    """Encode dense vectors as response entries, in input order."""
    encode = to_base64 if encoding_format == "base64" else np.ascontiguousarray
    return [
        {"object": "embedding", "index": index, "embedding": encode(vector)}
        for index, vector in enumerate(quantize(vectors, embedding_type))
    ]


def encode_sparse(result: Representations) -> list[SparseEmbedding]:
    """Encode lexical weights as response entries, in input order."""
    return [
        {"object": "sparse_embedding", "index": index, "token_ids": vector.ids, "weights": vector.weights}
        for index, vector in enumerate(result.sparse)
    ]


def encode_colbert(result: Representations, encoding_format: EncodingFormat) -> list[ColbertEmbedding]:
    """Encode token vectors as response entries, in input order."""
    encode = to_base64 if encoding_format == "base64" else np.ascontiguousarray
    return [
        {"object": "colbert_embedding", "index": index, "shape": list(rows.shape), "embedding": encode(rows)}
        for index, rows in enumerate(result.colbert)
    ]


# --- Scores ----------------------------------------------------------------------------------------------------------


def select(result: EmbedderResult, texts: slice) -> EmbedderResult:
    """Return the result for a slice of the texts."""
    if isinstance(result, Embeddings):
        return replace(result, vectors=result.vectors[texts], tokens=result.tokens[texts])
    return replace(result, vectors=result.vectors[texts], sparse=result.sparse[texts], colbert=result.colbert[texts])


def make_block_scorer(left: EmbedderResult, right: EmbedderResult, mode: Mode, metric: Metric) -> BlockScorer:
    """Return a function that scores rows of `left` against all of `right`; `metric` applies to dense vectors.

    Token vectors must be compared on an anyio worker thread, so that cancelling the request stops the comparison.
    """
    if mode == "dense" or isinstance(left, Embeddings) or isinstance(right, Embeddings):
        return _dense(left, right, metric)
    if mode == "sparse":
        return _sparse(left, right)
    if mode == "colbert":
        return _colbert(left, right)
    scorers = _dense(left, right, metric), _sparse(left, right), _colbert(left, right)
    return lambda rows: hybrid_scores(*(score(rows) for score in scorers))


def _dense(left: EmbedderResult, right: EmbedderResult, metric: Metric) -> BlockScorer:
    score = dense_scorer(right.vectors, metric)
    return lambda rows: score(left.vectors[rows])


def _sparse(left: Representations, right: Representations) -> BlockScorer:
    score = lexical_scorer(right.sparse)
    return lambda rows: score(left.sparse[rows])


def _colbert(left: Representations, right: Representations) -> BlockScorer:
    def score(rows: slice) -> Scores:
        scores = []
        for row in left.colbert[rows]:
            anyio.from_thread.check_cancelled()  # each pair costs a matrix product: many pairs take hours
            scores.append(late_interaction_scores([row], right.colbert))
        return np.concatenate(scores)

    return score


def matrix(score: BlockScorer) -> list[list[float]]:
    """Return all scores, one row per text on the left side."""
    return [_rounded(row) for row in score(slice(None))]


def pairs(score: BlockScorer, rows: int, columns: int | None, metric: Metric, top_k: int) -> list[SimilarPair]:
    """Return the closest pairs, closest first; if `columns` is None, rows are paired with each other."""
    left, right, scores = closest_pairs(score, rows, columns, metric, top_k)
    return [
        {"input": row, "other": column, "score": value}
        for row, column, value in zip(left.tolist(), right.tolist(), _rounded(scores), strict=True)
    ]


def ranking(score: BlockScorer, rows: int, columns: int, top_k: int) -> list[SearchHit]:
    """Rank the texts of the right side, best first, each by its closest text on the left side."""
    scores = column_maxima(score, rows, columns)
    best = best_first(scores, "cosine", top_k)
    return [
        {"index": index, "score": value} for index, value in zip(best.tolist(), _rounded(scores[best]), strict=True)
    ]


def _rounded(scores: Scores) -> list[float]:
    """Round to four decimals: more would cost an agent tokens without telling it anything."""
    numbers: list[float] = (scores.astype(np.float64).round(4) + 0.0).tolist()  # adding 0.0 turns -0.0 into 0.0
    return numbers


def usage(*results: EmbedderResult) -> Usage:
    """Return the total token usage of the results."""
    tokens = sum(result.prompt_tokens for result in results)
    return {"prompt_tokens": tokens, "total_tokens": tokens}

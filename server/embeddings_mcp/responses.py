"""From what an embedder made to what an answer says: numbers encoded, texts compared, scores ranked and rounded."""

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
    EmbeddingType,
    FloatMatrix,
    Metric,
    ScoreBlock,
    Scores,
    best_first,
    best_of_rows,
    closest_pairs,
    comparing,
    comparing_weights,
    hybrid_scores,
    late_interaction_scores,
    quantize,
    to_base64,
)

Made = Embeddings | Representations


# --- Vectors ---------------------------------------------------------------------------------------------------------


def encoded(vectors: FloatMatrix, encoding_format: EncodingFormat, embedding_type: EmbeddingType) -> list[Embedding]:
    """The vectors as the answer writes them, in their order."""
    encode = to_base64 if encoding_format == "base64" else np.ascontiguousarray
    return [
        {"object": "embedding", "index": index, "embedding": encode(vector)}
        for index, vector in enumerate(quantize(vectors, embedding_type))
    ]


def sparse_encoded(made: Representations) -> list[SparseEmbedding]:
    """The lexical weights as the answer writes them, in the texts' order."""
    return [
        {"object": "sparse_embedding", "index": index, "token_ids": vector.ids, "weights": vector.weights}
        for index, vector in enumerate(made.sparse)
    ]


def colbert_encoded(made: Representations, encoding_format: EncodingFormat) -> list[ColbertEmbedding]:
    """The token vectors as the answer writes them, in the texts' order."""
    encode = to_base64 if encoding_format == "base64" else np.ascontiguousarray
    return [
        {"object": "colbert_embedding", "index": index, "shape": list(rows.shape), "embedding": encode(rows)}
        for index, rows in enumerate(made.colbert)
    ]


# --- Scores ----------------------------------------------------------------------------------------------------------


def part(made: Made, texts: slice) -> Made:
    """What was made of some of the texts."""
    if isinstance(made, Embeddings):
        return replace(made, vectors=made.vectors[texts], tokens=made.tokens[texts])
    return replace(made, vectors=made.vectors[texts], sparse=made.sparse[texts], colbert=made.colbert[texts])


def comparison(left: Made, right: Made, mode: Mode, metric: Metric) -> ScoreBlock:
    """How the texts of `left` are scored against those of `right`; the metric is that of dense vectors.

    Token vectors are compared on a worker thread of anyio's, until the request is cancelled.
    """
    if mode == "dense" or isinstance(left, Embeddings) or isinstance(right, Embeddings):
        return _dense(left, right, metric)
    if mode == "sparse":
        return _sparse(left, right)
    if mode == "colbert":
        return _colbert(left, right)
    parts = _dense(left, right, metric), _sparse(left, right), _colbert(left, right)
    return lambda rows: hybrid_scores(*(score(rows) for score in parts))


def _dense(left: Made, right: Made, metric: Metric) -> ScoreBlock:
    score = comparing(right.vectors, metric)
    return lambda rows: score(left.vectors[rows])


def _sparse(left: Representations, right: Representations) -> ScoreBlock:
    score = comparing_weights(right.sparse)
    return lambda rows: score(left.sparse[rows])


def _colbert(left: Representations, right: Representations) -> ScoreBlock:
    def score(rows: slice) -> Scores:
        scores = []
        for row in left.colbert[rows]:
            anyio.from_thread.check_cancelled()  # every pair is a product of two matrices: with many it takes hours
            scores.append(late_interaction_scores([row], right.colbert))
        return np.concatenate(scores)

    return score


def matrix(score: ScoreBlock) -> list[list[float]]:
    """All the scores, a row for each text of the left side."""
    return [rounded(row) for row in score(slice(None))]


def pairs(score: ScoreBlock, rows: int, columns: int | None, metric: Metric, top_k: int) -> list[SimilarPair]:
    """The closest pairs, closest first; without `columns`, of the rows with each other."""
    left, right, scores = closest_pairs(score, rows, columns, metric, top_k)
    return [
        {"input": row, "other": column, "score": value}
        for row, column, value in zip(left.tolist(), right.tolist(), rounded(scores), strict=True)
    ]


def ranking(score: ScoreBlock, rows: int, columns: int, top_k: int) -> list[SearchHit]:
    """The best of the right side, best first: each scored by the text of the left one that it is closest to."""
    scores = best_of_rows(score, rows, columns)
    best = best_first(scores, "cosine", top_k)
    return [{"index": index, "score": value} for index, value in zip(best.tolist(), rounded(scores[best]), strict=True)]


def rounded(scores: Scores) -> list[float]:
    """Four decimals: more would cost an agent tokens and tell it nothing."""
    numbers: list[float] = (scores.astype(np.float64).round(4) + 0.0).tolist()  # the zero turns -0.0 into 0.0
    return numbers


def usage(*made: Made) -> Usage:
    """Tokens that all this cost."""
    tokens = sum(each.prompt_tokens for each in made)
    return {"prompt_tokens": tokens, "total_tokens": tokens}

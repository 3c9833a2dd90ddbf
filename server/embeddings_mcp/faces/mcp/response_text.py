"""MCP responses as text, for hosts that show the model no structured content.

Some hosts show the model only this text, others only the structured content, so both carry the same information. The
exception is vectors: they are never written as text, since a model cannot read them.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel

from embeddings_mcp.operations import CREATE_EMBEDDING, LIST_MODELS, SEARCH, SIMILARITY, Operation
from embeddings_mcp.schema import (
    EmbeddingRequest,
    EmbeddingResponse,
    ListModelsRequest,
    ModelEntry,
    ModelsResponse,
    SearchRequest,
    SearchResponse,
    SimilarityRequest,
    SimilarityResponse,
)


def response_as_text(operation: Operation, request: BaseModel, response: Mapping[str, Any]) -> str:
    """Render the response of an operation."""
    return _RENDERERS[operation](request, response)


def model_as_text(entry: ModelEntry) -> str:
    """Describe a model in one line."""
    facts = ["the default model"] if entry["default"] else []
    if "dimensions" in entry:
        lengths = [entry["dimensions"], *entry["allowed_dimensions"]]
        facts.append(f"{' or '.join(map(str, lengths))} dimensions")
    if "max_tokens" in entry:
        facts.append(f"texts up to {entry['max_tokens']} tokens")
    facts.append(f"input_type {entry['input_type']}")
    if len(entry["modes"]) > 1:
        facts.append(f"modes {', '.join(entry['modes'])}")
    facts.append(f"served from {entry['served_from']}")
    if "license" in entry:
        facts.append(f"license {entry['license']}")
    if entry["aliases"]:
        facts.append(f"also called {', '.join(entry['aliases'])}")
    return "; ".join(facts)


def _embeddings_as_text(request: EmbeddingRequest, response: EmbeddingResponse) -> str:
    vectors, tokens = response["data"], response["usage"]["prompt_tokens"]
    first = vectors[0]["embedding"]
    length = len(base64.b64decode(first)) // 4 if isinstance(first, str) else len(first)
    if request.encoding_format == "base64":
        form = "each base64 of little-endian float32 bytes"
    else:
        form = (
            "as arrays of numbers. `encoding_format` 'base64' takes less than half the space; to compare or rank "
            "texts, use `similarity` and `search`, which return no vectors"
        )
    count = "1 vector" if len(vectors) == 1 else f"{len(vectors)} vectors"
    return f"{count} of {length} dimensions by {response['model']} ({tokens} tokens) in the structured content, {form}."


def _similarity_as_text(request: SimilarityRequest, response: SimilarityResponse) -> str:
    other = "input" if request.other is None else "other"
    measure = response.get("metric", request.mode)
    closer = "lower is closer" if measure == "euclidean" else "higher is closer"
    lines = [f"{measure} by {response['model']}, {closer}"]
    if "pairs" in response:
        lines += [f"input[{pair['input']}] {other}[{pair['other']}] {pair['score']:.4f}" for pair in response["pairs"]]
    else:
        columns = len(response["scores"][0])
        lines[0] += f"; columns are {other}[0]" + (f" to {other}[{columns - 1}]" if columns > 1 else "")
        lines += [
            f"input[{index}] {' '.join(f'{score:.4f}' for score in row)}"
            for index, row in enumerate(response["scores"])
        ]
    return "\n".join(lines)


def _search_as_text(request: SearchRequest, response: SearchResponse) -> str:
    measure = "cosine" if request.mode == "dense" else request.mode
    hits = [f"input[{hit['index']}] {hit['score']:.4f}" for hit in response["results"]]
    return "\n".join([f"{measure} by {response['model']}, best first", *hits])


def _models_as_text(_request: ListModelsRequest, response: ModelsResponse) -> str:
    return "\n".join(f"{entry['id']}: {model_as_text(entry)}" for entry in response["models"])


_RENDERERS: Mapping[Operation, Callable[[Any, Any], str]] = {
    CREATE_EMBEDDING: _embeddings_as_text,
    SIMILARITY: _similarity_as_text,
    SEARCH: _search_as_text,
    LIST_MODELS: _models_as_text,
}

"""The size limit of MCP responses over HTTP.

Over HTTP a response is a single server-sent event, and clients limit the size of an event: the Python SDK accepts 1 MiB
by default (`max_sse_event_size`) and fails the call when an event is larger, after the server has done all the work.
Requests for too many vectors are therefore rejected before anything is computed, with the number that would fit.
"""

from __future__ import annotations

from pydantic import BaseModel

from embeddings_mcp.errors import InvalidRequest, TooManyInputs
from embeddings_mcp.schema import EmbeddingRequest, count_texts

_NUMBER_BYTES = 13
"""Typical upper bound for one vector component in JSON: a comma, an optional sign, ``0.0`` and eight digits."""

_ROW_BYTES = 64
"""Overhead per vector: its index and the field names."""


def expected_bytes(request: EmbeddingRequest, dimensions: int) -> int:
    """Estimate the response size in bytes for vectors of `dimensions` components; errs on the high side."""
    vector_bytes = -(-dimensions * 4 // 3) * 4 if request.encoding_format == "base64" else dimensions * _NUMBER_BYTES
    return count_texts(request.input) * (vector_bytes + _ROW_BYTES)


def check(request: BaseModel, size: int, limit: int) -> None:
    """Reject a response that is larger than `limit`.

    Args:
        request: the request that the response is for.
        size: actual or expected size of the response in bytes.
        limit: maximum size in bytes.

    Raises:
        TooManyInputs: an embedding response is too large.
        InvalidRequest: any other response is too large.
    """
    if size <= limit:
        return
    too_large = f"the response would be about {size:,} bytes, and the limit over MCP is {limit:,} bytes: "
    if not isinstance(request, EmbeddingRequest):
        raise InvalidRequest(f"{too_large}ask for fewer scores with `top_k`", param="top_k")
    fitting = limit * count_texts(request.input) // size
    fewer = f"send at most {fitting:,} texts at once" if fitting else "ask for shorter vectors (`dimensions`)"
    base64_hint = (
        "" if request.encoding_format == "base64" else ", use `encoding_format` 'base64', which needs 2/5 of that"
    )
    raise TooManyInputs(
        f"{too_large}{fewer}{base64_hint}, or send them to the REST route /v1/embeddings, which has no such limit",
        param="input",
    )

"""How large an answer over MCP may become where it travels over HTTP.

There it is one event of a stream, and clients do not read events of any size: Python's SDK takes 1 MiB unless it is
told otherwise (`max_sse_event_size`), and fails a call with more once all its work is done. So too many vectors are
refused before they are made, with the number of those that would fit.
"""

from __future__ import annotations

from pydantic import BaseModel

from embeddings_mcp.errors import InvalidRequest, TooManyInputs
from embeddings_mcp.schema import EmbeddingRequest, count_texts

_NUMBER_BYTES = 13
"""A component in JSON: a comma, a sign or none, ``0.0`` and eight digits are the most that is usual."""

_ROW_BYTES = 64
"""What stands around a vector: its position, and the names of its fields."""


def expected_bytes(request: EmbeddingRequest, dimensions: int) -> int:
    """About how large the answer to a request for vectors of such length will be; rather more than less."""
    vector = -(-dimensions * 4 // 3) * 4 if request.encoding_format == "base64" else dimensions * _NUMBER_BYTES
    return count_texts(request.input) * (vector + _ROW_BYTES)


def check(request: BaseModel, size: int, most: int) -> None:
    """Refuse an answer of more than `most` bytes.

    Args:
        request: what was asked.
        size: bytes that the answer has, or will have.
        most: bytes that it may have.

    Raises:
        TooManyInputs: it would hold too many vectors.
        InvalidRequest: any other answer is too large.
    """
    if size <= most:
        return
    too_large = f"the answer would have some {size:,} bytes, and one over MCP may have {most:,} here: "
    if not isinstance(request, EmbeddingRequest):
        raise InvalidRequest(f"{too_large}ask for less by `top_k`", param="top_k")
    fitting = most * count_texts(request.input) // size
    fewer = f"send at most {fitting:,} texts at once" if fitting else "ask for shorter vectors (`dimensions`)"
    packed = "" if request.encoding_format == "base64" else ", take `encoding_format` 'base64', which needs 2/5 of that"
    raise TooManyInputs(
        f"{too_large}{fewer}{packed}, or send them to the REST route /v1/embeddings, which has no such limit",
        param="input",
    )

"""Building the request body, and parsing and validating the response."""

from __future__ import annotations

import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import orjson

from embeddings_mcp.embedders.nim.endpoint import Dialect
from embeddings_mcp.models import InputType, ModelCard, Truncate
from embeddings_mcp.vectors import FloatMatrix

_MAX_TOKENS = 2**31 - 1
"""Largest plausible token count of one request; a larger one is ignored."""


class InvalidResponse(Exception):
    """A response with status 200 that cannot be used; the message gives the reason and completes a sentence.

    Attributes:
        damaged: the body is not JSON at all, as after a broken connection, so a retry may help.
    """

    def __init__(self, reason: str, *, damaged: bool = False) -> None:
        super().__init__(reason)
        self.damaged = damaged


@dataclass(frozen=True, slots=True)
class EmbeddingResponse:
    """The vectors of one request.

    Attributes:
        vectors: float32 ``[n, d]``, in the order of the texts.
        prompt_tokens: as counted by the endpoint; 0 if it reports none.
        model: the model id that the endpoint reports; None if it reports none.
    """

    vectors: FloatMatrix
    prompt_tokens: int
    model: str | None


def request_body(
    texts: Sequence[str],
    *,
    model: str,
    card: ModelCard,
    dialect: Dialect,
    input_type: InputType | None,
    truncate: Truncate,
) -> bytes:
    """Return the JSON body of ``POST /v1/embeddings``.

    ``encoding_format`` is always sent, since NIM refuses null, which some clients send; base64 takes a quarter of the
    bytes. ``dimensions`` is never sent: many models refuse it, and truncating the vectors here gives the same result.
    """
    body: dict[str, object] = {"model": model, "encoding_format": "base64"}
    if dialect == "nim":
        body["input"] = list(texts)
        body["truncate"] = truncate
        if input_type is not None and card.input_type != "ignored":
            body["input_type"] = input_type
    else:
        prompt = card.prompt(input_type)
        body["input"] = [prompt + text for text in texts]
    return orjson.dumps(body)


def parse_json(body: bytes) -> object:
    """Parse a response body as JSON.

    Raises:
        InvalidResponse: it is not JSON, or contains strings that cannot be encoded as UTF-8.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    try:
        # Slower, but accepts the NaN and Infinity that some servers write, so that the error can name the vector.
        value = json.loads(body)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidResponse("it contains half of a surrogate pair, which is not valid text") from None
    except (ValueError, RecursionError):  # the first includes UnicodeDecodeError
        raise InvalidResponse(f"its {len(body):,} bytes are not JSON", damaged=True) from None
    return value


def parse_response(payload: object, *, count: int, dimensions: int | None) -> EmbeddingResponse:
    """Validate a response and put its vectors in the order of the texts.

    Args:
        payload: the parsed JSON.
        count: number of texts sent.
        dimensions: the length that the vectors must have, if known.

    Raises:
        InvalidResponse: it does not hold exactly one finite vector of the right length for every text.
    """
    if not isinstance(payload, dict) or not isinstance(data := payload.get("data"), list):
        raise InvalidResponse("it has no `data` list")
    if len(data) != count:
        raise InvalidResponse(f"{count} texts were sent and {len(data)} vectors came back")
    rows: list[npt.NDArray[np.float32] | None] = [None] * count
    for item in data:
        index = item.get("index") if isinstance(item, dict) else None
        if type(index) is not int or not 0 <= index < count:
            raise InvalidResponse("a vector does not say which text it belongs to")
        if rows[index] is not None:
            raise InvalidResponse(f"two vectors claim to belong to text {index}")
        rows[index] = _parse_vector(item.get("embedding"), index)
    vectors = [row for row in rows if row is not None]  # never None: the count matches and indices are distinct
    expected = dimensions or len(vectors[0])
    for index, vector in enumerate(vectors):
        if len(vector) != expected:
            raise InvalidResponse(f"the vector of text {index} has {len(vector)} dimensions instead of {expected}")
    matrix: FloatMatrix = np.stack(vectors)
    not_finite = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if not_finite.size:
        raise InvalidResponse(f"the vector of text {not_finite[0]} holds values that are not finite numbers")
    model = payload.get("model")
    return EmbeddingResponse(
        matrix, _parse_tokens(payload.get("usage")), model if isinstance(model, str) and model else None
    )


def _parse_vector(value: object, index: int) -> npt.NDArray[np.float32]:
    """Parse a vector given as base64 or as numbers: some servers ignore ``encoding_format``."""
    try:
        if isinstance(value, str):
            vector = np.frombuffer(binascii.a2b_base64(value, strict_mode=True), dtype="<f4")
        elif isinstance(value, list):
            with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite, and is rejected as such later
                vector = np.array(value, dtype=np.float32)
        else:
            raise InvalidResponse(f"the vector of text {index} is neither numbers nor base64")
    except (ValueError, TypeError, OverflowError):  # binascii.Error is a ValueError
        raise InvalidResponse(f"the vector of text {index} cannot be read") from None
    if vector.ndim != 1 or not vector.size:
        raise InvalidResponse(f"the vector of text {index} is empty or not one-dimensional")
    return vector.astype(np.float32, copy=False)


def _parse_tokens(usage: object) -> int:
    if not isinstance(usage, dict):
        return 0
    tokens = usage.get("prompt_tokens", usage.get("total_tokens"))
    return tokens if type(tokens) is int and 0 <= tokens <= _MAX_TOKENS else 0

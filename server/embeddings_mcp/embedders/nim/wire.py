"""What goes over the wire: the request's body, and the checks that an answer must pass before it is believed."""

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

_MOST_TOKENS = 2**31 - 1
"""What an endpoint may count for one request; a larger number is none that it counted."""


class AnswerInvalid(Exception):
    """An answer with status 200 that cannot be used; the text says why, for the end of a sentence.

    Attributes:
        damaged: the body is not JSON at all, as a broken connection leaves it, so that asking again may help.
    """

    def __init__(self, reason: str, *, damaged: bool = False) -> None:
        super().__init__(reason)
        self.damaged = damaged


@dataclass(frozen=True, slots=True)
class Answer:
    """The vectors of one request.

    Attributes:
        vectors: float32 ``[n, d]``, in the order of the texts.
        prompt_tokens: as the endpoint counted them; 0 where it does not say.
        model: the id under which the endpoint says that it served the model.
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
    """The body of ``POST /v1/embeddings``.

    ``encoding_format`` is always there, since NIM refuses the null that some clients send; it asks for base64, a
    quarter of the bytes. ``dimensions`` never is: many models refuse it, and cutting here gives the same vectors.
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


def read_json(body: bytes) -> object:
    """The body as JSON.

    Raises:
        AnswerInvalid: it is not JSON, or holds what could not be written again.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    try:
        # Slower, but takes the NaN and Infinity that some servers write, so that the right thing can be said of them.
        value = json.loads(body)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise AnswerInvalid("it holds half of a character, which no text can") from None
    except (ValueError, RecursionError):  # the first includes UnicodeDecodeError
        raise AnswerInvalid(f"its {len(body):,} bytes are not JSON", damaged=True) from None
    return value


def read_answer(payload: object, *, count: int, dimensions: int | None) -> Answer:
    """Check an answer and put its vectors in order.

    Args:
        payload: the answer's JSON.
        count: how many texts were sent.
        dimensions: the length that the vectors must have, where it is known.

    Raises:
        AnswerInvalid: it does not hold one finite vector of the right length for every text.
    """
    if not isinstance(payload, dict) or not isinstance(data := payload.get("data"), list):
        raise AnswerInvalid("it holds no list `data`")
    if len(data) != count:
        raise AnswerInvalid(f"{count} texts were sent and {len(data)} vectors came back")
    rows: list[npt.NDArray[np.float32] | None] = [None] * count
    for item in data:
        index = item.get("index") if isinstance(item, dict) else None
        if type(index) is not int or not 0 <= index < count:
            raise AnswerInvalid("a vector does not say which text it belongs to")
        if rows[index] is not None:
            raise AnswerInvalid(f"two vectors claim to belong to text {index}")
        rows[index] = _read_vector(item.get("embedding"), index)
    vectors = [row for row in rows if row is not None]  # count and distinct indices leave no gap
    expected = dimensions or len(vectors[0])
    for index, vector in enumerate(vectors):
        if len(vector) != expected:
            raise AnswerInvalid(f"the vector of text {index} has {len(vector)} dimensions in place of {expected}")
    matrix: FloatMatrix = np.stack(vectors)
    broken = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if broken.size:
        raise AnswerInvalid(f"the vector of text {broken[0]} holds values that are not finite numbers")
    model = payload.get("model")
    return Answer(matrix, _read_tokens(payload.get("usage")), model if isinstance(model, str) and model else None)


def _read_vector(value: object, index: int) -> npt.NDArray[np.float32]:
    """A vector in either form: some servers send numbers, whatever ``encoding_format`` asked for."""
    try:
        if isinstance(value, str):
            vector = np.frombuffer(binascii.a2b_base64(value, strict_mode=True), dtype="<f4")
        elif isinstance(value, list):
            with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite, and is refused as such
                vector = np.array(value, dtype=np.float32)
        else:
            raise AnswerInvalid(f"the vector of text {index} is neither numbers nor base64")
    except (ValueError, TypeError, OverflowError):  # binascii.Error is a ValueError
        raise AnswerInvalid(f"the vector of text {index} cannot be read") from None
    if vector.ndim != 1 or not vector.size:
        raise AnswerInvalid(f"the vector of text {index} is empty or not flat")
    return vector.astype(np.float32, copy=False)


def _read_tokens(usage: object) -> int:
    if not isinstance(usage, dict):
        return 0
    tokens = usage.get("prompt_tokens", usage.get("total_tokens"))
    return tokens if type(tokens) is int and 0 <= tokens <= _MOST_TOKENS else 0

"""From JSON to a request, or to one error that teaches; from a response to JSON."""

from __future__ import annotations

import difflib
from typing import TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from embeddings_mcp.errors import InvalidRequest
from embeddings_mcp.schema import json_kind

_Request = TypeVar("_Request", bound=BaseModel)
_MOST_PROBLEMS = 5
_LONGEST_QUOTE = 40
"""Characters of what the caller wrote that a message repeats."""


def parse(request_type: type[_Request], value: object) -> _Request:
    """Validate parsed JSON as a request.

    Raises:
        InvalidRequest: with one message over all that is wrong, its ``param`` the first field it is about.
    """
    if not isinstance(value, dict):
        raise InvalidRequest(f"the request must be a JSON object, not {json_kind(value)}")
    # Pydantic makes an error of each unknown field, with the interpreter lock held: of a million that takes seconds.
    known = request_type.model_fields
    untold = set([name for name in value if name not in known][_MOST_PROBLEMS:])
    try:
        return request_type.model_validate({name: given for name, given in value.items() if name not in untold})
    except ValidationError as error:
        details = error.errors(include_url=False)
        left_out = [name for name in known if name not in value]
        problems = [_teach(request_type, detail, left_out) for detail in details[:_MOST_PROBLEMS]]
        if (more := len(details) + len(untold) - _MOST_PROBLEMS) > 0:
            problems.append(f"and {more} more")
        if any(detail["type"] == "extra_forbidden" for detail in details):
            problems.append(f"accepted are {', '.join(known) or 'no fields'}")
        raise InvalidRequest("; ".join(problems), param=_place(details[0])) from None


def _place(detail: ErrorDetails) -> str:
    """The field, and the position in it; a name that the caller made up is cut."""
    return str(detail["loc"][0])[:_LONGEST_QUOTE] + str(detail.get("ctx", {}).get("at", ""))


def _teach(request_type: type[BaseModel], detail: ErrorDetails, left_out: list[str]) -> str:
    """One sentence: the field, what was wrong with it, what is accepted; `left_out` may be meant by an unknown one."""
    field, value, context = _place(detail), detail["input"], detail.get("ctx", {})
    match detail["type"]:
        case "missing":
            problem = f"is required: {(request_type.model_fields[field].description or '').rstrip('.')}"
        case "extra_forbidden":
            guess = difflib.get_close_matches(field, left_out, n=1)
            problem = f"is not a field of this request{f' (did you mean `{guess[0]}`?)' if guess else ''}"
        case "literal_error":
            given = f"'{value[:_LONGEST_QUOTE]}'" if isinstance(value, str) else json_kind(value)
            problem = f"must be {context['expected']}, not {given}"
        case "string_type":
            problem = f"must be a string, not {json_kind(value)}"
        case "int_type" | "int_from_float":
            problem = f"must be an integer, not {value if isinstance(value, float) else json_kind(value)}"
        case "greater_than_equal":
            problem = f"must be at least {context['ge']}, not {str(value)[:_LONGEST_QUOTE]}"
        case _:
            problem = detail["msg"]
    return f"`{field}` {problem}"


def dump_json(response: object) -> bytes:
    """A response as JSON; float32 numbers in their shortest exact form (``0.1234567``, not 17 digits)."""
    return orjson.dumps(response, option=orjson.OPT_SERIALIZE_NUMPY)

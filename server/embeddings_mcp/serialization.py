"""Parse JSON into a request, or raise one actionable error; serialize a response to JSON."""

from __future__ import annotations

import difflib
from typing import TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from embeddings_mcp.errors import InvalidRequest
from embeddings_mcp.schema import json_kind

_Request = TypeVar("_Request", bound=BaseModel)
_MAX_PROBLEMS = 5
_MAX_QUOTED_CHARACTERS = 40
"""How much of the caller's own text a message repeats."""


def parse(request_type: type[_Request], value: object) -> _Request:
    """Validate parsed JSON as a request.

    Raises:
        InvalidRequest: one message lists all problems; ``param`` is the first field at fault.
    """
    if not isinstance(value, dict):
        raise InvalidRequest(f"the request must be a JSON object, not {json_kind(value)}")
    # Pydantic builds an error for each unknown field while it holds the GIL: for a million fields that takes seconds.
    known = request_type.model_fields
    unreported = set([name for name in value if name not in known][_MAX_PROBLEMS:])
    try:
        return request_type.model_validate({name: item for name, item in value.items() if name not in unreported})
    except ValidationError as error:
        details = error.errors(include_url=False)
        absent = [name for name in known if name not in value]
        problems = [_explain(request_type, detail, absent) for detail in details[:_MAX_PROBLEMS]]
        if (more := len(details) + len(unreported) - _MAX_PROBLEMS) > 0:
            problems.append(f"and {more} more")
        if any(detail["type"] == "extra_forbidden" for detail in details):
            problems.append(f"accepted are {', '.join(known) or 'no fields'}")
        raise InvalidRequest("; ".join(problems), param=_location(details[0])) from None


def _location(detail: ErrorDetails) -> str:
    """Return the field and the index in it; an unknown field's name is truncated."""
    return str(detail["loc"][0])[:_MAX_QUOTED_CHARACTERS] + str(detail.get("ctx", {}).get("at", ""))


def _explain(request_type: type[BaseModel], detail: ErrorDetails, absent: list[str]) -> str:
    """Say what is wrong with a field and what is accepted; suggest one of the `absent` fields for an unknown one."""
    field, value, context = _location(detail), detail["input"], detail.get("ctx", {})
    match detail["type"]:
        case "missing":
            problem = f"is required: {(request_type.model_fields[field].description or '').rstrip('.')}"
        case "extra_forbidden":
            guess = difflib.get_close_matches(field, absent, n=1)
            problem = f"is not a field of this request{f' (did you mean `{guess[0]}`?)' if guess else ''}"
        case "literal_error":
            given = f"'{value[:_MAX_QUOTED_CHARACTERS]}'" if isinstance(value, str) else json_kind(value)
            problem = f"must be {context['expected']}, not {given}"
        case "string_type":
            problem = f"must be a string, not {json_kind(value)}"
        case "int_type" | "int_from_float":
            problem = f"must be an integer, not {value if isinstance(value, float) else json_kind(value)}"
        case "greater_than_equal":
            problem = f"must be at least {context['ge']}, not {str(value)[:_MAX_QUOTED_CHARACTERS]}"
        case _:
            problem = detail["msg"]
    return f"`{field}` {problem}"


def dump_json(response: object) -> bytes:
    """Serialize a response to JSON, with float32 numbers in shortest exact form (``0.1234567``, not 17 digits)."""
    return orjson.dumps(response, option=orjson.OPT_SERIALIZE_NUMPY)

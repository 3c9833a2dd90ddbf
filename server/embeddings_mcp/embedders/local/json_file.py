"""Read a checkpoint's JSON files; errors name the file and the field."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from embeddings_mcp.errors import CheckpointInvalid

Value = TypeVar("Value", str, bool, int, dict[str, Any], list[Any])

_TYPE_NAMES = {str: "a string", bool: "a boolean", int: "an integer", dict: "an object", list: "an array"}


@dataclass(frozen=True, slots=True)
class JsonObject:
    """A JSON object in a file.

    Attributes:
        path: the file.
        fields: the object's fields.
    """

    path: Path
    fields: dict[str, Any]

    def get(self, key: str, default: Value) -> Value:
        """Return a field, which must have the type of the default; the default if the field is absent or null.

        Raises:
            CheckpointInvalid: the field is of another type.
        """
        value = self.fields.get(key)
        if value is None:
            return default
        if type(value) is not type(default):
            raise self.invalid(key, _TYPE_NAMES[type(default)])
        return value

    def size(self, key: str) -> int:
        """Return a required field that must be a positive integer.

        Raises:
            CheckpointInvalid: the field is absent, or anything else.
        """
        value = self.fields.get(key)
        if type(value) is not int or value < 1:
            raise self.invalid(key, "a positive integer")
        return value

    def invalid(self, key: str, accepted: str) -> CheckpointInvalid:
        """Return the error for a field with an invalid value."""
        return CheckpointInvalid(f"{self.path}: `{key}` must be {accepted}, not {self.fields.get(key)!r}")


def read_object(path: Path, *, optional: bool = False) -> JsonObject:
    """Read the JSON object in a file; an empty one if the file is optional and missing.

    Raises:
        CheckpointInvalid: the file is missing, cannot be read, or holds something else.
    """
    value = _read(path)
    if value is None and not optional:
        raise CheckpointInvalid(f"{path} is missing")
    if not isinstance(value, dict | None):
        raise CheckpointInvalid(f"{path} does not hold a JSON object")
    return JsonObject(path, value or {})


def read_objects(path: Path) -> list[JsonObject]:
    """Read the JSON array of objects in a file; an empty list if there is no such file.

    Raises:
        CheckpointInvalid: the file cannot be read, or holds something else.
    """
    values = _read(path)
    if values is None:
        return []
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise CheckpointInvalid(f"{path} does not hold a JSON array of objects")
    return [JsonObject(path, value) for value in values]


def _read(path: Path) -> Any:  # noqa: ANN401 - JSON
    """Return the JSON value in a file; None if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointInvalid(f"{path} cannot be read: {error}") from None
    if value is None:
        raise CheckpointInvalid(f"{path} holds nothing but null")
    return value

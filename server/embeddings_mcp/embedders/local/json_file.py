"""A checkpoint's JSON files, read so that whatever is wrong in one is said with its name and its field."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from embeddings_mcp.errors import CheckpointInvalid

Value = TypeVar("Value", str, bool, int, dict[str, Any], list[Any])

_WORDS = {str: "a text", bool: "true or false", int: "a whole number", dict: "an object", list: "an array"}


@dataclass(frozen=True, slots=True)
class JsonObject:
    """An object in a file.

    Attributes:
        path: the file.
        fields: what it holds.
    """

    path: Path
    fields: dict[str, Any]

    def get(self, key: str, default: Value) -> Value:
        """The field of this name, of the default's type; the default where it is not there, or null.

        Raises:
            CheckpointInvalid: it is of another type.
        """
        value = self.fields.get(key)
        if value is None:
            return default
        if type(value) is not type(default):
            raise self.wrong(key, _WORDS[type(default)])
        return value

    def size(self, key: str) -> int:
        """The field of this name, which has to be there and above zero.

        Raises:
            CheckpointInvalid: it is not.
        """
        value = self.fields.get(key)
        if type(value) is not int or value < 1:
            raise self.wrong(key, "a whole number above zero")
        return value

    def wrong(self, key: str, accepted: str) -> CheckpointInvalid:
        """The error for a field that cannot be."""
        return CheckpointInvalid(f"{self.path}: `{key}` must be {accepted}, not {self.fields.get(key)!r}")


def read_object(path: Path, *, optional: bool = False) -> JsonObject:
    """The file's object; an empty one where the file may be missing and is.

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
    """The objects of the array in a file; none where there is no such file.

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
    """What the file holds; None where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointInvalid(f"{path} cannot be read: {error}") from None
    if value is None:
        raise CheckpointInvalid(f"{path} holds nothing but null")
    return value

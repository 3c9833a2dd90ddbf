"""The identity of the caller, and the endpoint key that a caller may send with a request.

The HTTP face reads them from the headers; the endpoint's client sends the key, and the queue of a local model is fair
between callers. Context variables carry them past the layers in between, as in the MCP SDK: they are visible only to
the tasks that work on the request.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from pydantic import SecretStr

CALLER_KEY_HEADER = "X-NVIDIA-API-Key"

_caller_name: ContextVar[str] = ContextVar("caller_name", default="")
_caller_key: ContextVar[SecretStr | None] = ContextVar("caller_key", default=None)


def caller_key() -> SecretStr | None:
    """Return the endpoint key that the caller sent with the current request."""
    return _caller_key.get()


@contextmanager
def with_caller_key(key: SecretStr) -> Iterator[None]:
    """Set the caller's endpoint key for the block and the tasks started in it."""
    token = _caller_key.set(key)
    try:
        yield
    finally:
        _caller_key.reset(token)


def caller_name() -> str:
    """Return the name of the API key that the caller authenticated with; empty if no key is required."""
    return _caller_name.get()


@contextmanager
def with_caller_name(name: str) -> Iterator[None]:
    """Set the caller's name for the block and the tasks started in it."""
    token = _caller_name.set(name)
    try:
        yield
    finally:
        _caller_name.reset(token)

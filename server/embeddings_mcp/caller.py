"""Who a caller is, and what he may bring along besides a request: a key of his own for the endpoint of the model.

This concerns only the two ends of the road: the HTTP face that finds it in the headers, and the client of the endpoint
that the key is for, or the queue that is fair to callers. Context variables carry it past all that lies between, as the
MCP SDK does with the caller's identity: the tasks that work on the request have it, and no others.
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
    """The key that the caller of the request in flight has brought."""
    return _caller_key.get()


@contextmanager
def with_caller_key(key: SecretStr) -> Iterator[None]:
    """What is begun in this block works for a caller who has brought this key."""
    token = _caller_key.set(key)
    try:
        yield
    finally:
        _caller_key.reset(token)


def caller_name() -> str:
    """The name of the API key that the caller has shown; empty where no key is asked for."""
    return _caller_name.get()


@contextmanager
def with_caller_name(name: str) -> Iterator[None]:
    """What is begun in this block works for the caller of this name."""
    token = _caller_name.set(name)
    try:
        yield
    finally:
        _caller_name.reset(token)

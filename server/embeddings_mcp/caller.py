"""What a caller may bring along besides a request: a key of his own for the endpoint that the model is at.

It concerns only the two ends of the road, the HTTP face that finds it in a header and the client of the endpoint that
it is for. A context variable carries it past all that lies between, as the MCP SDK does with the caller's identity:
the tasks that work on the request have it, and no others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from pydantic import SecretStr

CALLER_KEY_HEADER = "X-NVIDIA-API-Key"

_caller_key: ContextVar[SecretStr | None] = ContextVar("caller_key", default=None)


def caller_key() -> SecretStr | None:
    """The key that the caller of the request in work has brought."""
    return _caller_key.get()


@contextmanager
def bringing(key: SecretStr) -> Iterator[None]:
    """What is begun in this block works for a caller who has brought this key."""
    token = _caller_key.set(key)
    try:
        yield
    finally:
        _caller_key.reset(token)

"""Read an ASGI scope: the client's address, and the values of a header."""

from __future__ import annotations

from starlette.types import Scope


def client_address(scope: Scope) -> str:
    """The address that the request came from; clients behind one proxy share one."""
    host, _port = scope.get("client") or ("", 0)
    return str(host)


def header_values(scope: Scope, name: bytes) -> list[str]:
    """All values of a header; latin-1 decodes any byte, so this cannot fail."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]

"""An authorization server as tests need one: a real HTTP server that publishes keys, and tokens signed with them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from tests.support import serving

RESOURCE = "https://embeddings.example/mcp"

PRIVATE: dict[str, Any] = {
    "rsa": rsa.generate_private_key(65537, 2048),
    "ec": ec.generate_private_key(ec.SECP256R1()),
    "ed": ed25519.Ed25519PrivateKey.generate(),
}
ALGORITHMS = {"rsa": "RS256", "ec": "ES256", "ed": "EdDSA"}


class Issuer:
    """An authorization server, as far as resource servers see it.

    Attributes:
        url: where it is; ends with its path.
        published: names of the keys that it publishes.
        asked: how often it was asked for them.
        restricted: the algorithm that it says its keys are for.
        answer: what it answers in place of its keys.
    """

    def __init__(self, path: str = "", description: str = "oauth-authorization-server") -> None:
        self.url = ""
        self.published = ["rsa", "ec", "ed"]
        self.restricted: str | None = None
        self.asked = 0
        self.answer: Response | None = None
        self.jwks_uri = "/keys"
        before = f"/.well-known/{description}{path}"
        behind = f"{path}/.well-known/{description}"
        self.app = Starlette(
            routes=[
                Route(before if description.startswith("oauth") else behind, self._describe),
                Route("/keys", self._keys),
                Route("/moved", lambda _request: RedirectResponse("/keys")),
            ]
        )

    async def _describe(self, request: Request) -> Response:
        return JSONResponse({"issuer": self.url, "jwks_uri": f"{str(request.base_url).rstrip('/')}{self.jwks_uri}"})

    async def _keys(self, _request: Request) -> Response:
        self.asked += 1
        return self.answer or JSONResponse({"keys": [self._public(name) for name in self.published]})

    def _public(self, name: str) -> dict[str, Any]:
        return _public(name) | ({} if self.restricted is None else {"alg": self.restricted})

    def token(self, key: str = "rsa", *, kid: str | None = "", algorithm: str | None = None, **changes: Any) -> str:
        """A good token, with these claims changed; None leaves one out, also the name of the key."""
        claims = {
            "iss": self.url,
            "aud": RESOURCE,
            "sub": "alice",
            "client_id": "agent",
            "scope": "embed read",
            "exp": int(time.time()) + 600,
        } | changes
        said = {name: value for name, value in claims.items() if value is not None}
        signed_by = algorithm or ALGORITHMS[key]
        return jwt.encode(said, PRIVATE[key], signed_by, headers=None if kid is None else {"kid": kid or key})


def _public(name: str) -> dict[str, Any]:
    kinds: dict[str, Any] = {"rsa": RSAAlgorithm, "ec": ECAlgorithm, "ed": OKPAlgorithm}
    return {**kinds[name].to_jwk(PRIVATE[name].public_key(), as_dict=True), "kid": name, "use": "sig"}


@contextmanager
def issuing(path: str = "", description: str = "oauth-authorization-server") -> Iterator[Issuer]:
    issuer = Issuer(path, description)
    with serving(issuer.app) as url:
        issuer.url = f"{url}{path}"
        yield issuer

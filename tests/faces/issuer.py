"""An authorization server for tests: a real HTTP server with a JWKS, and tokens signed with its keys."""

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

from tests.support import asgi_server

RESOURCE = "https://embeddings.example/mcp"

PRIVATE: dict[str, Any] = {
    "rsa": rsa.generate_private_key(65537, 2048),
    "ec": ec.generate_private_key(ec.SECP256R1()),
    "ed": ed25519.Ed25519PrivateKey.generate(),
}
ALGORITHMS = {"rsa": "RS256", "ec": "ES256", "ed": "EdDSA"}


class Issuer:
    """An authorization server, as far as a resource server sees it.

    Attributes:
        url: its identifier and URL, with its path.
        published: names of the keys in its JWKS.
        fetches: how often the JWKS was requested.
        restricted: the `alg` of its keys; None leaves it out.
        answer: the response in place of the JWKS.
        jwks_uri: where its metadata says the JWKS is.
    """

    def __init__(self, path: str = "", description: str = "oauth-authorization-server") -> None:
        self.url = ""
        self.published = ["rsa", "ec", "ed"]
        self.restricted: str | None = None
        self.fetches = 0
        self.answer: Response | None = None
        self.jwks_uri = "/keys"
        oauth_path = f"/.well-known/{description}{path}"
        openid_path = f"{path}/.well-known/{description}"
        self.app = Starlette(
            routes=[
                Route(oauth_path if description.startswith("oauth") else openid_path, self._metadata),
                Route("/keys", self._jwks),
                Route("/moved", lambda _request: RedirectResponse("/keys")),
            ]
        )

    async def _metadata(self, request: Request) -> Response:
        return JSONResponse({"issuer": self.url, "jwks_uri": f"{str(request.base_url).rstrip('/')}{self.jwks_uri}"})

    async def _jwks(self, _request: Request) -> Response:
        self.fetches += 1
        return self.answer or JSONResponse({"keys": [self._jwk(name) for name in self.published]})

    def _jwk(self, name: str) -> dict[str, Any]:
        return _public_jwk(name) | ({} if self.restricted is None else {"alg": self.restricted})

    def token(self, key: str = "rsa", *, kid: str | None = "", algorithm: str | None = None, **changes: Any) -> str:
        """A valid token with these claims changed; None leaves a claim, or the `kid`, out."""
        claims = {
            "iss": self.url,
            "aud": RESOURCE,
            "sub": "alice",
            "client_id": "agent",
            "scope": "embed read",
            "exp": int(time.time()) + 600,
        } | changes
        present = {name: value for name, value in claims.items() if value is not None}
        headers = None if kid is None else {"kid": kid or key}
        return jwt.encode(present, PRIVATE[key], algorithm or ALGORITHMS[key], headers=headers)


def _public_jwk(name: str) -> dict[str, Any]:
    kinds: dict[str, Any] = {"rsa": RSAAlgorithm, "ec": ECAlgorithm, "ed": OKPAlgorithm}
    return {**kinds[name].to_jwk(PRIVATE[name].public_key(), as_dict=True), "kid": name, "use": "sig"}


@contextmanager
def issuing(path: str = "", description: str = "oauth-authorization-server") -> Iterator[Issuer]:
    issuer = Issuer(path, description)
    with asgi_server(issuer.app) as url:
        issuer.url = f"{url}{path}"
        yield issuer

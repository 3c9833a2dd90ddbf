"""OAuth: valid access tokens of the issuer, here a real HTTP server, are accepted on every route; no others on any."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import httpx
import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from starlette.responses import JSONResponse, Response, StreamingResponse

from embeddings_mcp.errors import InvalidSetting, IssuerUnavailable
from embeddings_mcp.faces.http import jwks
from embeddings_mcp.faces.http.access_tokens import TokenVerifier
from embeddings_mcp.faces.http.app import create_app
from embeddings_mcp.faces.mcp.server import build_mcp_server
from embeddings_mcp.settings import Settings
from tests.faces.issuer import PRIVATE, RESOURCE, Issuer, issuing
from tests.support import INITIALIZE, http_server, service_of

METADATA = "https://embeddings.example/.well-known/oauth-protected-resource/mcp"
FOREIGN_KEY = rsa.generate_private_key(65537, 2048)


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with issuing() as issuer:
        yield issuer


@contextmanager
def serving_for(issuer: Issuer, **chosen: Any) -> Iterator[str]:
    """The URL of a server that accepts this issuer's tokens."""
    with http_server(service_of(), oauth_issuer=issuer.url, oauth_resource=RESOURCE, **chosen) as url:
        yield url


def ask(url: str, token: str, path: str = "/v1/models") -> httpx.Response:
    return httpx.get(f"{url}{path}", headers={"Authorization": f"Bearer {token}"}, timeout=10)


# --- Accepted tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", PRIVATE)
def test_a_token_of_the_issuer_is_accepted_with_every_key_type(issuer: Issuer, key: str) -> None:
    with serving_for(issuer) as url:
        assert ask(url, issuer.token(key)).status_code == 200
        assert ask(url, issuer.token(key, aud=["https://other.example", RESOURCE])).status_code == 200
    assert issuer.fetches == 1


@pytest.mark.parametrize("algorithm", ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"])
def test_an_rsa_key_allows_every_rsa_algorithm_unless_it_names_one(issuer: Issuer, algorithm: str) -> None:
    with serving_for(issuer) as url:
        assert ask(url, issuer.token("rsa", algorithm=algorithm)).status_code == 200
    issuer.published, issuer.restricted = ["rsa"], "RS256"
    with serving_for(issuer) as url:
        accepted = algorithm == "RS256"
        assert ask(url, issuer.token("rsa", algorithm=algorithm)).status_code == (200 if accepted else 401)


@pytest.mark.parametrize(
    ("path", "description"), [("/tenant", "oauth-authorization-server"), ("/tenant", "openid-configuration")]
)
def test_metadata_of_an_issuer_with_a_path_is_found_in_oauth_and_in_openid_form(path: str, description: str) -> None:
    with issuing(path, description) as issuer, serving_for(issuer) as url:
        assert ask(url, issuer.token()).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("era", ["2025-11-25", "2026-07-28"])
async def test_an_mcp_client_with_a_token_calls_tools(issuer: Issuer, era: str) -> None:
    with serving_for(issuer) as url:
        headers = {"Authorization": f"Bearer {issuer.token()}"}
        async with httpx2.AsyncClient(headers=headers, timeout=10) as http:
            transport = streamable_http_client(f"{url}/mcp", http_client=http)
            async with Client(transport, mode="legacy" if era == "2025-11-25" else era) as client:
                answer = await client.call_tool("create_embedding", {"model": "default", "input": "a"})
    assert not answer.is_error


def test_subjects_have_separate_rate_limits_even_with_the_same_client_id(issuer: Issuer) -> None:
    with serving_for(issuer, requests_per_minute=1) as url:
        statuses = [ask(url, issuer.token(sub=subject)).status_code for subject in ("alice", "alice", "bob")]
    assert statuses == [200, 429, 200]


def test_api_keys_are_accepted_as_well_as_tokens(issuer: Issuer) -> None:
    with serving_for(issuer, api_key="plain") as url:
        assert ask(url, "plain").status_code == ask(url, issuer.token()).status_code == 200
        assert ask(url, "other").status_code == 401


def test_with_an_issuer_a_server_may_listen_to_other_machines(issuer: Issuer) -> None:
    service = service_of()
    settings = Settings(oauth_issuer=issuer.url, oauth_resource=RESOURCE, host="0.0.0.0")
    create_app(service, build_mcp_server(service), settings)


# --- Refused tokens --------------------------------------------------------------------------------------------------


def _public_pem() -> bytes:
    public = PRIVATE["rsa"].public_key()
    pem: bytes = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return pem


def _encode(header: dict[str, Any], claims: dict[str, Any], signature: bytes) -> str:
    parts = [jwt.utils.base64url_encode(httpx.Response(200, json=part).content) for part in (header, claims)]
    return b".".join([*parts, jwt.utils.base64url_encode(signature)]).decode()


def _hmac_with_public_key(issuer: Issuer) -> str:
    claims = {"iss": issuer.url, "aud": RESOURCE, "exp": int(time.time()) + 600}
    signed = _encode({"alg": "HS256", "kid": "rsa"}, claims, b"").rpartition(".")[0].encode()
    signature = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(signed, _public_pem())
    return f"{signed.decode()}.{jwt.utils.base64url_encode(signature).decode()}"


BAD = {
    "another issuer": lambda issuer: issuer.token(iss="https://evil.example"),
    "another audience": lambda issuer: issuer.token(aud="https://other.example/mcp"),
    "no audience": lambda issuer: issuer.token(aud=None),
    "expired": lambda issuer: issuer.token(exp=int(time.time()) - 120),
    "no expiry": lambda issuer: issuer.token(exp=None),
    "not yet valid": lambda issuer: issuer.token(nbf=int(time.time()) + 600),
    "signed with a foreign key": lambda issuer: jwt.encode(
        {"iss": issuer.url, "aud": RESOURCE, "exp": int(time.time()) + 600},
        FOREIGN_KEY,
        "RS256",
        headers={"kid": "rsa"},
    ),
    "unknown kid": lambda issuer: issuer.token(kid="other"),
    "no kid": lambda issuer: issuer.token(kid=None),
    "kid of another key": lambda issuer: issuer.token("ec", kid="rsa"),
    "unsigned": lambda issuer: _encode(
        {"alg": "none", "kid": "rsa"}, {"iss": issuer.url, "aud": RESOURCE, "exp": int(time.time()) + 600}, b""
    ),
    "signed with the public key as a secret": _hmac_with_public_key,
    "tampered signature": lambda issuer: issuer.token()[:-4] + "AAAA",
    "not a JWT": lambda _issuer: "a.b.c",
    "not ASCII": lambda _issuer: "\xe9" * 40,
    "enormous": lambda _issuer: "a" * 30_000,
}


@pytest.mark.parametrize("make", BAD.values(), ids=BAD)
def test_any_other_token_is_refused_on_every_route(issuer: Issuer, make: Any) -> None:
    with serving_for(issuer) as url:
        token = make(issuer)
        for path in ("/v1/models", "/mcp", "/v1/metrics"):
            refused = httpx.get(f"{url}{path}", headers=[(b"Authorization", f"Bearer {token}".encode("latin-1"))])
            assert refused.status_code == 401
            assert (
                refused.headers["WWW-Authenticate"] == f'Bearer resource_metadata="{METADATA}", error="invalid_token"'
            )
            assert METADATA in refused.json()["error"]["message"]
            assert token not in refused.text


def test_without_a_token_a_caller_is_referred_to_the_resource_metadata_which_needs_none(issuer: Issuer) -> None:
    with serving_for(issuer, oauth_scopes="embed") as url:
        refused = httpx.post(f"{url}/mcp", json={})
        assert refused.status_code == 401
        assert refused.headers["WWW-Authenticate"] == f'Bearer resource_metadata="{METADATA}"'
        described = httpx.get(f"{url}{httpx.URL(METADATA).path}").json()
    assert described["resource"] == RESOURCE
    assert described["authorization_servers"] == [issuer.url]
    assert described["scopes_supported"] == ["embed"]
    assert issuer.fetches == 0


@pytest.mark.parametrize(
    "claims", [{"scope": "embed read"}, {"scope": None, "scp": ["read", "embed"]}, {"scope": None, "scp": "embed read"}]
)
def test_a_token_with_the_required_scopes_is_accepted(issuer: Issuer, claims: dict[str, Any]) -> None:
    with serving_for(issuer, oauth_scopes="read embed") as url:
        assert ask(url, issuer.token(**claims)).status_code == 200


@pytest.mark.parametrize("scope", ["embed", "embedread", None, 7])
def test_a_token_that_lacks_a_scope_is_refused_with_the_required_ones(issuer: Issuer, scope: Any) -> None:
    with serving_for(issuer, oauth_scopes="embed read") as url:
        refused = ask(url, issuer.token(scope=scope))
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "insufficient_scope"
    assert refused.headers["WWW-Authenticate"].endswith('error="insufficient_scope", scope="embed read"')


def test_a_session_is_its_owners_only(issuer: Issuer) -> None:
    accept = {"Accept": "application/json, text/event-stream"}
    with serving_for(issuer, api_keys="bob=second carol=third") as url:

        def post(token: str, body: dict[str, Any], **headers: str) -> httpx.Response:
            headers = {"Authorization": f"Bearer {token}", **accept, **headers}
            return httpx.post(f"{url}/mcp", json=body, headers=headers, timeout=10)

        for owner, others in ((issuer.token(), [issuer.token(sub="mallory"), "second"]), ("second", ["third"])):
            session = post(owner, INITIALIZE).headers["Mcp-Session-Id"]
            ping = {"jsonrpc": "2.0", "id": 2, "method": "ping"}
            assert post(owner, ping, **{"Mcp-Session-Id": session}).status_code == 200
            for other in others:
                assert post(other, ping, **{"Mcp-Session-Id": session}).status_code == 404


# --- The issuer ------------------------------------------------------------------------------------------------------


def test_a_new_key_of_the_issuer_is_found_but_unknown_keys_cannot_trigger_fetches_at_will(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    issuer.published = ["rsa"]
    with serving_for(issuer) as url:
        assert ask(url, issuer.token("rsa")).status_code == 200
        issuer.published = ["rsa", "ec"]
        for _ in range(5):
            assert ask(url, issuer.token("ec")).status_code == 401
        assert issuer.fetches == 1
        monkeypatch.setattr(jwks, "REFETCH_SECONDS", 0.0)
        assert ask(url, issuer.token("ec")).status_code == 200


@pytest.mark.anyio
async def test_concurrent_callers_share_one_fetch_of_the_keys(issuer: Issuer) -> None:
    verifier = TokenVerifier(issuer.url, RESOURCE)
    accepted: list[bool] = []

    async def verify() -> None:
        accepted.append(await verifier.verify_token(issuer.token()) is not None)

    async with anyio.create_task_group() as callers:
        for _ in range(3):
            callers.start_soon(verify)
    await verifier.aclose()
    assert accepted == [True] * 3
    assert issuer.fetches == 1


def test_a_revoked_key_is_refused_once_the_cached_keys_have_expired(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving_for(issuer) as url:
        assert ask(url, issuer.token("rsa")).status_code == 200
        issuer.published = ["ec"]
        monkeypatch.setattr(jwks, "MAX_AGE_SECONDS", 0.0)
        monkeypatch.setattr(jwks, "REFETCH_SECONDS", 0.0)
        assert ask(url, issuer.token("rsa")).status_code == 401


def test_a_token_needs_no_kid_where_the_issuer_has_one_key(issuer: Issuer) -> None:
    issuer.published = ["ec"]
    with serving_for(issuer) as url:
        assert ask(url, issuer.token("ec", kid=None)).status_code == 200


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Response(status_code=500), "responds with 500"),
        (Response("no JSON"), "cannot be read"),
        (JSONResponse([]), "does not respond with a JSON object"),
        (JSONResponse({"keys": []}), "its JWKS lists nothing in `keys`"),
        (JSONResponse({"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "rsa"}]}), None),
        (JSONResponse({"keys": ["rsa", None, {"kty": "RSA", "n": 5}, {"kty": "EC", "crv": "P-256"}]}), None),
        (Response(b" " * (jwks._MAX_RESPONSE_BYTES + 1)), "more than 1,048,576 bytes"),
        (
            Response(b"\x0b\x02\x80{}\x03", headers={"Content-Encoding": "br"}),
            "responds with the Content-Encoding 'br', which was not asked for",
        ),
    ],
)
def test_an_issuer_without_readable_keys_is_reported_as_unavailable(
    issuer: Issuer, answer: Response, reason: str | None
) -> None:
    issuer.answer = answer
    with serving_for(issuer, api_key="plain") as url:
        refused = ask(url, issuer.token())
        if reason is None:  # the JWKS can be read, but has no usable public key
            assert refused.status_code == 401
            return
        assert refused.status_code == 503
        assert reason in refused.json()["error"]["message"]
        assert refused.json()["error"]["code"] == "issuer_unavailable"
        assert int(refused.headers["Retry-After"]) > 0
        assert ask(url, "plain").status_code == 200


def test_an_issuer_whose_answer_never_ends_is_not_waited_for(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await anyio.sleep(0.05)

    monkeypatch.setattr(jwks, "_TIMEOUT_SECONDS", 0.5)
    issuer.answer = StreamingResponse(answer())
    with serving_for(issuer) as url:
        refused = ask(url, issuer.token())
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "issuer_unavailable"


def test_a_known_key_stays_valid_while_the_issuer_is_down(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_for(issuer) as url:
        assert ask(url, issuer.token()).status_code == 200
        issuer.answer = Response(status_code=500)
        monkeypatch.setattr(jwks, "MAX_AGE_SECONDS", 0.0)
        monkeypatch.setattr(jwks, "REFETCH_SECONDS", 0.0)
        assert ask(url, issuer.token()).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("jwks_uri", ["/moved", "@evil.example/keys", "@[evil.example"])
async def test_keys_are_fetched_only_over_https_and_without_redirects(issuer: Issuer, jwks_uri: str) -> None:
    issuer.jwks_uri = jwks_uri
    verifier = TokenVerifier(issuer.url, RESOURCE)
    with pytest.raises(IssuerUnavailable, match=r"responds with 307|not https|cannot be read: ValueError"):
        await verifier.verify_token(issuer.token())
    await verifier.aclose()


@pytest.mark.parametrize(
    ("chosen", "named"),
    [
        ({"oauth_issuer": "https://a.example"}, "go together"),
        ({"oauth_resource": RESOURCE}, "go together"),
        ({"oauth_issuer": "http://a.example", "oauth_resource": RESOURCE}, "OAUTH_ISSUER must be an https URL"),
        ({"oauth_issuer": "a.example", "oauth_resource": RESOURCE}, "OAUTH_ISSUER must be an https URL"),
        ({"oauth_issuer": "https://a.example", "oauth_resource": "mcp"}, "OAUTH_RESOURCE must be an https URL"),
    ],
)
def test_invalid_settings_are_refused_by_name(chosen: dict[str, str], named: str) -> None:
    service = service_of()
    with pytest.raises(InvalidSetting, match=named):
        create_app(service, build_mcp_server(service), Settings.model_validate(chosen))

"""OAuth: access tokens of an issuer, which is a real HTTP server here, open every route; others open none."""

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
from tests.support import INITIALIZE, served, service_of

METADATA = "https://embeddings.example/.well-known/oauth-protected-resource/mcp"
STRANGER = rsa.generate_private_key(65537, 2048)


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with issuing() as issuer:
        yield issuer


@contextmanager
def serving_for(issuer: Issuer, **chosen: Any) -> Iterator[str]:
    """The address of a server that takes this issuer's tokens."""
    with served(service_of(), oauth_issuer=issuer.url, oauth_resource=RESOURCE, **chosen) as url:
        yield url


def ask(url: str, token: str, path: str = "/v1/models") -> httpx.Response:
    return httpx.get(f"{url}{path}", headers={"Authorization": f"Bearer {token}"}, timeout=10)


# --- Tokens that open ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", PRIVATE)
def test_a_token_of_the_issuer_opens_whatever_kind_its_key_is(issuer: Issuer, key: str) -> None:
    with serving_for(issuer) as url:
        assert ask(url, issuer.token(key)).status_code == 200
        assert ask(url, issuer.token(key, aud=["https://other.example", RESOURCE])).status_code == 200
    assert issuer.asked == 1


@pytest.mark.parametrize("algorithm", ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"])
def test_an_rsa_key_signs_in_every_way_unless_it_is_for_one_only(issuer: Issuer, algorithm: str) -> None:
    with serving_for(issuer) as url:
        assert ask(url, issuer.token("rsa", algorithm=algorithm)).status_code == 200
    issuer.published, issuer.restricted = ["rsa"], "RS256"
    with serving_for(issuer) as url:
        accepted = algorithm == "RS256"
        assert ask(url, issuer.token("rsa", algorithm=algorithm)).status_code == (200 if accepted else 401)


@pytest.mark.parametrize(
    ("path", "description"), [("/tenant", "oauth-authorization-server"), ("/tenant", "openid-configuration")]
)
def test_an_issuer_with_a_path_is_found_in_either_way_of_describing_itself(path: str, description: str) -> None:
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


def test_whom_a_token_speaks_for_has_a_pace_of_his_own_also_where_he_shares_a_program(issuer: Issuer) -> None:
    with serving_for(issuer, requests_per_minute=1) as url:
        statuses = [ask(url, issuer.token(sub=who)).status_code for who in ("alice", "alice", "bob")]
    assert statuses == [200, 429, 200]


def test_api_keys_open_beside_tokens(issuer: Issuer) -> None:
    with serving_for(issuer, api_key="plain") as url:
        assert ask(url, "plain").status_code == ask(url, issuer.token()).status_code == 200
        assert ask(url, "other").status_code == 401


def test_with_an_issuer_a_server_may_listen_to_other_machines(issuer: Issuer) -> None:
    service = service_of()
    settings = Settings(oauth_issuer=issuer.url, oauth_resource=RESOURCE, host="0.0.0.0")
    create_app(service, build_mcp_server(service), settings)


# --- Tokens that do not ----------------------------------------------------------------------------------------------


def _public_pem() -> bytes:
    public = PRIVATE["rsa"].public_key()
    pem: bytes = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return pem


def _by_hand(header: dict[str, Any], claims: dict[str, Any], signature: bytes) -> str:
    parts = [jwt.utils.base64url_encode(httpx.Response(200, json=part).content) for part in (header, claims)]
    return b".".join([*parts, jwt.utils.base64url_encode(signature)]).decode()


def _hmac_by_public_key(issuer: Issuer) -> str:
    claims = {"iss": issuer.url, "aud": RESOURCE, "exp": int(time.time()) + 600}
    signed = _by_hand({"alg": "HS256", "kid": "rsa"}, claims, b"").rpartition(".")[0].encode()
    signature = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(signed, _public_pem())
    return f"{signed.decode()}.{jwt.utils.base64url_encode(signature).decode()}"


BAD = {
    "of another issuer": lambda issuer: issuer.token(iss="https://evil.example"),
    "for another server": lambda issuer: issuer.token(aud="https://other.example/mcp"),
    "for nobody": lambda issuer: issuer.token(aud=None),
    "run out": lambda issuer: issuer.token(exp=int(time.time()) - 120),
    "without an end": lambda issuer: issuer.token(exp=None),
    "not yet good": lambda issuer: issuer.token(nbf=int(time.time()) + 600),
    "signed by a stranger": lambda issuer: jwt.encode(
        {"iss": issuer.url, "aud": RESOURCE, "exp": int(time.time()) + 600}, STRANGER, "RS256", headers={"kid": "rsa"}
    ),
    "with a key that nobody knows": lambda issuer: issuer.token(kid="other"),
    "without the name of a key": lambda issuer: issuer.token(kid=None),
    "with another key's name": lambda issuer: issuer.token("ec", kid="rsa"),
    "not signed": lambda issuer: _by_hand(
        {"alg": "none", "kid": "rsa"}, {"iss": issuer.url, "aud": RESOURCE, "exp": int(time.time()) + 600}, b""
    ),
    "signed with the public key as a secret": _hmac_by_public_key,
    "changed": lambda issuer: issuer.token()[:-4] + "AAAA",
    "no token": lambda _issuer: "a.b.c",
    "no text": lambda _issuer: "\xe9" * 40,
    "enormous": lambda _issuer: "a" * 30_000,
}


@pytest.mark.parametrize("make", BAD.values(), ids=BAD)
def test_any_other_token_opens_nothing(issuer: Issuer, make: Any) -> None:
    with serving_for(issuer) as url:
        shown = make(issuer)
        for path in ("/v1/models", "/mcp", "/v1/metrics"):
            refused = httpx.get(f"{url}{path}", headers=[(b"Authorization", f"Bearer {shown}".encode("latin-1"))])
            assert refused.status_code == 401
            assert (
                refused.headers["WWW-Authenticate"] == f'Bearer resource_metadata="{METADATA}", error="invalid_token"'
            )
            assert METADATA in refused.json()["error"]["message"]
            assert shown not in refused.text


def test_without_a_token_a_caller_hears_where_to_get_one_and_may_look_there(issuer: Issuer) -> None:
    with serving_for(issuer, oauth_scopes="embed") as url:
        refused = httpx.post(f"{url}/mcp", json={})
        assert refused.status_code == 401
        assert refused.headers["WWW-Authenticate"] == f'Bearer resource_metadata="{METADATA}"'
        described = httpx.get(f"{url}{httpx.URL(METADATA).path}").json()
    assert described["resource"] == RESOURCE
    assert described["authorization_servers"] == [issuer.url]
    assert described["scopes_supported"] == ["embed"]
    assert issuer.asked == 0


@pytest.mark.parametrize(
    "claims", [{"scope": "embed read"}, {"scope": None, "scp": ["read", "embed"]}, {"scope": None, "scp": "embed read"}]
)
def test_a_token_with_the_scopes_opens(issuer: Issuer, claims: dict[str, Any]) -> None:
    with serving_for(issuer, oauth_scopes="read embed") as url:
        assert ask(url, issuer.token(**claims)).status_code == 200


@pytest.mark.parametrize("scope", ["embed", "embedread", None, 7])
def test_a_token_without_a_scope_hears_which_it_needs(issuer: Issuer, scope: Any) -> None:
    with serving_for(issuer, oauth_scopes="embed read") as url:
        refused = ask(url, issuer.token(scope=scope))
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "insufficient_scope"
    assert refused.headers["WWW-Authenticate"].endswith('error="insufficient_scope", scope="embed read"')


def test_a_session_is_its_owners_only(issuer: Issuer) -> None:
    accept = {"Accept": "application/json, text/event-stream"}
    with serving_for(issuer, api_keys="bob=second carol=third") as url:

        def post(token: str, body: dict[str, Any], **headers: str) -> httpx.Response:
            every = {"Authorization": f"Bearer {token}", **accept, **headers}
            return httpx.post(f"{url}/mcp", json=body, headers=every, timeout=10)

        for owner, others in ((issuer.token(), [issuer.token(sub="mallory"), "second"]), ("second", ["third"])):
            session = post(owner, INITIALIZE).headers["Mcp-Session-Id"]
            ping = {"jsonrpc": "2.0", "id": 2, "method": "ping"}
            assert post(owner, ping, **{"Mcp-Session-Id": session}).status_code == 200
            for other in others:
                assert post(other, ping, **{"Mcp-Session-Id": session}).status_code == 404


# --- The issuer ------------------------------------------------------------------------------------------------------


def test_a_new_key_of_the_issuer_is_found_but_nobody_can_have_him_asked_at_will(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    issuer.published = ["rsa"]
    with serving_for(issuer) as url:
        assert ask(url, issuer.token("rsa")).status_code == 200
        issuer.published = ["rsa", "ec"]
        for _ in range(5):
            assert ask(url, issuer.token("ec")).status_code == 401
        assert issuer.asked == 1
        monkeypatch.setattr(jwks, "REFETCH_SECONDS", 0.0)
        assert ask(url, issuer.token("ec")).status_code == 200


@pytest.mark.anyio
async def test_who_comes_while_the_issuer_is_asked_waits_for_his_answer_too(issuer: Issuer) -> None:
    verifier = TokenVerifier(issuer.url, RESOURCE)
    found: list[bool] = []

    async def verify() -> None:
        found.append(await verifier.verify_token(issuer.token()) is not None)

    async with anyio.create_task_group() as callers:
        for _ in range(3):
            callers.start_soon(verify)
    await verifier.aclose()
    assert found == [True] * 3
    assert issuer.asked == 1


def test_a_key_that_the_issuer_has_withdrawn_opens_no_more_once_the_keys_are_old(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving_for(issuer) as url:
        assert ask(url, issuer.token("rsa")).status_code == 200
        issuer.published = ["ec"]
        monkeypatch.setattr(jwks, "MAX_AGE_SECONDS", 0.0)
        monkeypatch.setattr(jwks, "REFETCH_SECONDS", 0.0)
        assert ask(url, issuer.token("rsa")).status_code == 401


def test_a_lone_key_need_not_be_named(issuer: Issuer) -> None:
    issuer.published = ["ec"]
    with serving_for(issuer) as url:
        assert ask(url, issuer.token("ec", kid=None)).status_code == 200


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Response(status_code=500), "answers 500"),
        (Response("no JSON"), "cannot be read"),
        (JSONResponse([]), "does not answer with a JSON object"),
        (JSONResponse({"keys": []}), "its JWKS has no `keys`"),
        (JSONResponse({"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "rsa"}]}), None),
        (JSONResponse({"keys": ["rsa", None, {"kty": "RSA", "n": 5}, {"kty": "EC", "crv": "P-256"}]}), None),
        (Response(b" " * (jwks._MAX_RESPONSE_BYTES + 1)), "more than 1,048,576 bytes"),
    ],
)
def test_an_issuer_that_does_not_say_its_keys_is_no_fault_of_the_token(
    issuer: Issuer, answer: Response, reason: str | None
) -> None:
    issuer.answer = answer
    with serving_for(issuer, api_key="plain") as url:
        refused = ask(url, issuer.token())
        if reason is None:  # a secret among the public keys is none that opens
            assert refused.status_code == 401
            return
        assert refused.status_code == 503
        assert reason in refused.json()["error"]["message"]
        assert refused.json()["error"]["code"] == "issuer_unavailable"
        assert int(refused.headers["Retry-After"]) > 0
        assert ask(url, "plain").status_code == 200


def test_an_issuer_that_is_never_done_with_his_answer_is_not_waited_for(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_known_key_goes_on_to_open_while_the_issuer_is_down(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_for(issuer) as url:
        assert ask(url, issuer.token()).status_code == 200
        issuer.answer = Response(status_code=500)
        monkeypatch.setattr(jwks, "MAX_AGE_SECONDS", 0.0)
        monkeypatch.setattr(jwks, "REFETCH_SECONDS", 0.0)
        assert ask(url, issuer.token()).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("jwks_uri", ["/moved", "@evil.example/keys", "@[evil.example"])
async def test_keys_come_from_where_the_issuer_says_over_https_and_from_nowhere_else(
    issuer: Issuer, jwks_uri: str
) -> None:
    issuer.jwks_uri = jwks_uri
    verifier = TokenVerifier(issuer.url, RESOURCE)
    with pytest.raises(IssuerUnavailable, match=r"answers 307|not https|cannot be read: ValueError"):
        await verifier.verify_token(issuer.token())
    await verifier.aclose()


@pytest.mark.parametrize(
    ("chosen", "named"),
    [
        ({"oauth_issuer": "https://a.example"}, "go together"),
        ({"oauth_resource": RESOURCE}, "go together"),
        ({"oauth_issuer": "http://a.example", "oauth_resource": RESOURCE}, "OAUTH_ISSUER must be an https address"),
        ({"oauth_issuer": "a.example", "oauth_resource": RESOURCE}, "OAUTH_ISSUER must be an https address"),
        ({"oauth_issuer": "https://a.example", "oauth_resource": "mcp"}, "OAUTH_RESOURCE must be an https address"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(chosen: dict[str, str], named: str) -> None:
    service = service_of()
    with pytest.raises(InvalidSetting, match=named):
        create_app(service, build_mcp_server(service), Settings.model_validate(chosen))

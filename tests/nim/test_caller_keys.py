"""Callers' own keys for an endpoint: sent to the endpoint with their own requests, and nowhere else."""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import httpx
import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from pydantic import SecretStr

from embeddings_mcp.assemble import build_service
from embeddings_mcp.caller import CALLER_KEY_HEADER, with_caller_key
from embeddings_mcp.embedders.nim import Endpoint, EndpointClient, NimEmbedder, client
from embeddings_mcp.errors import AuthenticationFailed, Overloaded
from embeddings_mcp.faces.http.app import create_app
from embeddings_mcp.faces.mcp.server import build_mcp_server
from embeddings_mcp.settings import EndpointSettings, Settings
from tests.nim.standin import SYMMETRIC, Reply, StandIn, answering, changing, stand_in
from tests.support import asgi_server

pytestmark = pytest.mark.anyio

OURS, ALICES, BOBS = "nvapi-of-the-server", "nvapi-alice", "nvapi-bob"
NUMBERS = itertools.count()


def request() -> dict[str, str]:
    """A request for a new text, since cached ones are not sent to the endpoint again."""
    return {"model": SYMMETRIC.id, "input": f"text {next(NUMBERS)}"}


@contextmanager
def http_server(nim: StandIn, *, default: str | None = None, cache: str = "memory", **endpoint: Any) -> Iterator[str]:
    """URL of a server of ours with the stand-in as its endpoint."""
    configured = EndpointSettings(url=nim.url, **{"api_key": OURS, "caller_keys": True, **endpoint})
    settings = Settings(endpoints=(configured,), default_model=default, cache=cache)
    service = build_service(settings)
    with asgi_server(create_app(service, build_mcp_server(service), settings)) as url:
        yield url


@asynccontextmanager
async def rest(url: str) -> AsyncIterator[httpx.AsyncClient]:
    with anyio.fail_after(20):
        async with httpx.AsyncClient(base_url=url, timeout=20) as http:
            yield http


async def ask(http: httpx.AsyncClient, key: str | None) -> httpx.Response:
    headers = {} if key is None else {CALLER_KEY_HEADER: key}
    return await http.post("/v1/embeddings", json=request(), headers=headers)


def keys_seen(nim: StandIn, path: str = "/v1/embeddings") -> list[str | None]:
    return [seen.headers.get("authorization") for seen in nim.seen if seen.path == path]


def bytes_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


async def test_a_callers_key_replaces_the_servers_for_its_own_request_only() -> None:
    async with stand_in() as nim:
        with http_server(nim) as url:
            async with rest(url) as http:
                for key in (None, ALICES, BOBS, None):
                    assert (await ask(http, key)).status_code == 200
        assert keys_seen(nim) == [f"Bearer {key}" for key in (OURS, ALICES, BOBS, OURS)]
        assert keys_seen(nim, "/v1/models") == [f"Bearer {OURS}"]


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_a_tool_call_carries_the_key_of_its_own_request(mode: str) -> None:
    """Even if the requests of one session have different keys, or none."""
    async with stand_in() as nim:
        with http_server(nim) as url, anyio.fail_after(20):
            async with (
                httpx2.AsyncClient() as http,
                Client(streamable_http_client(f"{url}/mcp", http_client=http), mode=mode) as mcp,
            ):
                for key in (ALICES, BOBS, None):
                    http.headers.pop(CALLER_KEY_HEADER, None)
                    if key is not None:
                        http.headers[CALLER_KEY_HEADER] = key
                    assert not (await mcp.call_tool("create_embedding", request())).is_error
        assert keys_seen(nim) == [f"Bearer {key}" for key in (ALICES, BOBS, OURS)]


async def test_the_keys_of_concurrent_callers_are_not_mixed_up() -> None:
    keys = [f"nvapi-caller-{number}" for number in range(20)]
    async with stand_in() as nim:
        with http_server(nim, batch_size=1) as url:
            async with rest(url) as http, anyio.create_task_group() as group:
                for key in keys:
                    body = {"model": SYMMETRIC.id, "input": [f"{key} one", f"{key} two"]}
                    headers = {CALLER_KEY_HEADER: key}
                    group.start_soon(lambda b, h: http.post("/v1/embeddings", json=b, headers=h), body, headers)
        embedded = [seen for seen in nim.seen if seen.path == "/v1/embeddings"]
        assert len(embedded) == 2 * len(keys)
        assert all(seen.headers["authorization"] == f"Bearer {seen.json['input'][0].split()[0]}" for seen in embedded)


async def test_a_readiness_probe_sends_no_key_to_the_endpoint() -> None:
    async with stand_in() as nim:
        with http_server(nim, models=(SYMMETRIC.id,), default=SYMMETRIC.id, api_key=None) as url:
            async with rest(url) as http:
                await http.get("/v1/health/ready", headers={CALLER_KEY_HEADER: ALICES})
        assert nim.seen
        assert all("authorization" not in seen.headers for seen in nim.seen)


async def test_a_server_that_accepts_no_callers_keys_says_so_on_every_route() -> None:
    async with stand_in() as nim:
        with http_server(nim, caller_keys=False) as url:
            async with rest(url) as http:
                for path in ("/v1/embeddings", "/mcp", "/v1/models"):
                    answer = await http.post(path, json=request(), headers={CALLER_KEY_HEADER: ALICES})
                    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
                    assert "this server takes no keys of its callers" in answer.json()["error"]["message"]
                    assert ALICES not in answer.text
        assert not nim.seen


@pytest.mark.parametrize("values", [["nvapi two"], [""], ["nvapi-\xe9"], [ALICES, BOBS]])
async def test_a_header_without_a_valid_key_is_refused_without_being_repeated(values: list[str]) -> None:
    async with stand_in() as nim:
        with http_server(nim) as url:
            async with rest(url) as http:
                headers = [(CALLER_KEY_HEADER.encode(), value.encode("latin-1")) for value in values]
                answer = await http.post("/v1/embeddings", json=request(), headers=headers)
        assert answer.status_code == 400
        assert "must hold one key" in answer.json()["error"]["message"]
        assert "nvapi" not in answer.text
        assert not nim.seen


@pytest.mark.parametrize(
    ("ours", "callers", "says"),
    [
        (None, None, f"asks for a key: send yours in the header {CALLER_KEY_HEADER}"),
        (None, ALICES, f"does not accept the key (401): send yours in the header {CALLER_KEY_HEADER}"),
        (OURS, ALICES, f"does not accept the key (401): send yours in the header {CALLER_KEY_HEADER}"),
    ],
)
async def test_a_caller_is_told_to_fix_its_own_refused_key(ours: str | None, callers: str | None, says: str) -> None:
    async with stand_in(faults=itertools.repeat(answering(401, b"no"))) as nim:
        with http_server(nim, api_key=ours) as url:
            async with rest(url) as http:
                answer = await ask(http, callers)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (401, "invalid_api_key")
        assert says in error["message"]
        assert not [key for key in (OURS, ALICES) if key in answer.text]


async def test_a_refusal_of_the_servers_own_key_is_not_the_callers_fault() -> None:
    async with stand_in(faults=itertools.repeat(answering(401, b"no"))) as nim:
        with http_server(nim) as url:
            async with rest(url) as http:
                answer = await ask(http, None)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_refused")
        assert "does not accept the API key in the endpoint's `api_key`" in answer.json()["error"]["message"]


async def test_each_key_has_its_own_rate_limit() -> None:
    async with stand_in() as nim:
        endpoint = Endpoint(url=nim.url, caller_keys=True, requests_per_minute=1, deadline=30)
        embedder = NimEmbedder(EndpointClient(endpoint), SYMMETRIC)

        async def embed() -> None:
            await embedder.embed(["a text"], input_type=None, truncate="NONE")

        with anyio.fail_after(10):
            for key in (ALICES, BOBS):
                with with_caller_key(SecretStr(key)):
                    await embed()
            await embed()
            for key in (ALICES, BOBS):
                with with_caller_key(SecretStr(key)), pytest.raises(Overloaded) as caught:
                    await embed()
                assert key not in caught.value.message
            with pytest.raises(Overloaded):
                await embed()
            await embedder.aclose()
        assert len(nim.seen) == 3


async def test_the_least_recently_used_callers_throttle_is_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_CALLER_THROTTLES", 3)
    endpoint_client = EndpointClient(Endpoint(url="http://localhost", caller_keys=True))
    throttles = []
    for key in ("a", "b", "c", "a", "d"):
        with with_caller_key(SecretStr(key)):
            throttles.append(endpoint_client.account.throttle)
    assert throttles[0] is throttles[3]
    with with_caller_key(SecretStr("b")):  # the least recently used one was evicted for "d"
        assert endpoint_client.account.throttle is not throttles[1]
    with with_caller_key(SecretStr("a")):
        assert endpoint_client.account.throttle is throttles[0]


async def test_a_caller_without_a_key_is_told_to_send_one_and_the_server_is_still_ready() -> None:
    unauthorized = answering(401, b"Header of type `authorization` was missing")
    async with stand_in(faults=itertools.repeat(unauthorized)) as nim:
        embedder = NimEmbedder(EndpointClient(Endpoint(url=nim.url, caller_keys=True)), SYMMETRIC)
        with anyio.fail_after(10):
            await embedder.check()
            with pytest.raises(AuthenticationFailed, match="send yours"):
                await embedder.embed(["a text"], input_type=None, truncate="NONE")
            await embedder.aclose()


async def test_vectors_made_on_a_callers_account_have_an_identity_of_their_own() -> None:
    embedder = NimEmbedder(EndpointClient(Endpoint(url="http://localhost:1", caller_keys=True)), SYMMETRIC)
    identities = [await embedder.identify()]
    for key in (ALICES, BOBS, ALICES):
        with with_caller_key(SecretStr(key)):
            identities.append(await embedder.identify())
    assert identities[0] == "http://localhost:1/v1 nim test/symmetric"
    assert identities[1] == identities[3]
    assert len(set(identities)) == 3
    assert not [identity for identity in identities for key in (ALICES, BOBS) if key in identity]


async def test_no_key_is_stored_or_printed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    printed: list[str] = []
    echoing_key = answering(400, {"error": f"what is Bearer {ALICES}?"})
    faults = itertools.cycle(
        [echoing_key, answering(402), answering(403), answering(404, b"not found for account"), None]
    )
    async with stand_in(faults=faults) as nim:
        endpoint = Endpoint(url=nim.url, api_key=SecretStr(OURS), caller_keys=True)
        embedder = NimEmbedder(EndpointClient(endpoint), SYMMETRIC)
        with anyio.fail_after(10), with_caller_key(SecretStr(ALICES)):
            for _ in range(5):
                try:
                    await embedder.embed(["a text"], input_type=None, truncate="NONE")
                except Exception as error:  # noqa: BLE001 - each kind has its own test
                    printed += [str(error), repr(vars(error))]
            printed += [repr(vars(embedder)), repr(vars(embedder._client)), repr(embedder._client.account)]
            await embedder.aclose()
    printed += [f"{record.getMessage()} {vars(record)}" for record in caplog.records]
    assert len(printed) > 10
    assert not [line for line in printed for key in (ALICES, OURS) if key in line]


async def test_a_key_echoed_in_a_response_is_not_stored_logged_or_forwarded(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.WARNING)
    keys = {None: "a-key-of-the-server", "a-key-of-alice": "a-key-of-alice"}
    async with stand_in() as nim:

        def echoing(reply: Reply) -> Reply:
            sent = nim.seen[-1].headers["authorization"]
            reply = changing(lambda payload: payload.update(model=f"served for {sent}"))(reply)
            return replace(reply, headers={**reply.headers, "Deprecation": sent})

        nim.faults = itertools.repeat(echoing)
        with http_server(nim, api_key=keys[None], cache=str(tmp_path)) as url:
            async with rest(url) as http:
                answers = [await ask(http, key) for key in keys]
    assert keys_seen(nim) == [f"Bearer {key}" for key in keys.values()]
    assert [answer.json()["model"] for answer in answers] == ["served for Bearer ***"] * 2
    assert "end of life" in caplog.text
    stored = bytes_in(tmp_path)
    assert b"served for Bearer ***" in stored
    assert not [key for key in keys.values() if key in caplog.text or key.encode() in stored]

"""Refused on every route: foreign hosts and origins, missing or wrong keys, bodies over the limit."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from mcp.server.mcpserver import MCPServer
from starlette.types import ASGIApp, Message, Scope

from embeddings_mcp.errors import InvalidSetting
from embeddings_mcp.faces.http.app import create_app
from embeddings_mcp.faces.http.guard import Guard
from embeddings_mcp.settings import Settings
from tests.support import INITIALIZE, client_of, service_of

KEY = "kéy-of-this-server"
LIMIT = 10_000
EVERYWHERE = ["/v1/models", "/v1/health/live", "/openapi.json", "/mcp", "/nowhere"]
MCP_HEADERS = {"accept": "application/json, text/event-stream"}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with client_of(allowed_hosts=("Embeddings.example:8443", "fd00::7"), max_body_bytes=LIMIT) as client:
        yield client


@pytest.fixture(scope="module")
def locked() -> Iterator[httpx.Client]:
    with client_of(api_key=KEY) as client:
        yield client


def raw(client: httpx.Client, request: bytes) -> bytes:
    """The first bytes of the response to a request that no HTTP client would send."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=10) as caller:
        caller.sendall(request)
        return caller.recv(100)


# --- Host and Origin -------------------------------------------------------------------------------------------------

OURS = ["localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:8000"]
OURS_BY_SETTING = ["embeddings.example", "embeddings.example:9", "[fd00::7]:8000"]
FOREIGN = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "evil.example#localhost",
    "localhost:8000@evil.example",
    "localhost:8000:8000",
    "localhost:evil",
    "[::1",
    "::1",
    "192.168.1.1",
    "localhost, evil.example",
]


@pytest.mark.parametrize("host", [*OURS, *OURS_BY_SETTING])
def test_the_servers_own_names_are_answered(client: httpx.Client, host: str) -> None:
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


def test_the_host_that_the_server_listens_on_is_one_of_its_names() -> None:
    with client_of(host="Embeddings.example", api_key=KEY) as client:
        headers = authorization(f"Bearer {KEY}")
        headers["host"] = "embeddings.example:8000"
        assert client.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_a_foreign_host_is_refused_on_every_route(client: httpx.Client, host: str) -> None:
    for path in EVERYWHERE:
        answer = client.get(path, headers={"host": host})

        assert answer.status_code == 421, path
        assert answer.json()["error"]["code"] == "misdirected_request", path
        assert "EMBEDDINGS_MCP_ALLOWED_HOSTS" in answer.json()["error"]["message"], path


def test_a_probe_over_http_1_0_needs_no_host(client: httpx.Client) -> None:
    assert raw(client, b"GET /v1/health/ready HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert raw(client, b"GET /v1/health/ready HTTP/1.0\r\nHost: evil.example\r\n\r\n").startswith(b"HTTP/1.1 421 ")


@pytest.mark.parametrize(
    ("hosts", "status"),
    [(b"", 400), (b"Host:\r\n", 421), (b"Host: localhost\r\nHost: localhost\r\n", 400)],
    ids=["none", "empty", "two"],
)
def test_http_1_1_requires_exactly_one_host(client: httpx.Client, hosts: bytes, status: int) -> None:
    answer = raw(client, b"GET /v1/health/ready HTTP/1.1\r\n" + hosts + b"\r\n")

    assert answer.startswith(f"HTTP/1.1 {status} ".encode())


def test_without_a_host_the_key_is_still_required_and_foreign_pages_are_still_refused(locked: httpx.Client) -> None:
    assert raw(locked, b"GET /v1/models HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 401 ")
    page = b"Origin: http://evil.example\r\n"
    assert raw(locked, b"GET /v1/health/live HTTP/1.0\r\n" + page + b"\r\n").startswith(b"HTTP/1.1 403 ")


@pytest.mark.parametrize("host", [*OURS, *OURS_BY_SETTING])
def test_pages_of_the_servers_own_hosts_may_use_it(client: httpx.Client, host: str) -> None:
    assert client.get("/v1/models", headers={"origin": f"http://{host}"}).status_code == 200
    assert client.get("/v1/models", headers={"origin": f"https://{host}"}).status_code == 200


@pytest.mark.parametrize(
    "origin",
    [*(f"http://{host}" for host in FOREIGN), "null", "", "localhost", "file://", "chrome-extension://localhost"],
)
def test_a_foreign_origin_is_refused_on_every_route(client: httpx.Client, origin: str) -> None:
    for path in EVERYWHERE:
        answer = client.post(path, headers={"origin": origin})

        assert answer.status_code == 403, path
        assert answer.json()["error"]["code"] == "forbidden", path


@pytest.mark.parametrize("header", [b"Host", b"Origin", b"Authorization", b"Content-Type", b"X-Other"])
def test_odd_bytes_in_a_header_cause_no_server_error(locked: httpx.Client, header: bytes) -> None:
    host = b"" if header == b"Host" else b"Host: localhost\r\n"

    answer = raw(locked, b"POST /v1/embeddings HTTP/1.1\r\n" + host + header + b": \xff\xfe\xc3(\r\n\r\n")

    assert answer.startswith(b"HTTP/1.1 4")


async def status_of(app: ASGIApp, server: tuple[str, int], host: str) -> int:
    """The status of the response to a request that was sent to the address `server`."""
    sent: list[Message] = []
    scope: Scope = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "headers": [(b"host", host.encode())],
        "server": server,
    }

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    status: int = sent[0]["status"]
    return status


@pytest.mark.anyio
async def test_the_numeric_address_that_a_request_was_sent_to_is_the_servers_own() -> None:
    async def app(_scope: Scope, _receive: object, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    guard = Guard(app, Settings())

    assert await status_of(guard, ("192.168.1.7", 8000), "192.168.1.7:8000") == 200
    assert await status_of(guard, ("192.168.1.7", 8000), "192.168.1.8:8000") == 421
    assert await status_of(guard, ("evil.example", 8000), "evil.example:8000") == 421


# --- The key ---------------------------------------------------------------------------------------------------------


def authorization(value: str) -> httpx.Headers:
    return httpx.Headers({b"authorization": value.encode()})


@pytest.mark.parametrize(
    "headers",
    [
        httpx.Headers(),
        *map(authorization, ["Bearer another", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", KEY, f"Basic {KEY}", "Bearer"]),
    ],
    ids=["none", "another", "shorter", "longer", "no scheme", "another scheme", "scheme only"],
)
def test_without_the_key_no_route_is_open(locked: httpx.Client, headers: httpx.Headers) -> None:
    for path in ("/v1/models", "/openapi.json", "/mcp", "/nowhere"):
        answer = locked.post(path, headers=headers)

        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer", path
        assert answer.json()["error"]["code"] == "invalid_api_key", path
        assert KEY not in answer.text, path


def test_two_authorization_headers_are_refused_even_with_the_key(locked: httpx.Client) -> None:
    line = b"Authorization: Bearer " + KEY.encode() + b"\r\n"

    assert raw(locked, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + line + line + b"\r\n").startswith(
        b"HTTP/1.1 401 "
    )


def test_the_key_opens_both_rest_and_mcp(locked: httpx.Client) -> None:
    headers = authorization(f"Bearer {KEY}")

    assert locked.get("/v1/models", headers=headers).status_code == 200
    assert locked.get("/v1/models", headers=authorization(f"bearer  {KEY}")).status_code == 200
    headers.update(MCP_HEADERS)
    assert locked.post("/mcp", headers=headers, json=INITIALIZE).status_code == 200


@pytest.mark.parametrize("path", ["/v1/health/live", "/v1/health/ready"])
def test_health_probes_need_no_key(locked: httpx.Client, path: str) -> None:
    assert locked.get(path).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "embeddings.example"])
@pytest.mark.parametrize("key", [None, ""])
def test_a_server_that_others_can_reach_does_not_start_without_a_key(host: str, key: str | None) -> None:
    service = service_of()

    with pytest.raises(InvalidSetting, match="EMBEDDINGS_MCP_API_KEY"):
        create_app(service, MCPServer("test"), Settings(host=host, api_key=key))  # type: ignore[arg-type]
    create_app(service, MCPServer("test"), Settings(host=host, api_key=KEY))  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_a_server_on_loopback_needs_no_key(host: str) -> None:
    create_app(service_of(), MCPServer("test"), Settings(host=host))


# --- The body --------------------------------------------------------------------------------------------------------


def body_of(path: str, size: int) -> bytes:
    """A valid request of this many bytes."""
    request: dict[str, Any] = INITIALIZE if path == "/mcp" else {"model": "default", "input": "one", "truncate": "END"}
    return json.dumps(request).encode().ljust(size)


def chunked(body: bytes) -> Iterator[bytes]:
    """The body in chunks, so that it is sent without a Content-Length."""
    for start in range(0, len(body), 1_000):
        yield body[start : start + 1_000]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/mcp"])
@pytest.mark.parametrize("encode", [bytes, chunked])
def test_a_body_may_have_the_limit_and_no_byte_more(client: httpx.Client, path: str, encode: Any) -> None:
    headers = MCP_HEADERS | {"content-type": "application/json"}

    allowed = client.post(path, content=encode(body_of(path, LIMIT)), headers=headers)
    refused = client.post(path, content=encode(body_of(path, LIMIT + 1)), headers=headers)

    assert allowed.status_code == 200
    assert refused.status_code == 413
    assert refused.json()["error"]["code"] == "payload_too_large"
    assert "10,000 bytes" in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/mcp", "/nowhere"])
def test_a_body_with_too_large_a_content_length_is_refused_unread(client: httpx.Client, path: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {LIMIT + 1}\r\n\r\n"

    assert raw(client, head.encode()).startswith(b"HTTP/1.1 413 ")


def test_mcp_takes_bodies_above_the_sdks_own_limit() -> None:
    with client_of() as client:
        answer = client.post(
            "/mcp", content=body_of("/mcp", 5 * 1024 * 1024), headers=MCP_HEADERS | {"content-type": "application/json"}
        )

    assert answer.status_code == 200

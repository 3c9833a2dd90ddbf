"""Attacks by hostile callers and endpoints, and that they fail; SECURITY.md lists the attacks tested elsewhere."""

from __future__ import annotations

import gzip
import json
import re
import socket
import tracemalloc
from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import pytest
from mcp import Client
from mcp.shared.exceptions import MCPError

from embeddings_mcp.embedders.nim import client
from embeddings_mcp.errors import UpstreamFailed
from embeddings_mcp.faces.mcp.server import build_mcp_server
from tests.nim.standin import answering, stand_in
from tests.nim.test_embedder import embed, embedding_at
from tests.support import ROOT, SECONDS, http_server, service_of

KEY = "the-key"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with http_server(service_of(), api_key=KEY) as url:
        yield url


def exchange(url: str, requests: bytes) -> bytes:
    """Send raw bytes; return all that the server sends until it closes the connection, after the last request."""
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port or 0), timeout=SECONDS) as caller:
        caller.sendall(requests)
        response = b""
        while chunk := caller.recv(65536):
            response += chunk
    return response


def test_the_threat_model_names_tests_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    files = {path: (ROOT / path).read_text("utf-8") for path in re.findall(r"tests/[\w/]+\.py", text)}
    assert len(files) > 8
    for path, sentences in re.findall(r"`(tests/[\w/]+\.py)`: ([^|`]+)", text):
        for sentence in filter(None, map(str.strip, sentences.split(";"))):
            name = "_".join(re.findall(r"\w+", sentence.lower().replace("'", "")))
            assert f"def test_{name}(" in files[path], f"{path} has no test_{name}"


# --- Path traversal --------------------------------------------------------------------------------------------------

TRAVERSALS = [
    "../../../../etc/passwd",
    "..%2f..%2f..%2fetc%2fpasswd",
    "%2e%2e/%2e%2e/pyproject.toml",
    "..%5c..%5cpyproject.toml",
    "....//....//pyproject.toml",
    "/etc/passwd",
    "%2fetc%2fpasswd",
    "SKILL.md%00.txt",
    "references/../../../../pyproject.toml",
    "file:///etc/passwd",
]


@pytest.mark.parametrize("path", TRAVERSALS)
@pytest.mark.parametrize(
    "place", ["/skills/embeddings/contents/", "/skills/", "/v1/models/", "/.well-known/agent-skills/"]
)
def test_no_path_leads_out_of_what_is_published(url: str, place: str, path: str) -> None:
    # Written by hand, since an HTTP client would normalize the path.
    request = (
        f"GET {place}{path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n\r\n"
    )
    response = exchange(url, request.encode())
    assert response.startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 400 ")), response[:200]
    assert b"root:" not in response
    assert b"build-system" not in response


@pytest.mark.anyio
@pytest.mark.parametrize("path", TRAVERSALS)
@pytest.mark.parametrize("place", ["skill://embeddings/", "embeddings://models/", "file://", ""])
async def test_no_resource_is_outside_of_what_is_published(place: str, path: str) -> None:
    with anyio.fail_after(SECONDS):
        async with Client(build_mcp_server(service_of())) as session:
            with pytest.raises(MCPError):
                await session.read_resource(f"{place}{path}")


# --- Header smuggling ------------------------------------------------------------------------------------------------

AUTHORIZED = b"Host: localhost\r\nAuthorization: Bearer " + KEY.encode() + b"\r\n"
HIDDEN = b"GET /v1/models HTTP/1.1\r\n" + AUTHORIZED + b"\r\n"
HEAD = b"POST /v1/embeddings HTTP/1.1\r\nContent-Type: application/json\r\n" + AUTHORIZED


@pytest.mark.parametrize(
    "request_of",
    [
        HEAD + b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" % (len(HIDDEN) + 5) + HIDDEN,
        HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        HEAD + b"Content-Length: 0\r\nContent-Length: 5\r\n\r\n" + HIDDEN,
        HEAD + b"Content-Length: +0\r\n\r\n" + HIDDEN,
        HEAD + b"Content-Length: -1\r\n\r\n" + HIDDEN,
        HEAD + b"Content-Length: 0x0\r\n\r\n" + HIDDEN,
        HEAD + b"X: a\nAuthorization: Bearer " + KEY.encode() + b"\r\nContent-Length: bad\r\n\r\n" + HIDDEN,
    ],
    ids=["both", "two encodings", "unknown", "space", "two lengths", "plus", "minus", "hex", "bare newline"],
)
def test_no_request_is_hidden_in_another(url: str, request_of: bytes) -> None:
    """An ambiguous request is refused, and nothing after it on the connection is read as a request."""
    response = exchange(url, request_of)
    assert response.count(b"HTTP/1.1 ") == 1, response
    assert response.startswith(b"HTTP/1.1 400 "), response[:200]
    assert b"test/hash" not in response


def test_a_second_request_on_a_connection_is_answered_too(url: str) -> None:
    last = HIDDEN.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    response = exchange(url, HEAD + b"Content-Length: 2\r\n\r\n{}" + last)
    assert response.count(b"HTTP/1.1 ") == 2, response
    assert b"test/hash" in response


def test_a_header_cannot_be_injected_into_a_response(url: str) -> None:
    response = exchange(
        url,
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: a\r\n b: c\r\nConnection: close\r\n\r\n",
    )
    assert b"\r\nb: c" not in response
    assert b"\r\n b: c" not in response


# --- Bombs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/embeddings", "/mcp"])
def test_a_compressed_body_is_never_decompressed(url: str, path: str) -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    headers = {
        "authorization": f"Bearer {KEY}",
        "content-type": "application/json",
        "content-encoding": "gzip",
        "accept": "application/json, text/event-stream",
    }
    tracemalloc.start()
    try:
        response = httpx.post(f"{url}{path}", content=bomb, headers=headers)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert response.status_code == (400 if path == "/mcp" else 415), response.text
    assert peak < 20_000_000


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 1_000_000,
        b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
        b'{"model": "default", "input": "a", "dimensions": ' + b"9" * 1_000_000 + b"}",
        b'{"model": "default", "input": "a", "dimensions": 1e' + b"9" * 400 + b"}",
        b'{"model": "default", ' + b", ".join(b'"k%d": 1' % n for n in range(50_000)) + b"}",
    ],
    ids=["arrays", "objects", "digits", "exponent", "fields"],
)
def test_no_json_brings_the_server_down(url: str, body: bytes) -> None:
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    with httpx.Client(base_url=url, headers=headers, timeout=SECONDS) as caller:
        assert caller.post("/v1/embeddings", content=body).status_code == 400
        mcp = caller.post("/mcp", content=body, headers={"accept": "application/json, text/event-stream"})
        assert 400 <= mcp.status_code < 500
        assert len(mcp.content) < 10_000
        assert caller.get("/v1/health/live").status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("encoding", ["gzip", "identity"])
async def test_an_endpoint_cannot_exhaust_the_memory(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    monkeypatch.setattr(client, "MAX_RESPONSE_BYTES", 100_000)
    bomb = json.dumps({"data": "x" * 30_000_000}).encode()
    headers: dict[str, Any] = {"Content_Type": "application/json", "Content_Encoding": encoding}
    body = gzip.compress(bomb) if encoding == "gzip" else bomb
    async with (
        stand_in(faults=iter([answering(200, body, **headers)])) as endpoint,
        embedding_at(endpoint) as embedder,
    ):
        with anyio.fail_after(SECONDS), pytest.raises(UpstreamFailed, match="longer than 100,000 bytes"):
            await embed(embedder)
        assert len(endpoint.seen) == 1, "the request is not retried"
        if encoding == "identity":
            with anyio.fail_after(SECONDS):
                await endpoint.client_disconnected.wait()


@pytest.mark.anyio
@pytest.mark.parametrize("encoding", ["zstd", "br", "gzip, gzip"])
async def test_a_response_is_not_decompressed_without_a_limit(encoding: str) -> None:
    bomb = gzip.compress(gzip.compress(b" " * 50_000_000))
    headers: dict[str, Any] = {"Content_Type": "application/json", "Content_Encoding": encoding}
    async with (
        stand_in(faults=iter([answering(200, bomb, **headers)])) as endpoint,
        embedding_at(endpoint) as embedder,
    ):
        tracemalloc.start()
        try:
            with anyio.fail_after(SECONDS), pytest.raises(UpstreamFailed, match="none of those that were asked for"):
                await embed(embedder)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    [request] = endpoint.seen
    assert request.headers["accept-encoding"] == "gzip, deflate"
    assert peak < 20_000_000

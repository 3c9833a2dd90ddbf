"""What hostile callers and endpoints try, and that it fails; SECURITY.md says what is tried elsewhere."""

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
from tests.support import ROOT, SECONDS, served, service_of

KEY = "the-key"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(service_of(), api_key=KEY) as url:
        yield url


def exchange(url: str, requests: bytes) -> bytes:
    """All that the server sends back to these bytes until it hangs up, which it does when nothing more comes."""
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port or 0), timeout=SECONDS) as caller:
        caller.sendall(requests)
        answer = b""
        while piece := caller.recv(65536):
            answer += piece
    return answer


def test_the_threat_model_names_tests_that_there_are() -> None:
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    named = set(re.findall(r"tests/[\w/]+\.py", text))
    assert len(named) > 8
    assert all((ROOT / path).is_file() for path in named)


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
@pytest.mark.parametrize("place", ["/skills/embeddings/", "/skills/", "/v1/models/", "/.well-known/agent-skills/"])
def test_no_path_leads_out_of_what_is_published(url: str, place: str, path: str) -> None:
    # Written by hand, since a client would put the path in order before it is sent.
    request = (
        f"GET {place}{path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n\r\n"
    )
    answer = exchange(url, request.encode())
    assert answer.startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 400 ")), answer[:200]
    assert b"root:" not in answer
    assert b"build-system" not in answer


@pytest.mark.anyio
@pytest.mark.parametrize("path", TRAVERSALS)
@pytest.mark.parametrize("place", ["skill://embeddings/", "embeddings://models/", "file://", ""])
async def test_no_resource_lies_outside_of_what_is_published(place: str, path: str) -> None:
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
    """What is ambiguous is refused, and nothing that follows it on the connection is read as a request."""
    answer = exchange(url, request_of)
    assert answer.count(b"HTTP/1.1 ") == 1, answer
    assert answer.startswith(b"HTTP/1.1 400 "), answer[:200]
    assert b"test/hash" not in answer


def test_what_follows_a_plain_request_on_its_connection_is_answered_too(url: str) -> None:
    last = HIDDEN.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    answer = exchange(url, HEAD + b"Content-Length: 2\r\n\r\n{}" + last)
    assert answer.count(b"HTTP/1.1 ") == 2, answer
    assert b"test/hash" in answer


def test_a_header_cannot_be_put_into_an_answer(url: str) -> None:
    answer = exchange(
        url,
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: a\r\n b: c\r\nConnection: close\r\n\r\n",
    )
    assert b"\r\nb: c" not in answer
    assert b"\r\n b: c" not in answer


# --- Bombs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/embeddings", "/mcp"])
def test_a_compressed_body_is_never_unpacked(url: str, path: str) -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    headers = {
        "authorization": f"Bearer {KEY}",
        "content-type": "application/json",
        "content-encoding": "gzip",
        "accept": "application/json, text/event-stream",
    }
    tracemalloc.start()
    try:
        answer = httpx.post(f"{url}{path}", content=bomb, headers=headers)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert answer.status_code == (400 if path == "/mcp" else 415), answer.text
    assert most < 20_000_000


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
def test_no_json_takes_the_server_down(url: str, body: bytes) -> None:
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    with httpx.Client(base_url=url, headers=headers, timeout=SECONDS) as caller:
        assert caller.post("/v1/embeddings", content=body).status_code == 400
        mcp = caller.post("/mcp", content=body, headers={"accept": "application/json, text/event-stream"})
        assert 400 <= mcp.status_code < 500
        assert len(mcp.content) < 10_000
        assert caller.get("/v1/health/live").status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("encoding", ["gzip", "identity"])
async def test_an_endpoint_cannot_fill_the_memory(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    monkeypatch.setattr(client, "MAX_ANSWER_BYTES", 100_000)
    bomb = json.dumps({"data": "x" * 30_000_000}).encode()
    headers: dict[str, Any] = {"Content_Type": "application/json", "Content_Encoding": encoding}
    sent = gzip.compress(bomb) if encoding == "gzip" else bomb
    async with (
        stand_in(faults=iter([answering(200, sent, **headers)])) as standing,
        embedding_at(standing) as embedder,
    ):
        with anyio.fail_after(SECONDS), pytest.raises(UpstreamFailed, match="longer than 100,000 bytes"):
            await embed(embedder)
        assert len(standing.seen) == 1, "it is not asked again"
        if encoding == "identity":
            with anyio.fail_after(SECONDS):
                await standing.hung_up.wait()


@pytest.mark.anyio
@pytest.mark.parametrize("encoding", ["zstd", "br", "gzip, gzip"])
async def test_an_answer_is_not_unpacked_in_a_way_that_has_no_bound(encoding: str) -> None:
    bomb = gzip.compress(gzip.compress(b" " * 50_000_000))
    packed: dict[str, Any] = {"Content_Type": "application/json", "Content_Encoding": encoding}
    async with (
        stand_in(faults=iter([answering(200, bomb, **packed)])) as standing,
        embedding_at(standing) as embedder,
    ):
        tracemalloc.start()
        try:
            with anyio.fail_after(SECONDS), pytest.raises(UpstreamFailed, match="none of those that were asked for"):
                await embed(embedder)
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    [seen] = standing.seen
    assert seen.headers["accept-encoding"] == "gzip, deflate"
    assert most < 20_000_000

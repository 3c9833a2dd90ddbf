"""A client that does not keep up is hung up on, and one that is slow is not."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from embeddings_mcp.faces import connection
from embeddings_mcp.faces.http import create_app
from embeddings_mcp.faces.mcp import build_mcp_server
from embeddings_mcp.models import ModelCard
from embeddings_mcp.service import EmbeddingService
from embeddings_mcp.settings import Settings
from tests.support import HashEmbedder, serving

SECONDS = 20
"""Longest that anything here may take."""

SOON = 0.5
"""What the limits are set to."""

SLOWLY = 0.005
"""Seconds that a slow reader takes for 64 KiB; for a piece of its answer more than the limit, and never so long for
what the system makes room for at once."""

TEXTS = [f"text {number}" for number in range(256)]
LENGTH = 8000


@pytest.fixture
def hung_up(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once the server has lost a connection."""
    event = threading.Event()
    lose = connection.Connection.connection_lost

    def lose_and_tell(self: connection.Connection, exc: Exception | None) -> None:
        lose(self, exc)
        event.set()

    monkeypatch.setattr(connection.Connection, "connection_lost", lose_and_tell)
    return event


@contextmanager
def serving_long_vectors(**chosen: Any) -> Iterator[str]:
    settings = Settings(**chosen)
    embedder = HashEmbedder(card=ModelCard(id="test/hash", dimensions=LENGTH))
    service = EmbeddingService([embedder], default_model="test/hash")
    with serving(create_app(service, build_mcp_server(service), settings)) as url:
        yield url


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    address = urlsplit(url)
    assert address.hostname is not None
    assert address.port is not None
    with socket.create_connection((address.hostname, address.port), timeout=SECONDS) as client:
        yield client


def request(texts: list[str]) -> bytes:
    body = json.dumps({"model": "default", "input": texts}).encode()
    head = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def test_who_does_not_read_his_answer_loses_his_place_to_others(
    monkeypatch: pytest.MonkeyPatch, hung_up: threading.Event
) -> None:
    monkeypatch.setattr(connection, "STALL_SECONDS", SOON)
    asked = {"model": "default", "input": "one"}
    with (
        serving_long_vectors(max_requests_in_work=1) as url,
        connected(url) as client,
        httpx.Client(base_url=url) as other,
    ):
        client.sendall(request(TEXTS))
        assert client.recv(12) == b"HTTP/1.1 200"
        assert other.post("/v1/embeddings", json=asked).status_code == 503

        assert hung_up.wait(SECONDS)
        assert other.post("/v1/embeddings", json=asked).status_code == 200


def test_who_reads_slowly_gets_all_of_his_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALL_SECONDS", SOON)
    looked = 0
    check = connection.Connection._check_reader

    def check_and_count(self: connection.Connection, unread: int) -> None:
        nonlocal looked
        looked += 1
        check(self, unread)

    monkeypatch.setattr(connection.Connection, "_check_reader", check_and_count)
    with serving_long_vectors() as url, connected(url) as client:
        client.sendall(request(TEXTS))
        answer = bytearray()
        while not answer.endswith(b"\r\n0\r\n\r\n"):
            piece = client.recv(1 << 16)
            assert piece, "the server hung up"
            answer += piece
            time.sleep(SLOWLY)

    assert looked > 1
    assert answer.count(b'"embedding":') == len(TEXTS)


HALF = b"POST /v1/embeddings HTTP/1.1\r\nHost: loc"


@pytest.mark.parametrize("said", [b"", HALF], ids=["nothing", "half a head"])
def test_who_does_not_say_what_he_wants_is_hung_up_on(
    monkeypatch: pytest.MonkeyPatch, hung_up: threading.Event, said: bytes
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", SOON)
    with serving_long_vectors() as url, connected(url) as client:
        client.sendall(said)
        assert hung_up.wait(SECONDS)


def test_who_says_half_of_what_he_wants_after_an_answer_is_hung_up_on(
    monkeypatch: pytest.MonkeyPatch, hung_up: threading.Event
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", SOON)
    with serving_long_vectors() as url, connected(url) as client:
        client.sendall(request(["one"]))
        assert client.recv(12) == b"HTTP/1.1 200"
        client.sendall(HALF)
        assert hung_up.wait(SECONDS)


def test_who_has_said_what_he_wants_is_waited_for_no_longer(
    monkeypatch: pytest.MonkeyPatch, hung_up: threading.Event
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", SOON)
    with serving_long_vectors() as url, connected(url) as client:
        client.sendall(request(["one"]))
        assert client.recv(12) == b"HTTP/1.1 200"
        assert not hung_up.wait(2 * SOON)

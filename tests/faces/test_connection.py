"""The connection of a client that stalls is closed; that of a slow client is not."""

from __future__ import annotations

import json
import logging
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from embeddings_mcp.faces.http import connection
from embeddings_mcp.models import ModelCard
from tests.support import HashEmbedder, http_server, service_of

SECONDS = 20
"""Timeout of every wait here."""

SHORT_SECONDS = 1.0
"""What the server's timeouts are set to."""

LENGTH = 2_000_000
"""Numbers in a vector: as JSON 24 MB, more than the socket buffers between server and client hold."""

PARTIAL_READ = 2_000_000
"""Bytes that a slow client reads before its progress is checked."""


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once the server has lost a connection."""
    event = threading.Event()
    original = connection.Connection.connection_lost

    def connection_lost(self: connection.Connection, exc: Exception | None) -> None:
        original(self, exc)
        event.set()

    monkeypatch.setattr(connection.Connection, "connection_lost", connection_lost)
    return event


@contextmanager
def serving_long_vectors(**chosen: Any) -> Iterator[str]:
    embedder = HashEmbedder(card=ModelCard(id="test/hash", dimensions=LENGTH))
    with http_server(service_of(embedder), **chosen) as url:
        yield url


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    address = urlsplit(url)
    assert address.hostname is not None
    assert address.port is not None
    with socket.create_connection((address.hostname, address.port), timeout=SECONDS) as client:
        yield client


def request(*texts: str) -> bytes:
    body = json.dumps({"model": "default", "input": texts}).encode()
    head = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def read(client: socket.socket, count: int) -> bytes:
    chunks = []
    while count:
        chunk = client.recv(min(count, 1 << 16))
        assert chunk, "the server closed the connection"
        chunks.append(chunk)
        count -= len(chunk)
    return b"".join(chunks)


def read_answer(client: socket.socket, already_read: bytes = b"") -> bytes:
    """The body of a response, of which the client has already read these bytes."""
    while b"\r\n\r\n" not in already_read:
        already_read += read(client, 1)
    head, _, body = already_read.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    assert length is not None
    return body + read(client, int(length[1]) - len(body))


def test_a_client_that_does_not_read_its_answer_loses_its_slot_to_others(
    monkeypatch: pytest.MonkeyPatch, closed: threading.Event
) -> None:
    monkeypatch.setattr(connection, "STALL_SECONDS", 2.0)
    with (
        serving_long_vectors(max_requests_in_flight=1) as url,
        connected(url) as client,
        httpx.Client(base_url=url, timeout=SECONDS) as other,
    ):

        def status() -> int:
            # Invalid dimensions are refused at once (400), but only for a request that was admitted.
            invalid = {"model": "default", "input": "one", "dimensions": 1}
            return other.post("/v1/embeddings", json=invalid).status_code

        client.sendall(request("one", "two", "three"))
        assert client.recv(12) == b"HTTP/1.1 200"
        assert status() == 503

        assert closed.wait(SECONDS)
        deadline = time.monotonic() + SECONDS
        while status() == 503:  # the slot is freed only once the request has noticed the disconnect
            assert time.monotonic() < deadline
        assert status() == 400


@pytest.mark.parametrize("system", ["darwin", "freebsd14", "win32"])
def test_a_client_that_does_not_read_is_disconnected_on_other_systems_too(
    monkeypatch: pytest.MonkeyPatch, closed: threading.Event, system: str
) -> None:
    """Without the ioctl that only Linux has."""
    monkeypatch.setattr(connection, "sys", SimpleNamespace(platform=system))
    monkeypatch.setattr(connection, "_SO_NWRITE", socket.SO_ERROR)  # an option that every system has; it reads 0
    monkeypatch.delattr(connection, "termios", raising=False)
    monkeypatch.setattr(connection, "STALL_SECONDS", SHORT_SECONDS)
    with serving_long_vectors() as url, connected(url) as client:
        client.sendall(request("one"))
        assert closed.wait(SECONDS)


@pytest.mark.parametrize("then", ["reads it", "hangs up"])
def test_the_read_timer_is_cancelled_once_the_answer_is_read_or_the_connection_is_lost(
    monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """Otherwise it would later close a healthy connection, or inspect the socket of a closed one."""
    events: queue.SimpleQueue[connection.Connection] = queue.SimpleQueue()

    def recording(method: Callable[..., None]) -> Callable[..., None]:
        def call(self: connection.Connection, *arguments: object) -> None:
            method(self, *arguments)
            events.put(self)

        return call

    for name in ("pause_writing", "resume_writing", "connection_lost"):
        monkeypatch.setattr(connection.Connection, name, recording(getattr(connection.Connection, name)))
    with serving_long_vectors() as url, connected(url) as client:
        client.sendall(request("one"))
        timer = events.get(timeout=SECONDS)._read_timer
        assert timer is not None
        if then == "reads it":
            read_answer(client)
        else:
            client.close()
        while not timer.cancelled():
            events.get(timeout=SECONDS)


def test_a_client_that_reads_slowly_gets_its_whole_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALL_SECONDS", 2.0)
    paused, checked = threading.Event(), threading.Event()
    original_pause = connection.Connection.pause_writing
    original_check = connection.Connection._check_progress

    def pause_writing(self: connection.Connection) -> None:
        original_pause(self)
        paused.set()

    def check_progress(self: connection.Connection, unread_before: int) -> None:
        original_check(self, unread_before)
        checked.set()

    monkeypatch.setattr(connection.Connection, "pause_writing", pause_writing)
    monkeypatch.setattr(connection.Connection, "_check_progress", check_progress)
    with serving_long_vectors() as url, connected(url) as client:
        client.sendall(request("one"))
        assert paused.wait(SECONDS)
        beginning = read(client, PARTIAL_READ)
        assert checked.wait(SECONDS)
        body = read_answer(client, beginning)

    assert len(json.loads(body)["data"][0]["embedding"]) == LENGTH


HALF_A_HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: loc"


@pytest.mark.parametrize("sent", [b"", HALF_A_HEAD], ids=["nothing", "half a head"])
def test_a_client_that_does_not_send_a_whole_head_is_disconnected(
    monkeypatch: pytest.MonkeyPatch, closed: threading.Event, sent: bytes
) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_SECONDS", SHORT_SECONDS)
    with serving_long_vectors() as url, connected(url) as client:
        client.sendall(sent)
        assert closed.wait(SECONDS)


@contextmanager
def answered(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The connection of a client that has had an answer, to a server with a short timeout for heads."""
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_SECONDS", SHORT_SECONDS)
    with serving_long_vectors() as url, connected(url) as client:
        client.sendall(request("one"))
        assert client.recv(12) == b"HTTP/1.1 200"
        yield client


def test_a_client_that_sends_half_a_head_after_an_answer_is_disconnected(
    monkeypatch: pytest.MonkeyPatch, closed: threading.Event
) -> None:
    with answered(monkeypatch) as client:
        client.sendall(HALF_A_HEAD)
        assert closed.wait(SECONDS)


def test_the_timeout_for_the_head_ends_with_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    with answered(monkeypatch) as client, socket.create_connection(client.getpeername(), timeout=SECONDS) as later:
        assert later.recv(1) == b"", "the timeout of a later connection, which sends nothing, has passed"
        assert read_answer(client, b"HTTP/1.1 200")


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_an_offer_of_another_protocol_is_ignored_without_a_warning(
    caplog: pytest.LogCaptureFixture, protocol: bytes
) -> None:
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\n" % protocol
    with serving_long_vectors() as url, connected(url) as client:
        client.sendall(b"GET /v1/health/live HTTP/1.1\r\nHost: localhost\r\n" + offer + b"\r\n")
        assert client.recv(12) == b"HTTP/1.1 200"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

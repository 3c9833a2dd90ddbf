"""A client that does not keep up is hung up on, and one that is slow is not."""

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
from tests.support import HashEmbedder, served, service_of

SECONDS = 20
"""Longest that anything here may take."""

SOON = 1.0
"""What the limits are set to."""

LENGTH = 2_000_000
"""Numbers in a vector: as JSON, 24 MB, which is more than the system holds between the server and its client."""

SOME = 2_000_000
"""Bytes that a slow reader takes of them before it is looked whether it reads."""


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
    embedder = HashEmbedder(card=ModelCard(id="test/hash", dimensions=LENGTH))
    with served(service_of(embedder), **chosen) as url:
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
    pieces = []
    while count:
        piece = client.recv(min(count, 1 << 16))
        assert piece, "the server hung up"
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def read_answer(client: socket.socket, some: bytes = b"") -> bytes:
    """The body of an answer, of which the client has read the head and maybe more, or nothing."""
    while b"\r\n\r\n" not in some:
        some += read(client, 1)
    head, _, body = some.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    assert length is not None
    return body + read(client, int(length[1]) - len(body))


def test_who_does_not_read_his_answer_loses_his_place_to_others(
    monkeypatch: pytest.MonkeyPatch, hung_up: threading.Event
) -> None:
    monkeypatch.setattr(connection, "STALL_SECONDS", 2.0)
    with (
        serving_long_vectors(max_requests_in_flight=1) as url,
        connected(url) as client,
        httpx.Client(base_url=url, timeout=SECONDS) as other,
    ):

        def status() -> int:
            # Dimensions that cannot be are refused at once, but only who has a place gets so far.
            asked = {"model": "default", "input": "one", "dimensions": 1}
            return other.post("/v1/embeddings", json=asked).status_code

        client.sendall(request("one", "two", "three"))
        assert client.recv(12) == b"HTTP/1.1 200"
        assert status() == 503

        assert hung_up.wait(SECONDS)
        deadline = time.monotonic() + SECONDS
        while status() == 503:  # the place is free once the request has heard of it
            assert time.monotonic() < deadline
        assert status() == 400


@pytest.mark.parametrize("system", ["darwin", "freebsd14", "win32"])
def test_who_does_not_read_is_hung_up_on_by_other_systems_too(
    monkeypatch: pytest.MonkeyPatch, hung_up: threading.Event, system: str
) -> None:
    """Of which none is asked what only Linux tells."""
    monkeypatch.setattr(connection, "sys", SimpleNamespace(platform=system))
    monkeypatch.setattr(connection, "_SO_NWRITE", socket.SO_ERROR)  # where the option is unknown; 0 while all is well
    monkeypatch.delattr(connection, "termios", raising=False)
    monkeypatch.setattr(connection, "STALL_SECONDS", SOON)
    with serving_long_vectors() as url, connected(url) as client:
        client.sendall(request("one"))
        assert hung_up.wait(SECONDS)


@pytest.mark.parametrize("then", ["reads it", "hangs up"])
def test_an_answer_is_looked_after_until_it_is_read_or_nobody_reads_it(
    monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """Else who stays would be hung up on later, or a connection that is gone be asked what is left in it."""
    came: queue.SimpleQueue[connection.Connection] = queue.SimpleQueue()

    def telling(of: Callable[..., None]) -> Callable[..., None]:
        def tell(self: connection.Connection, *arguments: object) -> None:
            of(self, *arguments)
            came.put(self)

        return tell

    for event in ("pause_writing", "resume_writing", "connection_lost"):
        monkeypatch.setattr(connection.Connection, event, telling(getattr(connection.Connection, event)))
    with serving_long_vectors() as url, connected(url) as client:
        client.sendall(request("one"))
        reading = came.get(timeout=SECONDS)._read_timer
        assert reading is not None
        if then == "reads it":
            read_answer(client)
        else:
            client.close()
        while not reading.cancelled():
            came.get(timeout=SECONDS)


def test_who_reads_slowly_gets_all_of_his_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALL_SECONDS", 2.0)
    waits, looked = threading.Event(), threading.Event()
    wait, check = connection.Connection.pause_writing, connection.Connection._check_progress

    def wait_and_tell(self: connection.Connection) -> None:
        wait(self)
        waits.set()

    def check_and_tell(self: connection.Connection, before: int) -> None:
        check(self, before)
        looked.set()

    monkeypatch.setattr(connection.Connection, "pause_writing", wait_and_tell)
    monkeypatch.setattr(connection.Connection, "_check_progress", check_and_tell)
    with serving_long_vectors() as url, connected(url) as client:
        client.sendall(request("one"))
        assert waits.wait(SECONDS)
        some = read(client, SOME)
        assert looked.wait(SECONDS)
        body = read_answer(client, some)

    assert len(json.loads(body)["data"][0]["embedding"]) == LENGTH


HALF = b"POST /v1/embeddings HTTP/1.1\r\nHost: loc"


@pytest.mark.parametrize("said", [b"", HALF], ids=["nothing", "half a head"])
def test_who_does_not_say_what_he_wants_is_hung_up_on(
    monkeypatch: pytest.MonkeyPatch, hung_up: threading.Event, said: bytes
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", SOON)
    with serving_long_vectors() as url, connected(url) as client:
        client.sendall(said)
        assert hung_up.wait(SECONDS)


@contextmanager
def answered(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The connection of a client who was answered, to a server that soon tires of half a head."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", SOON)
    with serving_long_vectors() as url, connected(url) as client:
        client.sendall(request("one"))
        assert client.recv(12) == b"HTTP/1.1 200"
        yield client


def test_who_says_half_of_what_he_wants_after_an_answer_is_hung_up_on(
    monkeypatch: pytest.MonkeyPatch, hung_up: threading.Event
) -> None:
    with answered(monkeypatch) as client:
        client.sendall(HALF)
        assert hung_up.wait(SECONDS)


def test_who_has_said_what_he_wants_is_waited_for_no_longer(
    monkeypatch: pytest.MonkeyPatch, hung_up: threading.Event
) -> None:
    with answered(monkeypatch):
        assert not hung_up.wait(2 * SOON)


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_who_offers_another_protocol_too_is_answered_in_this_one_without_a_word_in_the_log(
    caplog: pytest.LogCaptureFixture, protocol: bytes
) -> None:
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\n" % protocol
    with serving_long_vectors() as url, connected(url) as client:
        client.sendall(b"GET /v1/health/live HTTP/1.1\r\nHost: localhost\r\n" + offer + b"\r\n")
        assert client.recv(12) == b"HTTP/1.1 200"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

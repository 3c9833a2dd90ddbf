"""Limits: each has its own error and status, over REST and MCP, and a refused request leaves nothing behind."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest
from mcp import Client
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from embeddings_mcp import reservations
from embeddings_mcp.caller import caller_name
from embeddings_mcp.embedders.base import Embeddings
from embeddings_mcp.faces.http import in_flight
from embeddings_mcp.faces.http.guard import Guard
from embeddings_mcp.faces.http.rate_limit import RateLimiter
from embeddings_mcp.faces.mcp.server import build_mcp_server
from embeddings_mcp.request_limits import Limits
from embeddings_mcp.settings import Settings
from tests.support import SECONDS, Clock, HashEmbedder, client_of, service_of


@dataclass
class HeldEmbedder(HashEmbedder):
    """Answers when the test allows it, and counts calls and cancelled calls in thread-safe semaphores."""

    calls: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    cancellations: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    may_answer: threading.Event = field(default_factory=threading.Event)

    async def embed(self, texts: Sequence[str], **options: Any) -> Embeddings:
        self.calls.release()
        try:
            while not self.may_answer.is_set():
                await anyio.to_thread.run_sync(self.may_answer.wait, 0.02)
        except anyio.get_cancelled_exc_class():
            self.cancellations.release()
            raise
        return await super().embed(texts, **options)


def ask(client: httpx.Client, texts: str | list[str] = "one", **headers: str) -> httpx.Response:
    return client.post("/v1/embeddings", json={"model": "default", "input": texts}, headers=headers)


def refusal(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


# --- One request -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Iterator[httpx.Client]:
    with client_of(max_inputs=3, max_input_characters=10) as client:
        yield client


def test_a_request_may_have_the_maximum_number_of_texts_and_no_more(small: httpx.Client) -> None:
    assert ask(small, ["one"] * 3).status_code == 200
    assert refusal(ask(small, ["one"] * 4)) == (400, "too_many_inputs", "input")
    both = small.post("/v1/similarity", json={"model": "default", "input": ["one"] * 2, "other": ["one"] * 2})
    assert refusal(both) == (400, "too_many_inputs", "input")


def test_a_text_may_have_the_maximum_number_of_characters_and_no_more(small: httpx.Client) -> None:
    assert ask(small, "x" * 10).status_code == 200
    assert refusal(ask(small, "x" * 11)) == (400, "input_too_large", "input")
    assert refusal(ask(small, ["x", "x" * 11])) == (400, "input_too_large", "input[1]")
    search = small.post("/v1/search", json={"model": "default", "query": "x" * 11, "input": ["x"]})
    assert refusal(search) == (400, "input_too_large", "query")


@pytest.mark.anyio
async def test_the_limits_of_a_request_apply_to_tools_too() -> None:
    limits = Limits.from_settings(Settings(max_inputs=1, max_input_characters=10, request_seconds=SECONDS))
    with anyio.fail_after(SECONDS):
        async with Client(build_mcp_server(service_of(), limits)) as client:
            many = await client.call_tool("create_embedding", {"model": "default", "input": ["a", "b"]})
            large = await client.call_tool("search", {"model": "default", "query": "x" * 11, "input": ["a"]})
    assert many.is_error
    assert large.is_error
    assert "2 texts, and one may have 1" in str(many.content)
    assert "`query` has 11 characters" in str(large.content)


def test_a_request_that_takes_too_long_is_cancelled() -> None:
    embedder = HeldEmbedder()
    with client_of(embedder, request_seconds=0.1) as client:
        assert refusal(ask(client)) == (503, "request_timeout", None)
        assert embedder.cancellations.acquire(timeout=SECONDS), "its work was cancelled"


@pytest.mark.anyio
async def test_a_tool_call_that_takes_too_long_is_cancelled() -> None:
    embedder = HeldEmbedder()
    limits = Limits.from_settings(Settings(request_seconds=0.1))
    with anyio.fail_after(SECONDS):
        async with Client(build_mcp_server(service_of(embedder), limits)) as client:
            result = await client.call_tool("create_embedding", {"model": "default", "input": "a"})
    assert result.is_error
    assert "longer than the 0.1 s" in str(result.content)
    assert embedder.cancellations.acquire(timeout=SECONDS)


# --- Many requests ---------------------------------------------------------------------------------------------------


def test_only_the_maximum_number_of_requests_is_in_flight_and_one_that_ends_makes_room() -> None:
    embedder = HeldEmbedder()
    with client_of(embedder, max_requests_in_flight=2) as client, ThreadPoolExecutor(2) as others:
        first = [others.submit(ask, client) for _ in range(2)]
        for _ in first:
            assert embedder.calls.acquire(timeout=SECONDS)

        refused = ask(client)
        mcp = client.post("/mcp", json={})
        health = client.get("/v1/health/live")
        embedder.may_answer.set()

        assert [answer.result().status_code for answer in first] == [200, 200]
        assert refusal(refused) == (503, "too_busy", None)
        assert refused.headers["retry-after"] == "1"
        assert mcp.status_code == 503
        assert health.status_code == 200
        assert ask(client).status_code == 200


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time in admission control, which the test advances."""
    clock = Clock()
    monkeypatch.setattr(in_flight, "time", clock)
    monkeypatch.setattr(reservations, "time", clock)
    return clock


def complete_one(client: httpx.Client, embedder: HeldEmbedder) -> None:
    embedder.may_answer.set()
    assert ask(client).status_code == 200
    assert client.get("/v1/health/live").status_code == 200  # by now the request before has ended in the server too
    assert embedder.calls.acquire(timeout=SECONDS)
    embedder.may_answer.clear()


def test_retry_after_of_refused_requests_follows_the_rate_at_which_requests_end(clock: Clock) -> None:
    embedder = HeldEmbedder()
    with client_of(embedder, max_requests_in_flight=1) as client, ThreadPoolExecutor(1) as others:
        for _ in range(3):
            complete_one(client, embedder)
            clock.now += 2
        first = others.submit(ask, client)
        assert embedder.calls.acquire(timeout=SECONDS)
        waits = [ask(client).headers["retry-after"] for _ in range(3)]
        embedder.may_answer.set()
        assert first.result().status_code == 200
    assert waits == ["2", "4", "6"], "one request has ended every 2 s"


def test_a_refused_request_that_is_retried_on_time_is_admitted_before_new_ones(clock: Clock) -> None:
    embedder = HeldEmbedder()
    refused_before, new = "x" * 900_000, "y" * 900_000  # long enough to arrive in several messages
    with client_of(embedder, max_requests_in_flight=2) as client, ThreadPoolExecutor(3) as others:
        for _ in range(3):
            complete_one(client, embedder)
            clock.now += 1
        in_flight = [others.submit(ask, client) for _ in range(2)]
        for _ in in_flight:
            assert embedder.calls.acquire(timeout=SECONDS)
        refused = ask(client, refused_before)
        assert refused.status_code == 503
        clock.now += int(refused.headers["retry-after"])
        embedder.may_answer.set()
        for request in in_flight:
            assert request.result().status_code == 200
        embedder.may_answer.clear()
        in_flight = [others.submit(ask, client)]
        assert embedder.calls.acquire(timeout=SECONDS)

        assert ask(client, new).status_code == 503
        in_flight.append(others.submit(ask, client, refused_before))
        assert embedder.calls.acquire(timeout=SECONDS)
        embedder.may_answer.set()
        assert [request.result().status_code for request in in_flight] == [200, 200]
        embedder.may_answer.clear()
        in_flight = [others.submit(ask, client) for _ in range(2)]
        for _ in in_flight:
            assert embedder.calls.acquire(timeout=SECONDS), "the reservation was used, so both slots are free"
        embedder.may_answer.set()


def test_bodies_in_flight_have_a_maximum_size_together_and_one_that_ends_makes_room() -> None:
    embedder = HeldEmbedder()
    text = "x" * 1_000
    with client_of(embedder, max_bytes_in_flight=2_000) as client, ThreadPoolExecutor(1) as others:
        first = others.submit(ask, client, text)
        assert embedder.calls.acquire(timeout=SECONDS)

        refused = ask(client, text)
        embedder.may_answer.set()

        assert first.result().status_code == 200
        assert refusal(refused) == (503, "too_busy", None)
        assert ask(client, text).status_code == 200


def test_clients_that_disconnect_or_are_refused_leave_no_slot_taken() -> None:
    embedder = HeldEmbedder()
    with client_of(embedder, max_requests_in_flight=1, max_body_bytes=100) as client:
        address = client.base_url.host, client.base_url.port or 0
        body = b'{"model": "default", "input": "one"}'
        head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        for _ in range(3):
            with socket.create_connection(address, timeout=SECONDS) as caller:
                caller.sendall(head % b"/v1/embeddings" + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                assert embedder.calls.acquire(timeout=SECONDS)
            assert embedder.cancellations.acquire(timeout=SECONDS)
            assert client.post("/v1/embeddings", content=iter([b"x" * 101])).status_code in {413, 415}
            assert client.post("/v1/embeddings", json=[]).status_code == 400
        embedder.may_answer.set()
        assert ask(client).status_code == 200


def test_a_body_that_does_not_arrive_in_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_flight, "BODY_TIMEOUT_SECONDS", 0.1)
    with client_of() as client:
        address = client.base_url.host, client.base_url.port or 0
        for path in (b"/v1/embeddings", b"/mcp"):
            with socket.create_connection(address, timeout=SECONDS) as caller:
                caller.sendall(
                    b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    b"Accept: application/json, text/event-stream\r\nContent-Length: 9\r\n\r\n[" % path
                )
                assert caller.recv(100).startswith(b"HTTP/1.1 408 "), path


def test_each_key_has_a_rate_limit_of_its_own() -> None:
    with client_of(api_keys="one=first two=second", requests_per_minute=3) as client:
        answers = [ask(client, authorization="Bearer first") for _ in range(4)]
        other = ask(client, authorization="Bearer second")
        unknown = [ask(client, authorization="Bearer third") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert refusal(answers[-1]) == (429, "rate_limited", None)
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 20
    assert other.status_code == 200
    assert {answer.status_code for answer in unknown} == {401}


def test_the_embedder_knows_the_name_of_the_caller() -> None:
    callers: list[str] = []

    class CallerRecorder(HashEmbedder):
        async def embed(self, texts: Sequence[str], **options: Any) -> Embeddings:
            callers.append(caller_name())
            return await super().embed(texts, **options)

    with client_of(CallerRecorder(), api_keys="one=first two=second") as client:
        for key in ("first", "second"):
            assert ask(client, authorization=f"Bearer {key}").status_code == 200
    assert callers == ["one", "two"]


def test_health_probes_have_no_rate_limit() -> None:
    with client_of(api_key="first", requests_per_minute=2) as client:
        assert {client.get("/v1/health/live").status_code for _ in range(5)} == {200}
        assert [ask(client, authorization="Bearer first").status_code for _ in range(3)] == [200, 200, 429]
        assert client.get("/v1/health/live").status_code == 200


@pytest.mark.anyio
async def test_without_keys_the_rate_limit_is_per_address() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Response("passed")(scope, receive, send)

    guard = Guard(app, Settings(requests_per_minute=1))

    async def statuses_for(address: str) -> list[int]:
        transport = httpx.ASGITransport(guard, client=(address, 40_000))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [(await client.get("/v1/models")).status_code for _ in range(2)]

    assert await statuses_for("10.0.0.1") == [200, 429]
    assert await statuses_for("10.0.0.2") == [200, 429]


def test_a_caller_that_waits_for_as_long_as_it_is_told_is_admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("embeddings_mcp.faces.http.rate_limit.time", clock)
    limiter = RateLimiter(per_minute=4)
    assert [limiter.retry_after("a") for _ in range(4)] == [0, 0, 0, 0]
    for _ in range(10):
        wait = limiter.retry_after("a")
        assert wait == pytest.approx(15)
        clock.now += wait
        assert limiter.retry_after("a") == 0
    assert limiter.retry_after("b") == 0


def test_the_rate_limiter_prunes_callers_that_have_all_their_allowance_back(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("embeddings_mcp.faces.http.rate_limit.time", clock)
    limiter = RateLimiter(per_minute=1)
    for caller in range(100_000):
        assert limiter.retry_after(str(caller)) == 0
        clock.now += 0.1  # each caller has its allowance back after a minute
    assert len(limiter._arrival_times) < 3000
    assert limiter.retry_after(str(caller)) > 0

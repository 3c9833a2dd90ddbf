"""The REST interface over a real socket, with an embedder that needs no model."""

from __future__ import annotations

import base64
import gzip
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings_mcp.embedders.base import Embeddings
from embeddings_mcp.errors import CheckpointInvalid, Overloaded
from embeddings_mcp.faces.http import rest
from embeddings_mcp.models import ModelCard
from embeddings_mcp.operations import ROUTES
from embeddings_mcp.serialization import dump_json
from tests.support import FailingEmbedder, HashEmbedder, client_of

MODEL = "test/hash"


@dataclass
class StuckEmbedder(HashEmbedder):
    """Never answers, and sets thread-safe events when it is called and when that call is cancelled."""

    called: threading.Event = field(default_factory=threading.Event)
    call_cancelled: threading.Event = field(default_factory=threading.Event)

    async def embed(self, texts: Sequence[str], **options: Any) -> Embeddings:
        await self.check()
        raise AssertionError("unreachable")

    async def check(self) -> None:
        self.called.set()
        try:
            await anyio.sleep_forever()
        finally:
            self.call_cancelled.set()


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with client_of() as client:
        yield client


# --- Answers ---------------------------------------------------------------------------------------------------------


def test_each_text_gets_its_own_vector_at_its_own_index(client: httpx.Client) -> None:
    texts = ["one", "two", "one", "three"]

    answer = client.post("/v1/embeddings", json={"model": MODEL, "input": texts})

    assert answer.status_code == 200
    body = answer.json()
    assert (body["object"], body["model"]) == ("list", MODEL)
    assert body["usage"] == {"prompt_tokens": 12, "total_tokens": 12}
    assert [(row["object"], row["index"]) for row in body["data"]] == [("embedding", i) for i in range(4)]
    embedder = HashEmbedder()
    assert np.array_equal(
        np.array([row["embedding"] for row in body["data"]], dtype=np.float32),
        np.stack([embedder.vector(text) for text in texts]),
    )


@pytest.mark.parametrize("modality", ["text", ["text"], ["text", "text"]])
def test_a_request_may_say_that_its_inputs_are_text(client: httpx.Client, modality: object) -> None:
    request = {"model": MODEL, "input": ["one", "two"]}

    explicit = client.post("/v1/embeddings", json=request | {"modality": modality})

    assert explicit.json() == client.post("/v1/embeddings", json=request).json()


def test_base64_holds_the_same_floats(client: httpx.Client) -> None:
    request = {"model": "default", "input": "one"}

    floats, encoded = (
        client.post("/v1/embeddings", json=request | {"encoding_format": form}).json()["data"][0]["embedding"]
        for form in ("float", "base64")
    )

    assert np.array_equal(np.frombuffer(base64.b64decode(encoded), dtype="<f4"), np.array(floats, dtype=np.float32))


def test_a_large_answer_is_complete_and_in_order(client: httpx.Client) -> None:
    texts = [f"text {number}" for number in range(1_000)]

    body = client.post("/v1/embeddings", json={"model": MODEL, "input": texts}).json()

    embedder = HashEmbedder()
    assert [row["index"] for row in body["data"]] == list(range(1_000))
    assert np.array_equal(
        np.array([row["embedding"] for row in body["data"]], dtype=np.float32),
        np.stack([embedder.vector(text) for text in texts]),
    )
    assert body["usage"]["total_tokens"] == 4_000


def test_a_request_large_enough_for_a_worker_thread_is_answered(client: httpx.Client) -> None:
    texts = ["long " * 150_000] * 2
    body = client.post("/v1/embeddings", json={"model": MODEL, "input": texts, "truncate": "END"}).json()

    assert len(body["data"]) == 2


@pytest.mark.anyio
@given(
    answer=st.dictionaries(
        st.text(),
        st.lists(st.integers(-9, 9), max_size=600) | st.text() | st.dictionaries(st.text(), st.integers(-9, 9)),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=50)
async def test_the_chunks_of_an_answer_are_its_json(answer: dict[str, Any]) -> None:
    chunks = [chunk async for chunk in rest._json_chunks(answer)]

    assert b"".join(chunks) == dump_json(answer)


ROWS: dict[str, list[Any]] = {
    "many": [0] * 10 * rest._MAX_ROWS_PER_CHUNK,
    "wide": [{"index": 0, "embedding": np.zeros(rest._MAX_NUMBERS_PER_CHUNK, dtype=np.float32)}] * 10,
}


@pytest.mark.anyio
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
async def test_other_tasks_run_between_the_chunks_of_a_large_answer(rows: list[Any]) -> None:
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(count_turns)
        async for _ in rest._json_chunks({"data": rows}):
            pass
        group.cancel_scope.cancel()
    assert turns >= 10


def test_similarity_and_search_answer_with_scores(client: httpx.Client) -> None:
    similarity = client.post("/v1/similarity", json={"model": MODEL, "input": ["one", "two"]}).json()
    search = client.post("/v1/search", json={"query": "one", "input": ["two", "one"], "top_k": 1}).json()

    assert similarity["scores"][0][0] == similarity["scores"][1][1] == 1.0
    assert search["results"] == [{"index": 1, "score": 1.0}]


def test_models_are_listed_as_openai_does() -> None:
    cards = ModelCard(id="nvidia/one", dimensions=8, matryoshka=(4,)), ModelCard(id="two", aliases=("zwei",))
    with client_of(*map(HashEmbedder, cards)) as client:
        listed = client.get("/v1/models").json()
        one = client.get("/v1/models/nvidia/one").json()
        two = client.get("/v1/models/zwei").json()

    assert listed["object"] == "list"
    assert listed["data"] == [one, two]
    assert (one["id"], one["object"], one["owned_by"]) == ("nvidia/one", "model", "nvidia")
    assert (one["dimensions"], one["allowed_dimensions"], one["default"]) == (8, [4], True)
    assert (two["id"], two["owned_by"], two["default"]) == ("two", "embeddings-mcp", False)
    assert type(one["created"]) is int


# --- Health ----------------------------------------------------------------------------------------------------------


def test_a_server_that_can_answer_is_live_and_ready(client: httpx.Client) -> None:
    live, ready = client.get("/v1/health/live"), client.get("/v1/health/ready")

    assert (live.status_code, ready.status_code) == (200, 200)
    assert live.json() == {"object": "health.response", "message": "live", "live": True}
    assert ready.json() == {"object": "health.response", "message": "ready", "ready": True}


def test_a_server_whose_model_is_broken_is_live_but_not_ready(caplog: pytest.LogCaptureFixture) -> None:
    broken = FailingEmbedder(error=CheckpointInvalid("/models/x/config.json is not JSON"))
    with client_of(broken) as client:
        live, ready = client.get("/v1/health/live"), client.get("/v1/health/ready")

    assert (live.status_code, ready.status_code) == (200, 503)
    assert ready.json() == {"object": "health.response", "message": "not ready: checkpoint_invalid", "ready": False}
    assert "/models/x/config.json is not JSON" in caplog.text


def test_a_readiness_probe_is_answered_while_the_model_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "READINESS_TIMEOUT_SECONDS", 0.05)
    stuck = StuckEmbedder()
    with client_of(stuck) as client:
        ready = client.get("/v1/health/ready")

    assert ready.status_code == 503
    assert ready.json()["ready"] is False
    assert stuck.call_cancelled.is_set()


# --- Errors ----------------------------------------------------------------------------------------------------------

ONE = {"model": MODEL, "input": "one"}


@pytest.mark.parametrize(
    ("body", "status", "code", "param", "words"),
    [
        pytest.param(ONE | {"input": ""}, 400, "invalid_request", "input", ["empty string"], id="empty string"),
        pytest.param(ONE | {"input": []}, 400, "invalid_request", "input", ["empty array"], id="empty list"),
        pytest.param(
            ONE | {"input": ["one", ""]},
            400,
            "invalid_request",
            "input[1]",
            ["empty string"],
            id="empty string in list",
        ),
        pytest.param(
            ONE | {"input": [[1820, 374]]},
            400,
            "invalid_request",
            "input",
            ["token ids", "check_embedding_ctx_length=False"],
            id="token ids",
        ),
        pytest.param(
            ONE | {"dimension": 4},
            400,
            "invalid_request",
            "dimension",
            ["did you mean `dimensions`?"],
            id="unknown field",
        ),
        pytest.param(
            ONE | {"model": "gpt-4"},
            404,
            "model_not_found",
            "model",
            ["'gpt-4'", MODEL, "`default`"],
            id="unknown model",
        ),
        pytest.param(
            ONE | {"encoding_format": "int8"},
            400,
            "invalid_request",
            "encoding_format",
            ["'float' or 'base64'", "'int8'"],
            id="wrong enum",
        ),
        pytest.param(ONE | {"user": None}, 400, "invalid_request", "user", ["null"], id="null for an optional field"),
        pytest.param({"model": MODEL}, 400, "invalid_request", "input", ["`input` is required"], id="missing field"),
        pytest.param(
            ONE | {"dimensions": 4},
            400,
            "invalid_request",
            "dimensions",
            ["4", "its vectors have 8", "Matryoshka"],
            id="dimensions on a model that cannot be cut",
        ),
        pytest.param(
            ONE | {"input": ["one", "word " * 100]},
            400,
            "input_too_long",
            "input[1]",
            ["102 tokens", "takes 64", "`truncate`"],
            id="too long with NONE",
        ),
        pytest.param(
            ONE | {"modality": ["text", "image"]},
            400,
            "invalid_request",
            "modality",
            ["must be 'text'", "only texts"],
            id="an image",
        ),
        pytest.param([ONE], 400, "invalid_request", None, ["JSON object", "array"], id="not an object"),
    ],
)
def test_the_error_for_an_invalid_request_says_what_is_accepted(
    client: httpx.Client, body: Any, status: int, code: str, param: str | None, words: list[str]
) -> None:
    answer = client.post("/v1/embeddings", json=body)

    assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)
    for word in words:
        assert word in error["message"]


@pytest.mark.parametrize(
    ("request_line", "headers", "content", "status", "code"),
    [
        (("POST", "/v1/embeddings"), {"content-type": "application/json"}, b"{", 400, "invalid_request"),
        (("POST", "/v1/embeddings"), {"content-type": "application/json"}, b"", 400, "invalid_request"),
        (("POST", "/v1/embeddings"), {"content-type": "application/json"}, b'{"a":"\xff"}', 400, "invalid_request"),
        (("POST", "/v1/embeddings"), {"content-type": "text/plain"}, b"{}", 415, "unsupported_media_type"),
        (("POST", "/v1/embeddings"), {}, b"{}", 415, "unsupported_media_type"),
        (
            ("POST", "/v1/embeddings"),
            {"content-type": "application/json", "content-encoding": "gzip"},
            gzip.compress(b"{}", mtime=0),
            415,
            "unsupported_media_type",
        ),
        (("GET", "/v1/embeddings"), {}, b"", 405, "method_not_allowed"),
        (("DELETE", "/v1/models/x"), {}, b"", 405, "method_not_allowed"),
        (("GET", "/v1/models/x"), {}, b"", 404, "model_not_found"),
        (("GET", "/v1/models/"), {}, b"", 404, "model_not_found"),
        (("GET", "/"), {}, b"", 404, "not_found"),
        (("POST", "/v1/embedding"), {"content-type": "application/json"}, b"{}", 404, "not_found"),
    ],
)
def test_every_error_comes_in_one_envelope(
    client: httpx.Client,
    request_line: tuple[str, str],
    headers: dict[str, str],
    content: bytes,
    status: int,
    code: str,
) -> None:
    answer = client.request(*request_line, headers=headers, content=content)

    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"}
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.json()["error"]["code"] == code


def test_a_wrong_method_is_answered_with_the_allowed_ones(client: httpx.Client) -> None:
    answer = client.get("/v1/embeddings")

    assert answer.headers["allow"] == "POST"
    assert "takes POST" in answer.json()["error"]["message"]


def test_an_overloaded_server_sends_retry_after() -> None:
    full = FailingEmbedder(error=Overloaded("the queue is full", retry_after=1.2))
    with client_of(full) as client:
        answer = client.post("/v1/embeddings", json=ONE)

    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "2"
    assert answer.json()["error"]["type"] == "rate_limit_error"


def test_a_failure_of_the_server_is_reported_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with client_of(FailingEmbedder(error=CheckpointInvalid("config.json is not JSON"))) as client:
        answer = client.post("/v1/embeddings", json=ONE)

    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "checkpoint_invalid"
    assert "/v1/embeddings failed: config.json is not JSON" in caplog.text


def test_details_of_an_unexpected_exception_go_to_the_log_only(caplog: pytest.LogCaptureFixture) -> None:
    with client_of(FailingEmbedder(error=ZeroDivisionError("secret detail"))) as client:
        answer = client.post("/v1/embeddings", json=ONE)
        assert client.get("/v1/health/live").status_code == 200

    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "message": "an error inside the server; its log says more",
        "type": "server_error",
        "param": None,
        "code": "internal_server_error",
    }
    assert "ZeroDivisionError: secret detail" in caplog.text


_json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
_likely_values = (
    st.sampled_from([MODEL, "default", "one", "float", "base64", "NONE", "END", "query", "cosine", 8, 3.0])
    | _json_values
)
_fields = st.sampled_from(sorted({name for operation in ROUTES.values() for name in operation.request.model_fields}))


@given(
    path=st.sampled_from([*ROUTES]),
    body=_json_values | st.dictionaries(_fields, _likely_values, max_size=6),
)
@settings(max_examples=300)
def test_no_json_body_causes_a_server_error(client: httpx.Client, path: str, body: object) -> None:
    answer = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})

    assert answer.status_code in {200, 400, 404}
    assert (answer.status_code == 200) == ("error" not in answer.json())


# --- Clients that disconnect -----------------------------------------------------------------------------------------


def post(body_length: int, *headers: bytes) -> bytes:
    """The head of a request, for clients that disconnect where no HTTP library would."""
    lines = (
        b"POST /v1/embeddings HTTP/1.1",
        b"Host: localhost",
        b"Content-Type: application/json",
        b"Content-Length: %d" % body_length,
        *headers,
    )
    return b"\r\n".join(lines) + b"\r\n\r\n"


def test_a_disconnect_cancels_the_work() -> None:
    stuck = StuckEmbedder()
    body = orjson.dumps(ONE)
    with client_of(stuck) as client:
        address = client.base_url.host, client.base_url.port or 0
        with socket.create_connection(address, timeout=10) as caller:
            caller.sendall(post(len(body)) + body)
            assert stuck.called.wait(10)
            assert not stuck.call_cancelled.is_set()

        assert stuck.call_cancelled.wait(10)


def test_a_disconnect_in_the_middle_of_a_request_is_no_error(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    address = client.base_url.host, client.base_url.port or 0
    with socket.create_connection(address, timeout=10) as caller:
        caller.sendall(post(100, b"Expect: 100-continue"))
        assert caller.recv(100).startswith(b"HTTP/1.1 100 ")  # the server waits for the body

    assert client.get("/v1/health/live").status_code == 200
    assert not [record for record in caplog.records if record.levelname in {"ERROR", "WARNING"}]

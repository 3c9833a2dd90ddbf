"""All known error responses of endpoints, and the errors that callers get for them over REST and MCP."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
import httpx
import pytest
from mcp import Client
from mcp.types import TextContent
from pydantic import SecretStr

from embeddings_mcp.embedders.nim import Endpoint, EndpointClient, NimEmbedder
from embeddings_mcp.embedders.nim.failures import error_message, parse_retry_after
from embeddings_mcp.faces.http.app import create_app
from embeddings_mcp.faces.mcp.server import build_mcp_server
from embeddings_mcp.models import ModelCard
from embeddings_mcp.settings import Settings
from tests.nim.standin import StandIn, answering, stand_in
from tests.support import service_of

pytestmark = pytest.mark.anyio

KEY = "nvapi-0123456789secret"
ACCOUNT = "8a4ce1d6"
MODEL = ModelCard(id="nvidia/some-model", dimensions=8, input_type="optional")
RETIRED = ModelCard(id="nvidia/gone", dimensions=8, hub="")
CONTINUED = ModelCard(id="baai/bge-m3", dimensions=8, hub="BAAI/bge-m3", hosted_until="2026-08-25")


@dataclass(frozen=True)
class Case:
    """A response of the endpoint, and the error expected for it.

    Attributes:
        answer: status and body; a string is sent as plain text.
        status: of our REST response.
        code: of our error.
        says: substrings of the message.
        attempts: expected number of requests to the endpoint.
    """

    name: str
    answer: tuple[int, object]
    status: int
    code: str
    says: tuple[str, ...]
    attempts: int = 1
    headers: tuple[tuple[str, str], ...] = ()
    param: str | None = None
    retry_after: str | None = None
    model: ModelCard = MODEL
    with_key: bool = True


def problem(status: int, title: str, detail: str | None = None) -> tuple[int, object]:
    body: dict[str, object] = {"type": "about:blank", "title": title, "status": status}
    return status, body if detail is None else {**body, "detail": detail}


KEY_REFUSED = ("does not accept the API key in NVIDIA_API_KEY", "ask its operator")

CASES = (
    # --- The hosted gateway ---
    Case("no key was sent", (401, "Header of type `authorization` was missing"), 502, "upstream_refused",
         ("asks for an API key", "set NVIDIA_API_KEY"), with_key=False),
    Case("malformed key", (401, "Unauthorized access"), 502, "upstream_refused", KEY_REFUSED),
    Case("not a key of this kind", problem(401, "Unauthorized", "Authentication failed"), 502, "upstream_refused",
         KEY_REFUSED),
    Case("revoked key", problem(403, "Forbidden", "Authorization failed"), 502, "upstream_refused", KEY_REFUSED),
    Case("no credits left", problem(402, "Payment Required", f"Account '{ACCOUNT}': Cloud credits expired"),
         502, "upstream_refused", ("the account of the key in NVIDIA_API_KEY has no credits left",)),
    Case("unknown model", (404, "404 page not found"), 404, "model_not_found", ("serves no model nvidia/some-model",),
         param="model"),
    Case("not entitled", problem(404, "Not Found", f"Function 'f0e1': Not found for account '{ACCOUNT}'"),
         404, "model_not_found", ("may not use nvidia/some-model", "choose another model"), param="model"),
    Case("end of life", problem(410, "Gone", "The model 'nvidia/gone' has reached its end of life on "
         "2026-08-25T09:00:00Z and is no longer available."), 410, "model_retired",
         ("switched nvidia/gone off on 2026-08-25", "`--model nvidia/gone=FOLDER`", "recomputed with another model"),
         param="model", model=RETIRED),
    Case("end of life of a model whose weights are public", (410, b""), 410, "model_retired",
         ("switched baai/bge-m3 off on 2026-08-25", "`--model baai/bge-m3` produces the same vectors"),
         param="model", model=CONTINUED),
    Case("end of life without a message", (410, b""), 410, "model_retired", ("switched nvidia/gone off (410)",),
         param="model", model=RETIRED),
    Case("model field missing", (400, {"error": {"message": "model field is required", "type": "invalid_request_error",
         "param": None, "code": "missing_required_field"}}), 400, "invalid_request", ("400: model field is required",)),
    Case("body over 25 MiB", (400, {"error": {"message": "Please make sure your payload is below 26214400 bytes in "
         "size. If larger assets are required please refer to our Assets API.", "type": "invalid_request_error"}}),
         413, "payload_too_large", ("the text is too much for one request", "below 26214400 bytes"), param="input"),
    Case("body is not JSON", (500, "failed to decode json body: EOF"), 502, "upstream_failed",
         ("500: failed to decode json body",), attempts=6),
    Case("function degraded", problem(400, "Bad Request", "Function id 'f0e1': DEGRADED function cannot be invoked"),
         503, "upstream_unavailable", ("degraded at the moment",), attempts=6),
    Case("rate limit", problem(429, "Too Many Requests"), 429, "overloaded",
         ("takes no more requests for now", "429: Too Many Requests", "try again in 60 s"),
         attempts=8, retry_after="60"),
    Case("rate limit with Retry-After", problem(429, "Too Many Requests", "Limit of model X"), 429, "overloaded",
         ("429: Limit of model X", "try again in 90 s"), headers=(("Retry-After", "90"),), retry_after="90"),
    Case("rate limit with a huge Retry-After", (429, b""), 429, "overloaded", ("try again in 86,400 s",),
         headers=(("Retry-After", "1e300"),), retry_after="86400"),
    Case("client went away", problem(499, "Client Closed Request"), 502, "upstream_failed", ("499",)),
    Case("upstream failed", problem(502, "Bad Gateway", "Upstream request failed."), 502, "upstream_failed",
         ("failed (502: Upstream request failed.)",), attempts=6),
    Case("model offline", problem(503, "Service Unavailable", "The model is offline for maintenance."), 503,
         "upstream_unavailable", ("The model is offline for maintenance.", "try again in 10,800 s"),
         headers=(("Retry-After", "10800"),), retry_after="10800"),
    Case("worker saturated", (503, {"error": {"message": "ResourceExhausted: Worker local total request limit reached "
         "(16/16)", "type": "Service Unavailable", "code": 503}}), 503, "upstream_unavailable",
         ("takes no work now (503: ResourceExhausted",), attempts=6),
    Case("timeout", (504, b""), 504, "upstream_timeout", ("timed out (504)",), attempts=6),
    Case("request timeout", (408, b""), 504, "upstream_timeout", ("(408)",), attempts=6),
    Case("other failure", problem(500, "Internal Server Error", "Something broke"), 502, "upstream_failed",
         ("500: Something broke",), attempts=6),
    Case("accepted, with nowhere to ask", (202, b""), 502, "upstream_failed", ("202",)),
    # --- The model itself ---
    Case("input_type missing", (400, {"error": "'input_type' parameter is required for asymmetric models"}), 400,
         "invalid_request", ("`input_type` is not as nvidia/some-model wants it", "'query'", "'passage'"),
         param="input_type"),
    Case("input_type missing, other form", (400, {"detail": "'input_type' parameter is required"}), 400,
         "invalid_request", ("'input_type' parameter is required",), param="input_type"),
    Case("too long", (400, {"error": "Input length 576 exceeds maximum allowed token size 512"}), 400, "input_too_long",
         ("`input` has 576 tokens, and the model takes 512", "`truncate`"), param="input"),
    Case("too long, as 422", (422, {"detail": [{"loc": ["body"], "msg": "exceeds maximum allowed token size"}]}), 400,
         "input_too_long", ("`input` has more tokens than the model takes",), param="input"),
    Case("dimensions on a fixed-size model", (400, {"detail": "This model does not support 'dimensions', but a value "
         "of '2048' was provided."}), 400, "invalid_request", ("does not support 'dimensions'",)),
    Case("an extra field", (400, "Your request cannot be validated. detail={'type': 'extra_forbidden'}"), 400,
         "invalid_request", ("extra_forbidden",)),
    Case("validation of 1.x", (400, {"object": "error", "message": "Your request cannot be validated, it is incorrect.",
         "detail": {"type": "literal_error", "loc": ["body", "encoding_format"], "msg": "Input should be 'float' or "
         "'base64'", "input": None}, "type": "request_validation_error"}), 400, "invalid_request",
         ("it is incorrect. body.encoding_format: Input should be 'float' or 'base64'",)),
    Case("broken JSON", (400, {"error": {"code": 400, "type": "BadRequestError", "param": None, "message": "Expecting "
         "property name enclosed in double quotes"}}), 400, "invalid_request", ("400: Expecting property name",)),
    # --- Other servers of the same API ---
    Case("ours", (400, {"error": {"message": "`input[0]` has 1,300 tokens, and the model takes 512: shorten it, or ...",
         "type": "invalid_request_error", "param": "input[0]", "code": "input_too_long"}}), 400, "input_too_long",
         ("`input` has 1,300 tokens, and the model takes 512",), param="input"),
    Case("ours, without the numbers", (400, "`input[0]` has , tokens, and the model takes ,"), 400, "invalid_request",
         ("400: `input[0]` has , tokens",)),
    Case("text-embeddings-inference", (413, {"error": "Input validation error: `inputs` must have less than 512 tokens."
         " Given: 576", "error_type": "Validation"}), 400, "input_too_long", ("576 tokens, and the model takes 512",),
         param="input"),
    Case("vLLM", (400, {"object": "error", "message": "This model's maximum context length is 512 tokens. However, you "
         "requested 576 tokens in the input for embedding generation. Please reduce the length of the input.",
         "type": "BadRequestError", "code": 400}), 400, "input_too_long", ("576 tokens, and the model takes 512",),
         param="input"),
    Case("vLLM without the number", (400, {"error": {"message": "This model's maximum context length is 512 tokens."}}),
         400, "input_too_long", ("more than the 512 tokens that the model takes",), param="input"),
    Case("Ollama", (500, {"error": {"message": "the input length exceeds the context length"}}), 400, "input_too_long",
         ("more tokens than the model takes",), param="input"),
    Case("a body limit", (413, "Failed to buffer the request body: length limit exceeded"), 413, "payload_too_large",
         ("length limit exceeded",), param="input"),
    Case("a proxy's page", (502, "<html><body><h1>502 Bad Gateway</h1></body></html>"), 502, "upstream_failed",
         ("failed (502)",), attempts=6),
    Case("an unexpected status", (418, "I am a teapot"), 502, "upstream_failed", ("418: I am a teapot",)),
    Case("redirect", (307, b""), 502, "upstream_failed",
         ("redirects to https://elsewhere.example/v1/embeddings (307)", "not followed"),
         headers=(("Location", "https://elsewhere.example/v1/embeddings"),)),
    Case("redirect to a non-ASCII URL", (307, b""), 502, "upstream_failed", ("redirects to https://zürich.example/v1",),
         headers=(("Location", "https://zürich.example/v1"),)),
    Case("a server that repeats the key", (400, f"unexpected header Bearer {KEY}"), 400, "invalid_request",
         ("unexpected header Bearer ***",)),
)  # fmt: skip


@asynccontextmanager
async def faces_of(nim: StandIn, case: Case) -> AsyncIterator[tuple[httpx.AsyncClient, Client]]:
    """REST and MCP clients of a service whose model is at the stand-in."""
    endpoint = Endpoint(url=nim.url, api_key=SecretStr(KEY) if case.with_key else None)
    embedder = NimEmbedder(EndpointClient(endpoint), case.model)
    service = service_of(embedder)
    server = build_mcp_server(service)
    app = httpx.ASGITransport(create_app(service, server, Settings()))
    with anyio.fail_after(20):
        async with (
            httpx.AsyncClient(transport=app, base_url="http://127.0.0.1") as rest,
            Client(server) as mcp,
        ):
            yield rest, mcp
    await embedder.aclose()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_an_error_response_is_translated_for_the_caller_without_key_or_account(
    case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    status, body = case.answer
    fault = answering(status, body.encode() if isinstance(body, str) else body, **dict(case.headers))
    request = {"model": case.model.id, "input": "a text", "input_type": "query"}
    async with stand_in(faults=itertools.repeat(fault)) as nim, faces_of(nim, case) as (rest, mcp):
        answer = await rest.post("/v1/embeddings", json=request)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (case.status, case.code, case.param)
        assert [part for part in case.says if part not in error["message"]] == []
        assert len(nim.seen) == case.attempts
        assert answer.headers.get("Retry-After") == case.retry_after

        result = await mcp.call_tool("create_embedding", request)
        assert result.is_error
        (content,) = result.content
        assert isinstance(content, TextContent)
        assert content.text == error["message"]

        exposed = answer.text + content.text + caplog.text
        assert not [secret for secret in (KEY, ACCOUNT) if secret in exposed]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", ""),
        (b"plain  text\nin lines", "plain text in lines"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"<!doctype html><p>no", ""),
        (b'{"error": "why"}', "why"),
        (b'{"error": {"message": "why"}}', "why"),
        (b'{"detail": "why"}', "why"),
        (b'{"detail": {"loc": ["body", "x", 0], "msg": "why", "input": "private"}}', "body.x.0: why"),
        (b'{"detail": [{"loc": ["body"], "msg": "one"}, {"msg": "two"}]}', "body: one; two"),
        (b'{"title": "Gone", "status": 410, "detail": "why"}', "why"),
        (b'{"title": "Gone", "status": 410}', "Gone"),
        (b'{"title": "Gone", "detail": null}', "Gone"),
        (b"[1, 2]", ""),
        (b"null", ""),
        (b"{}", ""),
        (b'{"error": null, "message": "why"}', "why"),
        (b'{"error": ' * 1000 + b'"deep"' + b"}" * 1000, ""),
        (b"[" * 100_000, "[" * 100_000),
    ],
)
def test_the_message_of_an_error_response_is_found_in_every_known_form(body: bytes, message: str) -> None:
    assert error_message(body) == message


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("12", 12.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("nan", None),
        ("soon", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 21 Oct 2015 07:28:00 +99999999999999", None),
        ("Wed, 31 Dec 9999 23:59:59 -9999", None),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86_400.0),
        ("1e300", 86_400.0),
        ("1e999", None),
    ],
)
def test_retry_after_is_a_number_or_a_date(header: str | None, seconds: float | None) -> None:
    assert parse_retry_after(header) == seconds


async def test_a_long_error_message_is_cut() -> None:
    case = Case("long", (400, "x" * 5000), 400, "invalid_request", ())
    fault = answering(400, b"x" * 5000)
    async with stand_in(faults=iter([fault])) as nim, faces_of(nim, case) as (rest, _):
        answer = await rest.post("/v1/embeddings", json={"model": MODEL.id, "input": "a text"})
    assert len(json.loads(answer.text)["error"]["message"]) < 500

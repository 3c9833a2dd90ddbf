"""Observability: request ids, metrics, stages and logs, none of which contain anything of a text or a key."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, cast

import anyio
import httpx
import pytest
from mcp import Client
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from embeddings_mcp import logs, telemetry
from embeddings_mcp.embedders.local_embedder import LocalEmbedder
from embeddings_mcp.errors import Overloaded
from embeddings_mcp.faces.http import descriptions, rest
from embeddings_mcp.faces.http.instrumentation import route_of
from embeddings_mcp.faces.mcp.server import build_mcp_server
from embeddings_mcp.models import ModelCard
from tests.support import ROOT, SECONDS, FailingEmbedder, client_of, service_of
from tests.test_local_embedder import EXACT, SteppedEncoder

TEXT = "heliotrope"
KEY = "sk-marzipan"


def local_embedder(encoder: SteppedEncoder | None = None) -> LocalEmbedder:
    """An embedder that takes a character as a token, and at most eight of them; by default it never waits."""
    encoder = encoder or SteppedEncoder(steps=threading.Semaphore(1000))
    return LocalEmbedder(ModelCard(id="test/rough"), lambda: cast("Any", encoder), lambda: ("rough", EXACT))


def ask(client: httpx.Client, text: str | list[str] = "one", **headers: str) -> httpx.Response:
    return client.post("/v1/embeddings", json={"model": "default", "input": text}, headers=headers)


def metrics(client: httpx.Client, **headers: str) -> dict[str, float]:
    """The value of every sample, by its name and labels, as parsed by the Prometheus client."""
    text = client.get("/v1/metrics", headers=headers).raise_for_status().text
    return {
        f"{sample.name}{json.dumps(sample.labels, sort_keys=True)}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def increases(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}


# --- Ids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/models", "/v1/health/live", "/mcp", "/nowhere"])
def test_every_answer_has_a_request_id_the_callers_own_or_a_new_one(path: str) -> None:
    with client_of(api_key="key") as client:  # without which most routes refuse the request
        given = client.get(path, headers={"x-request-id": "trace-1.2_3"})
        generated = [client.get(path).headers["x-request-id"] for _ in range(2)]
    assert given.headers["x-request-id"] == "trace-1.2_3"
    assert all(re.fullmatch("[0-9a-f]{32}", request_id) for request_id in generated)
    assert generated[0] != generated[1]


@pytest.mark.parametrize("forged", ["a b", "x" * 129, "id%0a", "\u001b[31m", "a,b", ""])
def test_a_request_id_that_is_unsafe_to_log_is_replaced(forged: str) -> None:
    with client_of() as client:
        answer = client.get("/v1/models", headers={b"x-request-id": forged.encode()})
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


# --- Metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_count_requests_calls_tokens_batches_and_stages() -> None:
    with client_of(local_embedder()) as client:
        before = metrics(client)
        assert ask(client, "four").status_code == 200
        assert ask(client, "far too long").status_code == 400
        assert client.get("/v1/models/none").status_code == 404
        increase = increases(before, metrics(client))
    operation = '"operation": "create_embedding"'
    assert increase[f'embeddings_calls_total{{"code": "ok", {operation}}}'] == 1
    assert increase[f'embeddings_calls_total{{"code": "input_too_long", {operation}}}'] == 1
    assert increase[f"embeddings_tokens_total{{{operation}}}"] == 4
    post = '"method": "POST", "route": "/v1/embeddings"'
    assert increase[f'embeddings_http_requests_total{{{post}, "status": "200"}}'] == 1
    assert increase[f'embeddings_http_requests_total{{{post}, "status": "400"}}'] == 1
    missing = '"method": "GET", "route": "/v1/models/*", "status": "404"'
    assert increase[f"embeddings_http_requests_total{{{missing}}}"] == 1
    assert (increase["embeddings_batch_texts_sum{}"], increase["embeddings_batch_tokens_sum{}"]) == (1, 4)
    for stage in ("tokenize", "wait", "encode", "serialize"):
        assert increase[f'embeddings_stage_seconds_count{{"stage": "{stage}"}}'] >= 1, stage


def test_queued_tokens_and_requests_in_flight_are_counted_until_they_are_done() -> None:
    encoder = SteppedEncoder()
    with client_of(local_embedder(encoder)) as client, ThreadPoolExecutor(1) as caller:
        before = metrics(client)
        answer = caller.submit(ask, client, ["x" * 8, "four"])
        assert encoder.begun.get(timeout=SECONDS) == [8]
        meanwhile = metrics(client)
        encoder.steps.release(2)
        assert answer.result().status_code == 200
        after = metrics(client)
    for gauge, increase in {"embeddings_queued_tokens{}": 4, "embeddings_http_requests_in_flight{}": 1}.items():
        assert (meanwhile[gauge] - before[gauge], after[gauge] - before[gauge]) == (increase, 0), gauge


@pytest.mark.anyio
async def test_calls_over_mcp_are_counted_too() -> None:
    service = service_of(FailingEmbedder(error=Overloaded("later", retry_after=3)))
    counter = telemetry.CALLS.labels("search", "overloaded")
    before = counter._value.get()
    with anyio.fail_after(10):
        async with Client(build_mcp_server(service)) as client:
            await client.call_tool("search", {"model": "default", "query": "a", "input": ["b"]})
    assert counter._value.get() == before + 1


def test_metrics_need_the_key_unless_the_settings_exempt_them() -> None:
    with client_of(api_key=KEY) as client:
        assert client.get("/v1/metrics").status_code == 401
        assert client.get("/v1/metrics", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
    with client_of(api_key=KEY, without_key=("metrics",)) as client:
        assert client.get("/v1/metrics").status_code == 200


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v1/embeddings", "/v1/embeddings"),
        ("/v1/models/a/b", "/v1/models/*"),
        ("/skills/x/../y", "/skills/*"),
        ("/" + "x" * 5000, "other"),
        ("/v1/embeddings/", "other"),
        ("", "other"),
    ],
)
def test_paths_are_mapped_to_a_fixed_set_of_labels(path: str, route: str) -> None:
    assert route_of(path) == route


def test_every_route_has_a_label() -> None:
    for route in (*rest.routes(service_of()), *descriptions.routes()):
        assert route_of(re.sub(r"\{[^}]*\}", "x", route.path)) != "other", route.path


# --- Stages ----------------------------------------------------------------------------------------------------------


def test_an_answer_has_the_time_of_each_stage() -> None:
    with client_of(local_embedder()) as client:
        header = ask(client).headers["server-timing"]
    stages = dict(re.findall(r"(\w+);dur=([0-9.]+)", header))
    assert list(stages) == ["tokenize", "wait", "encode", "serialize", "total"]
    parts = sum(float(stages[name]) for name in list(stages)[:-1])
    assert parts <= float(stages["total"]) + 0.5


# --- No texts or keys ------------------------------------------------------------------------------------------------


class RecordingTracer:
    """A tracer, and a span, that records every call."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def record(*args: object, **kwargs: object) -> Any:
            self.calls.append(f"{name} {args} {kwargs}")
            return self

        return record

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.calls.append(str(raised[:2]))


def test_nothing_of_texts_or_keys_is_in_logs_metrics_or_spans(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracer = RecordingTracer()
    monkeypatch.setattr("embeddings_mcp.telemetry._tracer", tracer)
    monkeypatch.setattr("embeddings_mcp.faces.http.instrumentation._tracer", tracer)
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    handler.setFormatter(logs.JsonFormatter())
    handler.addFilter(lambda record: not record.name.startswith(("httpx", "httpcore")))  # those of the test's client
    root = logging.getLogger()
    root.addHandler(handler)
    caplog.set_level(logging.DEBUG)
    authorized = {"authorization": f"Bearer {KEY}"}
    try:
        with client_of(local_embedder(), api_key=KEY) as client:
            for text in (TEXT[:8], TEXT):  # the second is too long
                ask(client, text, **authorized)
                ask(client, text, authorization=f"Bearer {text}")
            client.post("/v1/embeddings", content=f'{{"input": "{TEXT}', headers=authorized)
            client.post("/v1/embeddings", json={"model": TEXT, "input": "a", TEXT: 1}, headers=authorized)
            client.get(f"/{TEXT}?{TEXT}={TEXT}", headers=authorized)
            client.post("/mcp", json={"method": TEXT}, headers=authorized)
            exposition = client.get("/v1/metrics", headers=authorized).text
        with client_of(FailingEmbedder(error=RuntimeError("no text in here"))) as client:
            ask(client, TEXT)
    finally:
        root.removeHandler(handler)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("embeddings_mcp")]
    assert any("route=/v1/embeddings status=200" in message for message in messages)
    assert len(tracer.calls) > 20
    for name, output in (("logs", log.getvalue()), ("metrics", exposition), ("spans", "\n".join(tracer.calls))):
        for secret in (TEXT[:8], KEY):
            assert secret not in output, name


def test_a_span_continues_the_callers_trace_and_never_records_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = RecordingTracer()
    monkeypatch.setattr("embeddings_mcp.faces.http.instrumentation._tracer", tracer)
    trace = "0af7651916cd43dd8448eb211c80319c"
    with client_of() as client:
        ask(client, "one", traceparent=f"00-{trace}-b7ad6b7169203331-01")

    (started,) = [call for call in tracer.calls if call.startswith("start_as_current_span ")]
    assert f"trace_id=0x{trace}" in started
    assert "'record_exception': False" in started


# --- Logs ------------------------------------------------------------------------------------------------------------

FORGED = "fine\r\nERROR root: forged\x1b[2J\u2028\x85end, and a lone surrogate: \ud83d"


@pytest.mark.parametrize("formatter", [logs.TextFormatter(), logs.JsonFormatter()])
def test_a_message_can_neither_forge_a_second_line_nor_control_a_terminal(formatter: logging.Formatter) -> None:
    record = logging.LogRecord("a", logging.WARNING, __file__, 1, "%s", (FORGED,), None)
    line = formatter.format(record)
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert line.encode()
    if isinstance(formatter, logs.JsonFormatter):
        assert json.loads(line)["message"] == FORGED


def test_a_json_line_has_the_request_id_and_the_traceback() -> None:
    token = logs.request_id.set("id-1")
    try:
        int("broken")
    except ValueError:
        record = logging.LogRecord("a", logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
        line = json.loads(logs.JsonFormatter().format(record))
    finally:
        logs.request_id.reset(token)
    assert (line["level"], line["logger"], line["message"], line["request_id"]) == ("error", "a", "failed", "id-1")
    assert line["traceback"].endswith("invalid literal for int() with base 10: 'broken'")


def test_requests_are_logged_with_id_route_status_and_time(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logs.ACCESS_LOGGER)
    with client_of() as client:
        ask(client, **{"x-request-id": "mine"})
    [record] = [record for record in caplog.records if record.name == logs.ACCESS_LOGGER]
    assert re.fullmatch(r"method=POST route=/v1/embeddings status=200 seconds=[0-9.]+", record.getMessage())


# --- The dashboard ---------------------------------------------------------------------------------------------------


def test_the_dashboard_queries_only_existing_metrics_and_almost_all_of_them() -> None:
    dashboard = json.loads((ROOT / "packaging/grafana/embeddings-mcp.json").read_text("utf-8"))
    queried = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\b(?:embeddings|process)_\w+", target["expr"])
    }
    text = generate_latest(telemetry.REGISTRY).decode()
    families = {
        f"{family.name}{ending}"
        for family in text_string_to_metric_families(text)
        for ending in {"counter": ["_total"], "histogram": ["_bucket"]}.get(family.type, [""])
    }
    assert queried <= families
    ours = {name for name in families if name.startswith("embeddings_") and "http_request_seconds" not in name}
    assert ours - queried <= {"embeddings_batch_tokens_bucket"}

"""Telemetry: Prometheus metrics, OpenTelemetry spans, and the stage timings of a request.

Telemetry holds names, counts and times only, never a text, a vector, a key, or a message that may quote one. Label
values come from fixed sets, so that callers cannot increase their cardinality. Spans are dropped unless the operator
runs the server with an OpenTelemetry SDK (``opentelemetry-instrument embeddings-mcp serve``).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from opentelemetry import trace
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

from embeddings_mcp.errors import EmbeddingsError, wire_form

Stage = Literal["tokenize", "wait", "encode", "serialize"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_COUNTS = tuple(4**power for power in range(10))

disable_created_metrics()  # type: ignore[no-untyped-call]  # one extra, unused sample per metric
REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)

HTTP_REQUESTS = Counter(
    "embeddings_http_requests", "HTTP requests completed.", ["method", "route", "status"], registry=REGISTRY
)
HTTP_SECONDS = Histogram(
    "embeddings_http_request_seconds",
    "From a request's headers to the end of its response.",
    ["route"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
REQUESTS_IN_FLIGHT = Gauge("embeddings_http_requests_in_flight", "HTTP requests in flight now.", registry=REGISTRY)
CALLS = Counter(
    "embeddings_calls",
    "Operations completed, over MCP and REST; code is `ok` or the error code.",
    ["operation", "code"],
    registry=REGISTRY,
)
CALL_SECONDS = Histogram(
    "embeddings_call_seconds",
    "From a parsed request to its response.",
    ["operation"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
STAGE_SECONDS = Histogram(
    "embeddings_stage_seconds", "Time spent in each stage of a request.", ["stage"], buckets=_SECONDS, registry=REGISTRY
)
TOKENS = Counter("embeddings_tokens", "Tokens of completed requests.", ["operation"], registry=REGISTRY)
QUEUED_TOKENS = Gauge("embeddings_queued_tokens", "Tokens waiting for a worker now.", registry=REGISTRY)
BATCH_TEXTS = Histogram("embeddings_batch_texts", "Texts per batch.", buckets=_COUNTS, registry=REGISTRY)
BATCH_TOKENS = Histogram("embeddings_batch_tokens", "Tokens per batch.", buckets=_COUNTS, registry=REGISTRY)
CACHE_TEXTS = Counter("embeddings_cache_texts", "Texts looked up in the cache.", ["outcome"], registry=REGISTRY)
UPSTREAM_RETRIES = Counter(
    "embeddings_upstream_retries", "Requests to endpoints that failed and were retried.", registry=REGISTRY
)

_tracer = trace.get_tracer("embeddings-mcp")
_stages: ContextVar[dict[Stage, float] | None] = ContextVar("stages", default=None)


@contextmanager
def collect_stages() -> Iterator[dict[Stage, float]]:
    """Collect the seconds spent in each stage of the request that is processed in this block."""
    stages: dict[Stage, float] = {}
    token = _stages.set(stages)
    try:
        yield stages
    finally:
        _stages.reset(token)


def record(stage: Stage, seconds: float) -> None:
    """Record the duration of a stage that has just ended."""
    STAGE_SECONDS.labels(stage).observe(seconds)
    if (stages := _stages.get()) is not None:
        stages[stage] = stages.get(stage, 0.0) + seconds
    now = time.time_ns()
    _tracer.start_span(f"embeddings {stage}", start_time=now - int(seconds * 1e9)).end(now)


@contextmanager
def stage(name: Stage) -> Iterator[None]:
    """Time the block as a stage."""
    started = time.perf_counter()
    try:
        yield
    finally:
        record(name, time.perf_counter() - started)


@contextmanager
def call(operation: str) -> Iterator[None]:
    """Count and time the block as a call of `operation`, labeled with its outcome."""
    started = time.perf_counter()
    code = "ok"
    try:
        yield
    except EmbeddingsError as error:
        code = wire_form(error).code
        raise
    except asyncio.CancelledError:
        code = "cancelled"
        raise
    except BaseException:
        code = "crash"
        raise
    finally:
        CALLS.labels(operation, code).inc()
        CALL_SECONDS.labels(operation).observe(time.perf_counter() - started)

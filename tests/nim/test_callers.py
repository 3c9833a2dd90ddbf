"""A model at an endpoint, called over REST and MCP."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import anyio
import httpx
import numpy as np
import openai
import pytest
from langchain_nvidia_ai_endpoints import NVIDIAEmbeddings
from mcp import Client

from embeddings_mcp.embedders.base import Embedder
from embeddings_mcp.embedders.nim import Endpoint, EndpointClient, NimEmbedder
from embeddings_mcp.faces.mcp.server import build_mcp_server
from tests.nim.standin import ASYMMETRIC, StandIn, held, stand_in
from tests.support import HashEmbedder, http_server, service_of

pytestmark = pytest.mark.anyio

MODEL = ASYMMETRIC.id
TEXTS = ["one", "two", "three", '["four"]', "two"]


def embedder_at(nim: StandIn, **endpoint: int) -> NimEmbedder:
    return NimEmbedder(EndpointClient(Endpoint(url=nim.url, **endpoint)), ASYMMETRIC)  # type: ignore[arg-type]


@contextmanager
def rest_over(embedder: Embedder, **chosen: float) -> Iterator[str]:
    """Serve our REST API over this embedder, and close the embedder afterwards."""
    with http_server(service_of(embedder), **chosen) as url:
        yield f"{url}/v1"


@asynccontextmanager
async def mcp_over(embedder: Embedder) -> AsyncIterator[Client]:
    service = service_of(embedder)
    async with Client(build_mcp_server(service)) as client:
        yield client
    await service.aclose()


async def test_cancelling_a_tool_call_cancels_the_requests_to_the_endpoint() -> None:
    faults = itertools.repeat(held(anyio.Event()))
    with anyio.fail_after(10):
        async with stand_in(faults=faults) as nim, mcp_over(embedder_at(nim, batch_size=2)) as client:
            async with anyio.create_task_group() as calls:
                arguments = {"model": MODEL, "input": TEXTS, "input_type": "passage"}
                calls.start_soon(client.call_tool, "create_embedding", arguments)
                await nim.received(3)
                calls.cancel_scope.cancel()
            await nim.client_disconnected.wait()


async def test_a_disconnecting_rest_client_cancels_the_request_to_the_endpoint() -> None:
    faults = itertools.repeat(held(anyio.Event()))
    with anyio.fail_after(10):
        async with stand_in(faults=faults) as nim:
            with rest_over(embedder_at(nim)) as url:
                async with (
                    openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client,
                    anyio.create_task_group() as calls,
                ):
                    calls.start_soon(
                        lambda: client.embeddings.create(model=MODEL, input=TEXTS, extra_body={"input_type": "query"})
                    )
                    await nim.received(1)
                    calls.cancel_scope.cancel()
                await nim.client_disconnected.wait()


async def test_a_rest_request_that_times_out_before_its_turn_gets_a_timeout_error() -> None:
    async with stand_in() as nim:
        with rest_over(embedder_at(nim), request_seconds=1e-9) as url:
            async with httpx.AsyncClient(timeout=10) as client:
                body = {"model": MODEL, "input": TEXTS, "input_type": "query"}
                answer = await client.post(f"{url}/embeddings", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "request_timeout")
    assert not nim.seen


async def test_a_waiting_tool_call_reports_increasing_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embeddings_mcp.faces.mcp.server.PROGRESS_INTERVAL_SECONDS", 0.01)
    gate = anyio.Event()
    amounts: list[float] = []
    messages: list[str | None] = []

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        amounts.append(progress)
        messages.append(message)
        if messages.count("3 of 5 texts embedded, waiting for the rest") == 2:
            gate.set()

    with anyio.fail_after(10):
        async with (
            stand_in(faults=iter([None, held(gate)])) as nim,
            mcp_over(embedder_at(nim, batch_size=3)) as client,
        ):
            arguments = {"model": MODEL, "input": TEXTS, "input_type": "passage"}
            result = await client.call_tool("create_embedding", arguments, progress_callback=on_progress)
    assert not result.is_error
    assert "3 of 5 texts embedded" in messages
    assert all(later > earlier for earlier, later in itertools.pairwise(amounts))


@pytest.fixture(params=["endpoint", "local"])
async def url(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """URL of our REST API over each kind of backend."""
    async with stand_in() as nim:
        local = request.param == "local"
        with rest_over(HashEmbedder(ASYMMETRIC) if local else embedder_at(nim, batch_size=2)) as url:
            yield url


def expected(input_type: str) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    assert input_type in {"query", "passage"}
    return np.stack([HashEmbedder(ASYMMETRIC).vector(text, input_type) for text in TEXTS])  # type: ignore[arg-type]


async def test_openais_client_gets_vectors_as_base64_and_as_numbers(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        base64 = await client.embeddings.create(model=f"{MODEL}-query", input=TEXTS)
        floats = await client.embeddings.create(model=f"{MODEL}-query", input=TEXTS, encoding_format="float")
        with pytest.raises(openai.BadRequestError, match="`input_type` is required by test/asymmetric"):
            await client.embeddings.create(model=MODEL, input=TEXTS)
    for answer in (base64, floats):
        np.testing.assert_array_equal(np.array([row.embedding for row in answer.data], np.float32), expected("query"))
        assert answer.model == MODEL
        assert answer.usage.prompt_tokens >= len(TEXTS)


async def test_nvidias_own_langchain_client_gets_queries_and_passages(url: str) -> None:
    # Its constructor lists the models with a blocking client.
    client = await anyio.to_thread.run_sync(
        lambda: NVIDIAEmbeddings(base_url=url, model=MODEL, usage_telemetry_enabled=False)
    )
    assert [model.id for model in await anyio.to_thread.run_sync(lambda: client.available_models)] == [MODEL]
    passages = await anyio.to_thread.run_sync(client.embed_documents, TEXTS)
    np.testing.assert_array_equal(np.array(passages, np.float32), expected("passage"))
    query = await anyio.to_thread.run_sync(client.embed_query, TEXTS[0])
    np.testing.assert_array_equal(np.array(query, np.float32), expected("query")[0])
    np.testing.assert_array_equal(np.array(await client.aembed_query(TEXTS[0]), np.float32), expected("query")[0])

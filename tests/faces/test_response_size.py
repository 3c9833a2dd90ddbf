"""Answers over MCP are no larger than clients over HTTP read them, whichever way they are sent."""

from __future__ import annotations

import re
from typing import Any

import anyio
import pytest
from mcp import Client
from mcp.types import CallToolResult

from embeddings_mcp.faces.mcp.server import build_mcp_server
from embeddings_mcp.models import ModelCard
from embeddings_mcp.request_limits import Limits
from embeddings_mcp.settings import Settings
from tests.support import HashEmbedder, served, service_of

pytestmark = pytest.mark.anyio

SECONDS = 30


async def call(client: Client, tool: str, **arguments: Any) -> CallToolResult:
    """Call a tool as a client that wants to see progress: what it is answered is always an event of a stream."""

    async def ignore(progress: float, total: float | None, message: str | None) -> None:
        pass

    return await client.call_tool(tool, {"model": "default", **arguments}, progress_callback=ignore)


def words(result: CallToolResult) -> str:
    return " ".join(block.text for block in result.content if block.type == "text")


@pytest.mark.parametrize("mode", ["legacy", "auto"])
@pytest.mark.parametrize("encoding_format", ["float", "base64"])
@pytest.mark.parametrize("dimensions", [384, 4096])
async def test_as_many_vectors_as_the_refusal_of_too_many_names_reach_the_client(
    mode: str, encoding_format: str, dimensions: int
) -> None:
    embedder = HashEmbedder(card=ModelCard(id="test/hash", dimensions=dimensions))
    with served(service_of(embedder)) as url, anyio.fail_after(SECONDS):
        async with Client(f"{url}/mcp", mode=mode) as client:
            texts = [f"text {index}" for index in range(600)]
            refused = await call(client, "create_embedding", input=texts, encoding_format=encoding_format)
            assert not embedder.batches, "nothing was computed in vain"
            fitting = re.search(r"at most ([\d,]+) texts", words(refused))
            assert refused.is_error
            assert fitting, words(refused)
            count = int(fitting[1].replace(",", ""))
            answer = await call(client, "create_embedding", input=texts[:count], encoding_format=encoding_format)

    assert answer.structured_content is not None
    assert len(answer.structured_content["data"]) == count
    size = dimensions * (16 / 3 if encoding_format == "base64" else 12.4)
    assert count * size > 0.9e6, "hardly less than there is room for"


async def test_more_vectors_fit_where_shorter_ones_are_asked_for() -> None:
    embedder = HashEmbedder(card=ModelCard(id="test/hash", dimensions=4096, matryoshka=(64,)))
    with served(service_of(embedder)) as url, anyio.fail_after(SECONDS):
        async with Client(f"{url}/mcp") as client:
            texts = [f"text {index}" for index in range(200)]
            whole = await call(client, "create_embedding", input=texts)
            cut = await call(client, "create_embedding", input=texts, dimensions=64)

    assert whole.is_error
    assert not cut.is_error


async def test_where_the_length_of_vectors_is_not_known_before_too_many_are_refused_all_the_same() -> None:
    embedder = HashEmbedder(card=ModelCard(id="test/hash", dimensions=8))
    with served(service_of(embedder), max_mcp_answer_bytes=500) as url, anyio.fail_after(SECONDS):
        async with Client(f"{url}/mcp") as client:
            embedder.card = ModelCard(id="test/hash")
            refused = await call(client, "create_embedding", input=["a", "b", "c", "d", "e"])
            alone = await call(client, "create_embedding", input="a")

    assert "send at most 2 texts at once" in words(refused)
    assert not alone.is_error


async def test_a_ranking_that_is_too_long_is_refused_by_its_top_k() -> None:
    with served(service_of(), max_mcp_answer_bytes=1000) as url, anyio.fail_after(SECONDS):
        async with Client(f"{url}/mcp") as client:
            texts = [f"text {index}" for index in range(100)]
            refused = await call(client, "search", query="a", input=texts, top_k=100)
            answer = await call(client, "search", query="a", input=texts, top_k=10)

    assert "one over MCP may have 1,000 here: ask for less by `top_k`" in words(refused)
    assert not answer.is_error


async def test_answers_that_do_not_travel_over_http_may_be_of_any_size() -> None:
    server = build_mcp_server(service_of(), Limits.of(Settings(max_mcp_answer_bytes=1)))
    with anyio.fail_after(SECONDS):
        async with Client(server) as client:
            assert not (await call(client, "create_embedding", input=["a", "b"])).is_error

"""MCP responses over HTTP stay within the event size that clients accept."""

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
from tests.support import HashEmbedder, http_server, service_of

pytestmark = pytest.mark.anyio

SECONDS = 30


async def call(client: Client, tool: str, **arguments: Any) -> CallToolResult:
    """Call a tool as a client that asks for progress, so that the response is always a server-sent event."""

    async def ignore(progress: float, total: float | None, message: str | None) -> None:
        pass

    return await client.call_tool(tool, {"model": "default", **arguments}, progress_callback=ignore)


def text_of(result: CallToolResult) -> str:
    return " ".join(block.text for block in result.content if block.type == "text")


@pytest.mark.parametrize("mode", ["legacy", "auto"])
@pytest.mark.parametrize("encoding_format", ["float", "base64"])
@pytest.mark.parametrize("dimensions", [384, 4096])
async def test_the_number_of_vectors_named_in_the_refusal_reaches_the_client(
    mode: str, encoding_format: str, dimensions: int
) -> None:
    embedder = HashEmbedder(card=ModelCard(id="test/hash", dimensions=dimensions))
    with http_server(service_of(embedder)) as url, anyio.fail_after(SECONDS):
        async with Client(f"{url}/mcp", mode=mode) as client:
            texts = [f"text {index}" for index in range(600)]
            refused = await call(client, "create_embedding", input=texts, encoding_format=encoding_format)
            assert not embedder.batches, "vectors were computed in vain"
            fitting = re.search(r"at most ([\d,]+) texts", text_of(refused))
            assert refused.is_error
            assert fitting, text_of(refused)
            count = int(fitting[1].replace(",", ""))
            answer = await call(client, "create_embedding", input=texts[:count], encoding_format=encoding_format)

    assert answer.structured_content is not None
    assert len(answer.structured_content["data"]) == count
    size = dimensions * (16 / 3 if encoding_format == "base64" else 12.4)
    assert count * size > 0.9e6, "the named number is far below the limit"


async def test_more_vectors_fit_if_they_are_shorter() -> None:
    embedder = HashEmbedder(card=ModelCard(id="test/hash", dimensions=4096, matryoshka=(64,)))
    with http_server(service_of(embedder)) as url, anyio.fail_after(SECONDS):
        async with Client(f"{url}/mcp") as client:
            texts = [f"text {index}" for index in range(200)]
            full = await call(client, "create_embedding", input=texts)
            shortened = await call(client, "create_embedding", input=texts, dimensions=64)

    assert full.is_error
    assert not shortened.is_error


async def test_too_many_vectors_are_refused_even_if_their_length_is_not_known_in_advance() -> None:
    embedder = HashEmbedder(card=ModelCard(id="test/hash", dimensions=8))
    with http_server(service_of(embedder), max_mcp_response_bytes=500) as url, anyio.fail_after(SECONDS):
        async with Client(f"{url}/mcp") as client:
            embedder.card = ModelCard(id="test/hash")
            refused = await call(client, "create_embedding", input=["a", "b", "c", "d", "e"])
            single = await call(client, "create_embedding", input="a")

    assert "send at most 2 texts at once" in text_of(refused)
    assert not single.is_error


async def test_the_refusal_of_a_ranking_that_is_too_long_names_top_k() -> None:
    with http_server(service_of(), max_mcp_response_bytes=1000) as url, anyio.fail_after(SECONDS):
        async with Client(f"{url}/mcp") as client:
            texts = [f"text {index}" for index in range(100)]
            refused = await call(client, "search", query="a", input=texts, top_k=100)
            answer = await call(client, "search", query="a", input=texts, top_k=10)

    assert "the limit over MCP is 1,000 bytes: ask for fewer scores with `top_k`" in text_of(refused)
    assert not answer.is_error


async def test_responses_outside_http_may_have_any_size() -> None:
    server = build_mcp_server(service_of(), Limits.from_settings(Settings(max_mcp_response_bytes=1)))
    with anyio.fail_after(SECONDS):
        async with Client(server) as client:
            assert not (await call(client, "create_embedding", input=["a", "b"])).is_error

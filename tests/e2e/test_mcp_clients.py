"""MCP clients with the installed server: a real process, over stdio and HTTP, in both protocol eras."""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
import pytest
from mcp import Client, StdioServerParameters, stdio_client

from embeddings_mcp.models import DEFAULT_MODEL
from tests.e2e.waiting_server import WAIT
from tests.support import COMMAND, ENVELOPE, ERAS, ROOT, START_SECONDS, ask, server_process, stdio_process

pytestmark = pytest.mark.anyio

SNAPSHOT = ROOT / "tests" / "faces" / "tools.json"


@pytest.fixture(scope="module")
def http_address() -> Iterator[str]:
    """MCP address of a server that runs for this module."""
    with server_process(COMMAND, "serve", "--transport", "http", "--port", "0") as (_process, url):
        yield f"{url}/mcp"


@pytest.fixture(params=sorted(ERAS))
def era(request: pytest.FixtureRequest) -> str:
    version: str = request.param
    return version


@pytest.fixture(params=["stdio", "http"])
def server(request: pytest.FixtureRequest) -> StdioServerParameters | str:
    if request.param == "stdio":
        return StdioServerParameters(command=COMMAND, args=["serve"])
    address: str = request.getfixturevalue("http_address")
    return address


@asynccontextmanager
async def connected(server: Any, era: str) -> AsyncIterator[Client]:
    with anyio.fail_after(START_SECONDS):
        async with Client(server, mode=ERAS[era]) as client:
            assert client.protocol_version == era
            yield client


async def answer(client: Client, tool: str, **arguments: Any) -> Any:
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    return result.structured_content


# --- The real model --------------------------------------------------------------------------------------------------


async def test_every_client_sees_the_same_tools(server: StdioServerParameters | str, era: str) -> None:
    async with connected(server, era) as client:
        listed = (await client.list_tools()).tools
    tools = [tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in listed]
    assert tools == json.loads(SNAPSHOT.read_text())


async def test_every_client_gets_real_vectors_and_scores(server: StdioServerParameters | str, era: str) -> None:
    texts = ["A kitten sleeps on the sofa.", "Stock prices fell sharply on Monday.", '["a cat", "is napping"]']
    async with connected(server, era) as client:
        listed = await answer(client, "list_models")
        floats = await answer(client, "create_embedding", model=DEFAULT_MODEL, input=texts)
        packed = await answer(client, "create_embedding", model="default", input=texts, encoding_format="base64")
        matrix = await answer(client, "similarity", model="default", input=texts)
        found = await answer(client, "search", query="Where is the cat?", input=texts, top_k=2)
    assert [(entry["id"], entry["default"]) for entry in listed["models"]] == [(DEFAULT_MODEL, True)]

    vectors = np.array([entry["embedding"] for entry in floats["data"]], np.float32)
    assert vectors.shape == (3, 384)
    assert floats["model"] == DEFAULT_MODEL
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for entry, vector in zip(packed["data"], vectors, strict=True):
        np.testing.assert_allclose(np.frombuffer(base64.b64decode(entry["embedding"]), "<f4"), vector, atol=1e-6)

    np.testing.assert_allclose(matrix["scores"], vectors @ vectors.T, atol=1e-4)
    assert {hit["index"] for hit in found["results"]} == {0, 2}


async def test_mistakes_are_explained(http_address: str, era: str) -> None:
    async with connected(http_address, era) as client:
        for arguments, message in (
            ({"model": "default", "input": ["a", ""]}, "`input[1]` must not be an empty string"),
            ({"model": "default", "input": "a", "dimensions": 128}, "not a Matryoshka model"),
            ({"model": "default", "input": ["a", "word " * 300]}, "`input[1]` has 302 tokens, and the model takes 256"),
            ({"model": "gone", "input": "a"}, f"served are: {DEFAULT_MODEL}"),
        ):
            result = await client.call_tool("create_embedding", arguments)
            assert result.is_error
            assert message in str(result.content)


async def test_other_requests_are_answered_while_the_model_loads(era: str) -> None:
    order: list[str] = []
    async with connected(StdioServerParameters(command=COMMAND, args=["serve"]), era) as client:

        async def embed() -> None:
            await answer(client, "create_embedding", model="default", input="a")
            order.append("vector")

        async with anyio.create_task_group() as calls:
            calls.start_soon(embed)
            for _ in range(3):
                await client.call_tool("list_models", {})
                order.append("models")
    assert order == ["models", "models", "models", "vector"]


# --- Progress, cancellation and stdout -------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["stdio", "http"])
async def test_progress_arrives_before_the_response(transport: str, era: str) -> None:
    reports: list[tuple[float, float | None]] = []

    async def report(progress: float, total: float | None, message: str | None) -> None:
        reports.append((progress, total))

    async with waiting_server(transport) as (server, _), connected(server, era) as client:
        arguments = {"model": "default", "input": [f"text {number}" for number in range(20)]}
        await client.call_tool("similarity", arguments, progress_callback=report)
    assert reports == [(done, 20) for done in range(1, 21)]


@pytest.mark.parametrize("transport", ["stdio", "http"])
async def test_cancelling_a_call_cancels_only_its_own_embedding(transport: str, era: str) -> None:
    async with waiting_server(transport) as (server, expect), connected(server, era) as client:
        async with anyio.create_task_group() as calls:
            calls.start_soon(client.call_tool, "create_embedding", {"model": "default", "input": WAIT})
            await expect("began")
            calls.cancel_scope.cancel()
        await expect("cancelled")
        assert await answer(client, "create_embedding", model="default", input="a")


@asynccontextmanager
async def waiting_server(transport: str) -> AsyncIterator[tuple[Any, Callable[[str], Awaitable[str]]]]:
    """Run `tests.e2e.waiting_server`; yields what to connect to, and a function that waits for a pattern on stderr."""
    command = [sys.executable, "-m", "tests.e2e.waiting_server", transport]
    read_end, write_end = os.pipe()
    with os.fdopen(read_end) as stderr, os.fdopen(write_end, "w") as errlog, anyio.fail_after(START_SECONDS):

        async def expect(pattern: str) -> str:
            while True:
                line = await anyio.to_thread.run_sync(stderr.readline, abandon_on_cancel=True)
                if found := re.search(pattern, line):
                    return found.group()

        if transport == "stdio":
            parameters = StdioServerParameters(command=command[0], args=command[1:], cwd=ROOT)
            yield stdio_client(parameters, errlog), expect
            return
        async with await anyio.open_process(command, stdout=None, stderr=errlog, cwd=ROOT) as process:
            try:
                yield await expect(r"http://\S+/mcp"), expect
            finally:
                process.terminate()


def test_prints_of_libraries_do_not_reach_the_protocol_stream() -> None:
    arguments = {"model": "default", "input": "a"}
    out, err = _exchange(
        [sys.executable, "-m", "tests.e2e.waiting_server", "stdio"],
        "tools/call",
        {"name": "create_embedding", "arguments": arguments},
    )
    (line,) = out.splitlines()
    assert json.loads(line)["result"]["structuredContent"]["model"] == "test/hash"
    assert "and another writes to the descriptor" in err


# --- Start-up cost ---------------------------------------------------------------------------------------------------


def test_listing_the_tools_does_not_import_the_encoder() -> None:
    out, imports = _exchange([COMMAND, "serve"], "tools/list", PYTHONPROFILEIMPORTTIME="1")
    assert '"name":"create_embedding"' in out
    imported = {line.rpartition("|")[2].strip() for line in imports.splitlines() if line.startswith("import time:")}
    assert "embeddings_mcp.faces.mcp.server" in imported
    assert not imported & {"torch", "transformers", "tokenizers", "safetensors", "huggingface_hub"}


def _exchange(
    command: list[str], method: str, params: dict[str, Any] | None = None, **environment: str
) -> tuple[str, str]:
    """Start a server, send one request, and stop it; return its stdout and stderr."""
    request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {**(params or {}), "_meta": ENVELOPE}}
    with (
        tempfile.TemporaryFile("w+") as errlog,
        stdio_process(*command, stderr=errlog, env={**os.environ, **environment}) as process,
    ):
        out = ask(process, request)  # before closing stdin, when a server may abandon requests in progress
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        out += process.stdout.read()
        process.wait()
        errlog.seek(0)
        err = errlog.read()
    assert process.returncode == 0, err
    return out, err

"""The installed server with endpoints: real processes, third-party clients, and a stand-in HTTP server as the NIM."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import anyio.to_thread
import httpx
import httpx2
import numpy as np
import openai
import pytest
from anyio.abc import ByteReceiveStream, Process
from langchain_nvidia_ai_endpoints import NVIDIAEmbeddings
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError

from embeddings_mcp.caller import CALLER_KEY_HEADER
from embeddings_mcp.embedders.nim import HOSTED_DEFAULT_MODEL
from embeddings_mcp.models import DEFAULT_MODEL
from tests.nim.standin import ASYMMETRIC, SYMMETRIC, Reply, StandIn, answering, cut, held, stand_in
from tests.support import COMMAND, ROOT, START_SECONDS, HashEmbedder

pytestmark = pytest.mark.anyio

TEXTS = ["A cat is asleep.", '["a","b"]', "null", "A cat is asleep."]
KEY, CALLER_KEY = "nvapi-0123456789-of-the-server", "nvapi-9876543210-of-alice"


@dataclass
class Served:
    """A server process.

    Attributes:
        url: base URL, without a path.
        output: everything it has written to stdout and stderr so far.
    """

    process: Process
    url: str = ""
    output: bytearray = field(default_factory=bytearray)

    async def stop(self) -> int:
        """Terminate the process if it is still running, and wait for it to exit."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        return await self.process.wait()


@asynccontextmanager
async def serve(*flags: str, command: Sequence[str] = (COMMAND,), **environment: str) -> AsyncIterator[Served]:
    """Run ``embeddings-mcp serve`` over HTTP, and wait until it is listening."""
    command = [*command, "serve", "--transport", "http", "--port", "0", *flags]
    process = await anyio.open_process(command, cwd=ROOT, env={**os.environ, **environment})
    served, listening = Served(process), anyio.Event()

    async def collect(stream: ByteReceiveStream | None) -> None:
        assert stream is not None
        async for chunk in stream:
            served.output.extend(chunk)
            if found := re.search(rb"serving MCP at (\S+)/mcp and REST", served.output):
                served.url = found[1].decode()
                listening.set()

    async with process, anyio.create_task_group() as group:
        group.start_soon(collect, process.stdout)
        group.start_soon(collect, process.stderr)
        try:
            with anyio.fail_after(START_SECONDS):
                await listening.wait()
                yield served
                await served.stop()
        finally:
            if process.returncode is None:
                process.kill()


def vectors_of(answer: openai.types.CreateEmbeddingResponse) -> np.ndarray[Any, np.dtype[np.float32]]:
    assert [row.index for row in answer.data] == list(range(len(answer.data)))
    return np.array([row.embedding for row in answer.data], dtype=np.float32)


def expected(texts: Sequence[str], input_type: Any = None) -> np.ndarray[Any, np.dtype[np.float32]]:
    model = HashEmbedder(SYMMETRIC if input_type is None else ASYMMETRIC)
    return np.stack([model.vector(text, input_type) for text in texts])


@asynccontextmanager
async def openai_at(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="not needed", max_retries=0) as client:
        yield client


# --- Third-party clients with both kinds of models -------------------------------------------------------------------


async def test_one_server_serves_local_models_and_those_of_an_endpoint() -> None:
    async with stand_in() as standing, serve("--endpoint", standing.url) as served:
        async with openai_at(served.url) as client:
            listed = [model.id async for model in client.models.list()]
            assert listed == [DEFAULT_MODEL, ASYMMETRIC.id, SYMMETRIC.id]
            local = await client.embeddings.create(model="default", input=TEXTS)
            remote = await client.embeddings.create(model=SYMMETRIC.id, input=TEXTS)
            floats = await client.embeddings.create(model=SYMMETRIC.id, input=TEXTS, encoding_format="float")
            query = await client.embeddings.create(model=f"{ASYMMETRIC.id}-query", input=TEXTS)
            assert (local.model, vectors_of(local).shape) == (DEFAULT_MODEL, (4, 384))
            np.testing.assert_array_equal(vectors_of(remote), expected(TEXTS))
            np.testing.assert_array_equal(vectors_of(floats), expected(TEXTS))
            np.testing.assert_array_equal(vectors_of(query), expected(TEXTS, "query"))
            assert remote.model == SYMMETRIC.id
            assert remote.usage.prompt_tokens >= len(TEXTS)
            with pytest.raises(openai.NotFoundError, match=rf"served are: {DEFAULT_MODEL}, {ASYMMETRIC.id}"):
                await client.embeddings.create(model="gpt-4", input=TEXTS)

        def by_langchain(model: str) -> tuple[list[list[float]], list[float]]:
            embeddings = NVIDIAEmbeddings(base_url=f"{served.url}/v1", model=model, usage_telemetry_enabled=False)
            assert {entry.id for entry in embeddings.available_models} == set(listed)
            return embeddings.embed_documents(TEXTS), embeddings.embed_query(TEXTS[0])

        passages, question = await anyio.to_thread.run_sync(by_langchain, ASYMMETRIC.id)
        np.testing.assert_array_equal(np.array(passages, np.float32), expected(TEXTS, "passage"))
        np.testing.assert_array_equal(np.array(question, np.float32), expected(TEXTS[:1], "query")[0])
        passages, question = await anyio.to_thread.run_sync(by_langchain, DEFAULT_MODEL)
        np.testing.assert_allclose(np.array(passages, np.float32), vectors_of(local), atol=1e-5)
        np.testing.assert_allclose(np.array(question, np.float32), vectors_of(local)[0], atol=1e-5)


@pytest.mark.parametrize("transport", ["stdio", "http"])
async def test_an_agent_finds_and_uses_an_endpoints_models(transport: str) -> None:
    async with stand_in() as standing:
        if transport == "stdio":
            await use_tools(
                StdioServerParameters(command=COMMAND, args=["serve", "--endpoint", standing.url]), standing
            )
        else:
            async with serve("--endpoint", standing.url) as served:
                await use_tools(f"{served.url}/mcp", standing)


async def cards(client: Client) -> list[str]:
    """Return the models whose cards are listed."""
    listed = (await client.list_resources()).resources
    return [resource.name for resource in listed if str(resource.uri).startswith("embeddings://models/")]


async def use_tools(server: Any, standing: StandIn) -> None:
    with anyio.fail_after(START_SECONDS):
        async with Client(server) as client:
            tools = (await client.list_tools()).tools
            assert all(tool.annotations is not None and tool.annotations.open_world_hint for tool in tools)
            assert await cards(client) == [DEFAULT_MODEL]
            assert not standing.seen  # the endpoint is contacted only when needed
            models = (await client.call_tool("list_models", {})).structured_content
            assert models is not None
            assert [(entry["id"], entry["served_from"]) for entry in models["models"]] == [
                (DEFAULT_MODEL, "local"),
                (ASYMMETRIC.id, f"{standing.url}/v1"),
                (SYMMETRIC.id, f"{standing.url}/v1"),
            ]
            assert await cards(client) == [DEFAULT_MODEL, ASYMMETRIC.id, SYMMETRIC.id]
            found = await client.call_tool("search", {"model": ASYMMETRIC.id, "query": "b", "input": ["a", "b", "c"]})
            assert found.structured_content is not None
            assert {tuple(seen.json["input"]): seen.json["input_type"] for seen in standing.seen[1:]} == {
                ("b",): "query",
                ("a", "b", "c"): "passage",
            }
            refused = await client.call_tool("create_embedding", {"model": ASYMMETRIC.id, "input": "a " * 100})
            assert refused.is_error
            assert f"`input_type` is not as {ASYMMETRIC.id} wants it: 'query' for what is searched" in str(
                refused.content
            )


async def test_the_encoder_is_not_imported_if_an_endpoint_has_the_default_model() -> None:
    async with stand_in() as standing:
        flags = ("--endpoint", standing.url, "--default-model", SYMMETRIC.id)
        async with serve(*flags, PYTHONPROFILEIMPORTTIME="1") as served:
            assert not standing.seen
            async with openai_at(served.url) as client, httpx.AsyncClient(base_url=served.url) as http:
                answer = await client.embeddings.create(model="default", input=TEXTS)
                ready = await http.get("/v1/health/ready")
                standing.route_faults = {"/v1/health/ready": answering(503, {"error": "loading"})}
                loading = await http.get("/v1/health/ready")
            np.testing.assert_array_equal(vectors_of(answer), expected(TEXTS))
            assert (ready.status_code, ready.json()["ready"]) == (200, True)
            assert (loading.status_code, loading.json()["message"]) == (503, "not ready: upstream_unavailable")
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", served.output.decode(), re.MULTILINE))
    assert "httpx" in imported
    assert not imported & {"torch", "transformers", "tokenizers", "safetensors", "huggingface_hub"}


async def test_without_the_encoder_packages_the_endpoint_provides_the_default_model() -> None:
    without_local = (sys.executable, "-m", "tests.e2e.without_local")
    model = replace(SYMMETRIC, id=DEFAULT_MODEL, dimensions=384)
    async with (
        stand_in(models={model.id: model}) as standing,
        serve("--endpoint", standing.url, command=without_local) as served,
        openai_at(served.url) as client,
    ):
        answer = await client.embeddings.create(model="default", input="a text")
        assert [entry.id for entry in (await client.models.list()).data] == [DEFAULT_MODEL]
    np.testing.assert_array_equal(vectors_of(answer)[0], HashEmbedder(model).vector("a text"))


# --- Cancellation and shutdown ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_cancelling_a_tool_call_closes_the_connection_to_the_endpoint(mode: str) -> None:
    faults = itertools.repeat(held(anyio.Event()))
    async with (
        stand_in(faults=faults) as standing,
        serve("--endpoint", standing.url) as served,
        Client(f"{served.url}/mcp", mode=mode) as client,
    ):
        async with anyio.create_task_group() as calls:
            calls.start_soon(client.call_tool, "create_embedding", {"model": SYMMETRIC.id, "input": TEXTS})
            await standing.received(2)
            calls.cancel_scope.cancel()
        await standing.client_disconnected.wait()


async def test_requests_in_flight_at_shutdown_are_answered() -> None:
    gate = anyio.Event()
    async with stand_in(faults=itertools.repeat(held(gate))) as standing, serve("--endpoint", standing.url) as served:
        async with openai_at(served.url) as client, anyio.create_task_group() as group:
            answers: list[openai.types.CreateEmbeddingResponse] = []

            async def ask() -> None:
                answers.append(await client.embeddings.create(model=SYMMETRIC.id, input=TEXTS))

            group.start_soon(ask)
            await standing.received(2)
            served.process.send_signal(signal.SIGTERM)
            await refusing_connections(served.url)
            gate.set()
        np.testing.assert_array_equal(vectors_of(answers[0]), expected(TEXTS))
        assert await served.process.wait() == -signal.SIGTERM
    assert b"Traceback" not in served.output


async def test_requests_that_outlast_the_shutdown_timeout_fail_cleanly() -> None:
    faults = itertools.repeat(held(anyio.Event()))
    async with stand_in(faults=faults) as standing, serve("--endpoint", standing.url) as served:
        async with (
            httpx.AsyncClient(base_url=served.url, timeout=START_SECONDS) as http,
            anyio.create_task_group() as group,
        ):
            answers: list[httpx.Response] = []
            results: list[Any] = []

            async def ask() -> None:
                answers.append(await http.post("/v1/embeddings", json={"model": SYMMETRIC.id, "input": "by REST"}))

            async def call() -> None:
                async with Client(f"{served.url}/mcp") as client:
                    results.append(await client.call_tool("similarity", {"model": SYMMETRIC.id, "input": TEXTS}))

            group.start_soon(ask)
            group.start_soon(call)
            await standing.received(3)
            served.process.send_signal(signal.SIGTERM)
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "server_stopped")
        assert results[0].is_error
        assert "the server is shutting down" in str(results[0].content)
        await standing.client_disconnected.wait()
        await served.process.wait()
    assert b"Traceback" not in served.output


async def refusing_connections(url: str) -> None:
    """Wait until the server at `url` no longer listens."""
    address = httpx.URL(url)
    assert address.port is not None
    while True:
        try:
            async with await anyio.connect_tcp(address.host, address.port):
                await anyio.lowlevel.checkpoint()
        except OSError:
            return


# --- Keys ------------------------------------------------------------------------------------------------------------


async def test_keys_appear_in_no_response_or_output_however_the_endpoint_fails() -> None:
    outputs: list[str] = []

    def echo_key(reply: Reply) -> Reply:
        return answering(400, {"error": f"what is {standing.seen[-1].headers['authorization']}?"})(reply)

    failures = [
        echo_key,
        answering(401, b"no"),
        answering(402, b"pay"),
        answering(403, {"detail": KEY}),
        answering(410, b""),
        answering(307, b"", Location=f"https://elsewhere.example/?key={KEY}"),
        answering(503, b"", Retry_After="10800"),
        cut,
        None,
    ]
    async with stand_in(faults=itertools.cycle(failures)) as standing:
        failing = {"url": standing.url, "api_key_env": "NIM_KEY", "caller_keys": True}
        unreachable = {"url": "http://127.0.0.1:1", "api_key": KEY, "models": ["test/unreachable"]}
        endpoints = json.dumps([failing, unreachable])
        async with serve(EMBEDDINGS_MCP_ENDPOINTS=endpoints, NIM_KEY=KEY, EMBEDDINGS_MCP_API_KEY="for-us") as served:
            auth = {"Authorization": "Bearer for-us"}
            async with httpx.AsyncClient(base_url=served.url, headers=auth, timeout=START_SECONDS) as http:

                async def ask(model: str, **headers: str) -> None:
                    # A new text each time, since cached ones would not be requested again.
                    request = {"model": model, "input": f"text {len(outputs)}"}
                    answer = await http.post("/v1/embeddings", json=request, headers=headers)
                    outputs.append(f"{answer.headers} {answer.text}")

                for path in ("/v1/models", "/openapi.json", "/v1/health/ready"):
                    outputs.append((await http.get(path)).text)  # noqa: PERF401
                for _ in failures:
                    await ask(SYMMETRIC.id)
                    await ask(SYMMETRIC.id, **{CALLER_KEY_HEADER: CALLER_KEY})
                await ask("test/unreachable")
            async with (
                httpx2.AsyncClient(headers={**auth, CALLER_KEY_HEADER: CALLER_KEY}) as mcp_http,
                Client(streamable_http_client(f"{served.url}/mcp", http_client=mcp_http)) as client,
            ):
                outputs += [repr(await client.list_tools()), repr(await client.call_tool("list_models", {}))]
                for number in range(len(failures)):
                    compare = {"model": SYMMETRIC.id, "input": ["a", f"tool {number}"]}
                    outputs.append(repr(await client.call_tool("similarity", compare)))
        assert {f"Bearer {KEY}", f"Bearer {CALLER_KEY}"} == {seen.headers["authorization"] for seen in standing.seen}
    outputs.append(served.output.decode())
    assert sum("error" in text for text in outputs) > 15
    assert sum("***" in text for text in outputs) > 2
    assert not [text for text in outputs for key in (KEY, CALLER_KEY) if key in text]
    assert "Traceback" not in outputs[-1]


@pytest.mark.parametrize(
    ("endpoint", "problem"),
    [
        ("http://nim.example", "must be reached over https"),
        (f"https://user:{KEY}@nim.example", "hold neither user name nor password"),
        ('{"url": "http://localhost", "api_key_env": "NOT_SET"}', "the environment variable NOT_SET, which is not set"),
        (
            f'{{"url": "http://localhost", "api-key": "{KEY}"}}',
            "--endpoint 0: an endpoint has no field 'api-key'; its fields are url, ",
        ),
        (f'{{"url": "http://localhost", "api_key": "{KEY}"', "the setting --endpoint 0: must be JSON"),
    ],
)
def test_an_invalid_endpoint_is_reported_in_one_line_without_its_key(endpoint: str, problem: str) -> None:
    completed = run("serve", "--endpoint", endpoint)
    assert (completed.returncode, completed.stdout) == (1, "")
    (line,) = completed.stderr.splitlines()
    assert problem in line
    assert KEY not in line


# --- The hosted API --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def refusing_proxy() -> AsyncIterator[tuple[str, list[str]]]:
    """Run a proxy that refuses everything; provides its address and the list of requests it received."""
    requested: list[str] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requested.append((await reader.readline()).decode().strip())
        writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        yield "http://{}:{}".format(*server.sockets[0].getsockname()), requested


async def test_the_hosted_api_is_listed_with_its_key_but_not_contacted_before_it_is_needed() -> None:
    connect = "CONNECT integrate.api.nvidia.com:443 HTTP/1.1"
    async with refusing_proxy() as (proxy, requested):
        env = {**os.environ, "NVIDIA_API_KEY": KEY, "HTTPS_PROXY": proxy, "ALL_PROXY": proxy}
        server = StdioServerParameters(
            command=COMMAND, args=["serve", "--default-model", HOSTED_DEFAULT_MODEL], env=env
        )
        with anyio.fail_after(START_SECONDS):
            async with Client(server) as client:
                assert HOSTED_DEFAULT_MODEL in (client.instructions or "")
                await client.list_tools()
                assert (await cards(client))[1:] == [HOSTED_DEFAULT_MODEL, "nvidia/llama-nemotron-embed-vl-1b-v2"]
                assert not requested
                models = (await client.call_tool("list_models", {})).structured_content
                assert models is not None
                hosted = models["models"][1]
                assert (hosted["id"], hosted["default"], hosted["max_tokens"]) == (HOSTED_DEFAULT_MODEL, True, 4096)
                assert hosted["served_from"] == "https://integrate.api.nvidia.com/v1"
                assert set(requested) == {connect}
                failed = await client.call_tool("create_embedding", {"model": "default", "input": "a text"})
                assert failed.is_error
                assert "cannot connect to the endpoint https://integrate.api.nvidia.com/v1" in str(failed.content)
                assert KEY not in str(failed.content)
                with pytest.raises(MCPError):
                    await client.read_resource("embeddings://models/nvidia/unknown")
        assert set(requested) == {connect}


# --- The command line ------------------------------------------------------------------------------------------------


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=START_SECONDS,
        check=False,
        env={**os.environ, **environment},
    )


async def test_the_command_line_uses_a_model_of_an_endpoint() -> None:
    async with stand_in(models={SYMMETRIC.id: SYMMETRIC}) as standing:

        async def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
            return await anyio.to_thread.run_sync(lambda: run(*arguments, "--endpoint", standing.url))

        for chosen in ([], *(["--model", name] for name in (SYMMETRIC.id, f"{SYMMETRIC.id}-query", "default"))):
            answer = await ask("embed", "--json", *chosen, *TEXTS)
            assert answer.returncode == 0, answer.stderr
            rows = [row["embedding"] for row in json.loads(answer.stdout)["data"]]
            np.testing.assert_array_equal(np.array(rows, np.float32), expected(TEXTS))
        found = await ask("search", "--json", "b", "a", "b", "c")
        assert json.loads(found.stdout)["results"][0] == {"index": 1, "score": 1.0}
        listed = await ask("models", "--json")
        assert [entry["id"] for entry in json.loads(listed.stdout)["models"]] == [DEFAULT_MODEL, SYMMETRIC.id]
        unknown = await ask("embed", "--model", "gone", "a text")
        assert (unknown.returncode, unknown.stderr) == (
            1,
            f"embeddings-mcp: `model` 'gone' is not served here; served are: {SYMMETRIC.id} (or `default`)\n",
        )
        standing.models = {card.id: card for card in (ASYMMETRIC, SYMMETRIC)}
        several = await ask("embed", "a text")
        assert f"say which model with --model: the endpoint has {ASYMMETRIC.id}, {SYMMETRIC.id}" in several.stderr

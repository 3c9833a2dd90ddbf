"""The HTTP application as a whole: REST and MCP, their lifespan, and the server that runs it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import anyio
import httpx
import httpx2
import numpy as np
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from embeddings_mcp.errors import InvalidSetting
from embeddings_mcp.faces.http.app import serve_http
from embeddings_mcp.faces.mcp.server import build_mcp_server
from embeddings_mcp.publish.openapi import openapi_document
from embeddings_mcp.settings import Settings
from tests.e2e.waiting_server import WAIT
from tests.support import SECONDS, HashEmbedder, client_of, http_server, server_process, service_of

SCRIPT = """
from embeddings_mcp.faces.http.app import serve_http
from embeddings_mcp.faces.mcp.server import build_mcp_server
from embeddings_mcp.settings import Settings
from tests.support import HashEmbedder, service_of

class Closing(HashEmbedder):
    async def aclose(self):
        print("closed", flush=True)

service = service_of(Closing())
serve_http(service, build_mcp_server(service), Settings(port=0))
"""
SERVER = (sys.executable, "-c", SCRIPT)


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_rest_and_mcp_give_the_same_vector(mode: str) -> None:
    with http_server(service_of(), api_key="key") as url:
        async with httpx2.AsyncClient(headers={"authorization": "Bearer key"}) as http:
            request = {"model": "default", "input": "one"}
            rest = (await http.post(f"{url}/v1/embeddings", json=request)).json()
            with anyio.fail_after(10):
                async with Client(streamable_http_client(f"{url}/mcp", http_client=http), mode=mode) as client:
                    tool = (await client.call_tool("create_embedding", request)).structured_content

    assert tool == rest
    assert np.array_equal(np.array(rest["data"][0]["embedding"], dtype=np.float32), HashEmbedder().vector("one"))


def test_the_openapi_document_is_served() -> None:
    with client_of() as client:
        assert client.get("/openapi.json").json() == openapi_document()


def test_the_embedders_are_closed_when_the_server_stops() -> None:
    embedder = HashEmbedder()
    with client_of(embedder) as client:
        assert client.get("/v1/health/live").status_code == 200
        assert not embedder.closed

    assert embedder.closed


# --- The server ------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_sigterm_closes_sessions_and_embedders(mode: str) -> None:
    with server_process(*SERVER) as (process, url):
        with anyio.fail_after(20):
            async with Client(f"{url}/mcp", mode=mode) as client:
                assert (await client.list_tools()).tools
                process.send_signal(signal.SIGTERM)
                await anyio.to_thread.run_sync(process.wait, 20)  # a cancel scope does not interrupt a thread

        assert process.stdout is not None
        assert process.stdout.read() == "closed\n"
        assert process.returncode == -signal.SIGTERM


def test_ctrl_c_ends_the_server_without_a_traceback() -> None:
    with server_process(*SERVER) as (process, _url):
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=10)

    assert (stdout, stderr, process.returncode) == ("closed\n", "", 0)


def test_a_second_ctrl_c_ends_the_server_at_once() -> None:
    with (
        server_process(sys.executable, "-m", "tests.e2e.waiting_server", "http") as (process, url),
        ThreadPoolExecutor(1) as client,
    ):
        request = {"model": "default", "input": WAIT}
        waiting = client.submit(httpx.post, f"{url}/v1/embeddings", json=request, timeout=SECONDS)
        assert process.stderr is not None
        assert process.stderr.readline() == "began\n"
        process.send_signal(signal.SIGINT)
        wait_until_refusing(url)
        process.send_signal(signal.SIGINT)
        assert isinstance(waiting.exception(SECONDS), httpx.RemoteProtocolError)
        _, stderr = process.communicate(timeout=SECONDS)

    assert (stderr, process.returncode) == ("", -signal.SIGINT)


def wait_until_refusing(url: str) -> None:
    """Wait until the server at `url` no longer listens."""
    address = httpx.URL(url)
    deadline = time.monotonic() + SECONDS
    with contextlib.suppress(ConnectionRefusedError):
        while time.monotonic() < deadline:
            socket.create_connection((address.host, address.port or 0), timeout=SECONDS).close()
        raise AssertionError("the server still listens")


def test_the_event_loop_is_asyncios_own_even_where_uvloop_is_installed() -> None:
    fake_uvloop = "import sys, types; sys.modules['uvloop'] = types.ModuleType('uvloop')"
    with server_process(sys.executable, "-c", fake_uvloop + SCRIPT) as (_, url):
        assert httpx.get(f"{url}/v1/health/live").status_code == 200


def test_answers_are_not_delayed_by_nagles_algorithm() -> None:
    """It would hold the body back until the client's delayed ACK, 40 ms later."""
    report_option = """
import socket
from embeddings_mcp.faces.http.connection import Connection

class Reporting(Connection):
    def connection_made(self, transport):
        super().connection_made(transport)
        option = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        print("at once" if option else "delayed", flush=True)

import embeddings_mcp.faces.http.app
embeddings_mcp.faces.http.app.Connection = Reporting
"""
    with server_process(sys.executable, "-c", report_option + SCRIPT) as (process, url):
        assert httpx.get(f"{url}/v1/health/live").status_code == 200
        process.send_signal(signal.SIGINT)
        stdout, _ = process.communicate(timeout=10)

    assert stdout == "at once\nclosed\n"


def test_the_error_for_a_port_that_is_taken_says_what_to_do() -> None:
    service = service_of()
    with http_server(service) as url:
        port = httpx.URL(url).port or 0
        with pytest.raises(InvalidSetting, match=f"127.0.0.1 port {port}: Address already in use; choose another"):
            serve_http(service, build_mcp_server(service), Settings(port=port))


def test_a_client_cannot_forge_its_address() -> None:
    with server_process("env", "EMBEDDINGS_MCP_REQUESTS_PER_MINUTE=1", *SERVER) as (_process, url):
        answers = [httpx.get(f"{url}/v1/models", headers={"x-forwarded-for": f"10.0.0.{n}"}) for n in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]


# --- Many connections ------------------------------------------------------------------------------------------------

MAX_FILES = 64
"""Limit of open files of a server."""

needs_ulimit = pytest.mark.skipif(os.name != "posix", reason="only POSIX systems have a limit of open files")


def with_few_files(option: str) -> tuple[str, ...]:
    """The command that serves HTTP under a limit of open files: a soft one (``-Sn``), or also a hard one (``-n``)."""
    serve = (sys.executable, "-m", "embeddings_mcp", "serve", "--transport", "http", "--port", "0", "--load", "lazy")
    return ("sh", "-c", f'ulimit {option} {MAX_FILES} && exec "$@"', "sh", *serve)


@contextmanager
def many_idle_connections(url: str) -> Iterator[None]:
    """More idle connections than the limit of open files allows."""
    address = httpx.URL(url)
    with ExitStack() as clients:
        for _ in range(2 * MAX_FILES):
            clients.enter_context(socket.create_connection((address.host, address.port or 0), timeout=10))
        yield


@needs_ulimit
def test_a_server_raises_its_soft_limit_of_open_files() -> None:
    with server_process(*with_few_files("-Sn")) as (_process, url), many_idle_connections(url):
        assert httpx.get(f"{url}/v1/health/live", timeout=10).status_code == 200


@needs_ulimit
def test_running_out_of_files_is_logged_once_and_waiting_connections_are_answered_later() -> None:
    with ThreadPoolExecutor(1) as reader, server_process(*with_few_files("-n")) as (process, url):
        assert process.stderr is not None
        with many_idle_connections(url):
            line = reader.submit(process.stderr.readline).result(10)
            assert "No connection can be accepted ([Errno 24] Too many open files)" in line
        assert httpx.get(f"{url}/v1/health/live", timeout=10).status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=10)[1] == ""

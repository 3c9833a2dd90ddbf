"""Starting and stopping: the server of mcp.json in a checkout, an installation without the encoder, Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import anyio
import pytest
from mcp import Client, StdioServerParameters

from embeddings_mcp.models import DEFAULT_MODEL
from tests.support import INITIALIZE, LIST_TOOLS, ROOT, START_SECONDS, ask, stdio_process

pytestmark = pytest.mark.anyio


async def test_mcp_json_starts_a_server_that_embeds() -> None:
    entry = json.loads((ROOT / "mcp.json").read_text())["mcpServers"]["embeddings"]
    if not (ROOT / ".venv" / "bin" / "embeddings-mcp").exists():
        pytest.skip("mcp.json starts the server in .venv, which does not exist here")
    assert entry["type"] == "stdio"
    server = StdioServerParameters(command=entry["command"], args=entry["args"], cwd=ROOT)
    with anyio.fail_after(START_SECONDS):
        async with Client(server) as client:
            tools = [tool.name for tool in (await client.list_tools()).tools]
            answer = await client.call_tool("similarity", {"model": "default", "input": ["a cat", "a cat"], "top_k": 1})
    assert tools == ["create_embedding", "similarity", "search", "list_models"]
    assert answer.structured_content is not None
    assert answer.structured_content["pairs"] == [{"input": 0, "other": 1, "score": 1.0}]


async def test_a_server_without_the_encoder_starts_and_says_what_is_missing_when_it_should_embed() -> None:
    server = StdioServerParameters(command=sys.executable, args=["-m", "tests.e2e.without_local", "serve"], cwd=ROOT)
    with anyio.fail_after(START_SECONDS):
        async with Client(server) as client:
            assert len((await client.list_tools()).tools) == 4
            listed = await client.call_tool("list_models", {})
            # Twice, since a failed import is retried: the package may have been installed in the meantime.
            refusals = [
                await client.call_tool("create_embedding", {"model": "default", "input": "a"}) for _ in range(2)
            ]
    assert listed.structured_content is not None
    assert [entry["id"] for entry in listed.structured_content["models"]] == [DEFAULT_MODEL]
    for refusal in refusals:
        assert refusal.is_error
        assert "pip install 'embeddings-mcp[local,bundled]'" in str(refusal.content)


def test_ctrl_c_stops_a_server_whose_host_is_silent() -> None:
    with stdio_process(sys.executable, "-m", "embeddings_mcp", "serve") as process:
        assert "serverInfo" in ask(process, INITIALIZE)
        process.send_signal(signal.SIGINT)
        assert process.wait(START_SECONDS) == -signal.SIGINT


def test_a_host_may_disconnect_while_the_model_is_loading() -> None:
    with stdio_process(sys.executable, "-m", "tests.e2e.endless_model", "serve", stderr=subprocess.PIPE) as process:
        assert '"tools"' in ask(process, LIST_TOOLS)
        assert process.stdin is not None
        assert process.stderr is not None
        assert process.stderr.readline() == "loading\n"
        process.stdin.close()
        assert process.wait(START_SECONDS) == 0
        assert process.stderr.read() == ""


def test_ctrl_c_stops_a_command_whose_model_is_loading() -> None:
    with stdio_process(
        sys.executable, "-m", "tests.e2e.endless_model", "embed", "a", stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(START_SECONDS) == 130
        assert process.stderr.read() == ""


def test_ctrl_c_during_imports_stops_a_command_without_a_traceback() -> None:
    script = """
import signal, sys

class Interrupting:
    def find_spec(self, name, path, target=None):
        if name == "typer":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from embeddings_mcp.__main__ import main
main()
"""
    completed = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=START_SECONDS, check=False
    )
    assert (completed.returncode, completed.stderr) == (130, b"")

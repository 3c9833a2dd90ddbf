"""Over stdio, invalid lines are answered, since their sender waits for a response; and a host may leave at any time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import ENVELOPE, LIST_TOOLS, ROOT, START_SECONDS, killed_late

SERVE = [sys.executable, "-m", "embeddings_mcp", "serve", "--load", "lazy"]


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    """A server that no line ends."""
    with subprocess.Popen(
        SERVE, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(START_SECONDS) == 0


def answers_to(line: str, server: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Send this line, then a request for the list of tools with id 99; return all responses before that one."""
    assert server.stdin is not None
    assert server.stdout is not None
    with killed_late(server):
        server.stdin.write(f"{line}\n{json.dumps(LIST_TOOLS | {'id': 99})}\n")
        server.stdin.flush()
        received = [json.loads(server.stdout.readline())]
        while received[-1].get("id") != 99:
            received.append(json.loads(server.stdout.readline()))
    return received[:-1]


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are POSIX only")
def test_a_person_who_starts_it_in_a_terminal_is_told_that_it_waits() -> None:
    terminal, stdin = os.openpty()
    with subprocess.Popen(SERVE, cwd=ROOT, stdin=stdin, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        with killed_late(process):
            line = process.stderr.readline()
        process.kill()
    os.close(stdin)
    os.close(terminal)
    assert "waiting for MCP messages on stdin; for a URL, use --transport http" in line


def search(text: str, number: str = "7") -> str:
    """A call of the tool ``search``; `text` and `number` are already JSON."""
    call = {"name": "search", "arguments": {"query": "q", "input": ["TEXT"]}, "_meta": ENVELOPE}
    message = {"jsonrpc": "2.0", "id": "NUMBER", "method": "tools/call", "params": call}
    return json.dumps(message).replace('"TEXT"', text).replace('"NUMBER"', number)


@pytest.mark.parametrize(
    ("line", "request_id", "code"),
    [
        (search(r'"half an emoji: \ud83d"'), 7, -32700),
        (search(r'"half an emoji: \ud83d"', '"seven"'), "seven", -32700),
        (search('"text"', r'"half an emoji: \ud83d"'), None, -32700),
        (search("[" * 300 + "]" * 300), 7, -32700),
        (search("[" * 100_000 + "]" * 100_000), None, -32700),
        ("what is this", None, -32700),
        ('{"jsonrpc": "2.0", "id": 7, "method": "tools/list", "params": []}', 7, -32600),
        ('{"jsonrpc": "2.0"}', None, -32600),
        ("[1, 2]", None, -32600),
    ],
    ids=[
        "half an emoji",
        "a string as id",
        "half an emoji in the id",
        "deeply nested",
        "nested deeper than any parser accepts",
        "not JSON",
        "params that are a list",
        "no method",
        "a list",
    ],
)
def test_an_invalid_line_is_answered(
    server: subprocess.Popen[str], line: str, request_id: int | str | None, code: int
) -> None:
    (answer,) = answers_to(line, server)

    assert answer["id"] == request_id
    assert answer["error"]["code"] == code
    assert answer["error"]["message"].startswith("the line is not")
    assert "emoji" not in answer["error"]["message"]


def test_the_error_for_an_invalid_request_names_the_field(server: subprocess.Popen[str]) -> None:
    (answer,) = answers_to('{"jsonrpc": "2.0", "id": 7, "method": "tools/list", "params": []}', server)

    assert answer["error"]["message"] == "the line is not a JSON-RPC message: `params`: Input should be an object"


def test_a_host_that_leaves_before_its_response_causes_no_error() -> None:
    with subprocess.Popen(
        SERVE,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, stderr = process.communicate(json.dumps(LIST_TOOLS) + "\n", timeout=START_SECONDS)

    assert stderr == ""
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full exists on Linux only")
def test_a_response_that_cannot_be_written_is_one_line_on_stderr() -> None:
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(
            SERVE,
            cwd=ROOT,
            input=json.dumps(LIST_TOOLS) + "\n",
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )

    assert process.stderr == "embeddings-mcp: [Errno 28] No space left on device\n"
    assert process.returncode == 1

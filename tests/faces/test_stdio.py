"""What a host sends over stdio that is no message is answered, for whoever sent it waits; and how a host may go."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import Any

import pytest

from tests.support import ENVELOPE, LIST_TOOLS, ROOT, START_SECONDS

SERVE = [sys.executable, "-m", "embeddings_mcp", "serve", "--load", "lazy"]


def answers_to(*lines: str) -> list[dict[str, Any]]:
    """What a server answers to these lines, then to a list of tools that is asked for behind them as id 99."""
    last = json.dumps(LIST_TOOLS | {"id": 99})
    with subprocess.Popen(
        SERVE,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        too_late = threading.Timer(START_SECONDS, process.kill)
        too_late.start()
        process.stdin.write("".join(f"{line}\n" for line in (*lines, last)))
        process.stdin.flush()
        answered = []
        for line in process.stdout:
            answered.append(json.loads(line))
            if answered[-1].get("id") == 99:
                break
        process.stdin.close()
        process.wait(START_SECONDS)
        too_late.cancel()
    return answered[:-1]


def search(text: str, number: str = "7") -> str:
    """A call whose text is written as JSON already."""
    call = {"name": "search", "arguments": {"query": "q", "input": ["TEXT"]}, "_meta": ENVELOPE}
    message = {"jsonrpc": "2.0", "id": "NUMBER", "method": "tools/call", "params": call}
    return json.dumps(message).replace('"TEXT"', text).replace('"NUMBER"', number)


@pytest.mark.parametrize(
    ("line", "asked", "code"),
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
        "an id that is a text",
        "half an emoji in the id",
        "deep",
        "deeper than any reader goes",
        "no JSON",
        "params that are a list",
        "no method",
        "a list",
    ],
)
def test_a_line_that_is_no_message_is_answered(line: str, asked: int | str | None, code: int) -> None:
    (answer,) = answers_to(line)

    assert answer["id"] == asked
    assert answer["error"]["code"] == code
    assert answer["error"]["message"].startswith("the line is no")
    assert "emoji" not in answer["error"]["message"]


def test_of_a_request_that_is_none_the_field_is_named() -> None:
    (answer,) = answers_to('{"jsonrpc": "2.0", "id": 7, "method": "tools/list", "params": []}')

    assert answer["error"]["message"] == ("the line is no JSON-RPC message: `params`: Input should be an object")


def test_a_host_that_goes_before_its_answer_is_no_fault() -> None:
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
        _, said = process.communicate(json.dumps(LIST_TOOLS) + "\n", timeout=START_SECONDS)

    assert said == ""
    assert process.returncode == 0

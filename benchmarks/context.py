"""The cost of comparing texts, in tokens of an agent's context: ``python -m benchmarks.context``.

The task is to rank passages by a question, or to compare texts with each other. Our server returns scores. A server
that returns vectors fills the agent's context and leaves the comparison to the agent, whose cost is not even counted.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from mcp import Client
from mcp.server.mcpserver import MCPServer
from mcp.types import TextContent, Tool
from tokenizers import Tokenizer

from benchmarks.machine import describe
from benchmarks.raw_vector_server import build_raw_vector_server
from benchmarks.table import ratio, show
from benchmarks.workloads import texts
from embeddings_mcp.assemble import build_service
from embeddings_mcp.embedders.local.locate import locate
from embeddings_mcp.faces.mcp.server import build_mcp_server
from embeddings_mcp.models import DEFAULT_MODEL
from embeddings_mcp.settings import Settings
from embeddings_mcp.vectors import FloatMatrix

TOKENIZER = "WordPiece of bert-base-uncased, 30,522 tokens"
"""The only real vocabulary available without the hub. It counts each bracket and comma as a token, and a number with
four decimals as three or four, which is within a factor of two of the tokenizers of large models."""

_TIMEOUT_SECONDS = 120


@dataclass(frozen=True, slots=True)
class _Call:
    """A tool call, as the agent writes it."""

    tool: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Cost:
    """Tokens in the agent's context.

    Attributes:
        tools: names, descriptions and input schemas of the tools, which hosts put into the context.
        arguments: the arguments that the model writes.
        as_text: the response, in hosts that show its text content.
        as_structure: the response, in hosts that show its structured content.
    """

    tools: int
    arguments: int
    as_text: int
    as_structure: int

    @property
    def answer(self) -> int:
        """The response, in the worse kind of host."""
        return max(self.as_text, self.as_structure)

    @property
    def total(self) -> int:
        """All tokens, in the worse kind of host."""
        return self.tools + self.arguments + self.answer


def main(arguments: Sequence[str] | None = None) -> None:
    """Count the tokens of each task."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.context", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="only a few passages, to check that it runs")
    options = parser.parse_args(arguments)
    print(f"## An agent's context\n\n{describe()}")
    asyncio.run(_compare([3] if options.tiny else [20, 100], compared=3 if options.tiny else 10))


async def _compare(ranked: Sequence[int], compared: int) -> None:
    tokenizer = Tokenizer.from_file(str(locate(DEFAULT_MODEL, DEFAULT_MODEL) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    service = build_service(Settings(cache="off"))
    embedder = service.catalog.default
    assert embedder is not None, "the default model is served"

    async def embed(batch: Sequence[str]) -> FloatMatrix:
        return (await embedder.embed(batch, input_type=None, truncate="END")).vectors

    ours, raw = build_mcp_server(service), build_raw_vector_server(embed)
    question = "how do I change the password of my account?"
    tasks = []
    for count in ranked:
        passages = texts("short", count)
        tasks.append(
            (
                f"rank {count} passages by a question",
                _Call("search", {"model": "default", "query": question, "input": passages}),
                _Call("embed_texts", {"texts": [question, *passages]}),
            )
        )
    compared_texts = texts("short", compared)
    tasks.append(
        (
            f"compare {compared} texts with each other",
            _Call("similarity", {"model": "default", "input": compared_texts}),
            _Call("embed_texts", {"texts": compared_texts}),
        )
    )
    rows = []
    for title, our_call, raw_call in tasks:
        our_cost, raw_cost = await _cost(ours, our_call, tokenizer), await _cost(raw, raw_call, tokenizer)
        rows += [_row(f"{title}: ours", our_cost), _row("  a server that gives vectors", raw_cost)]
        rows.append(
            [
                "  theirs over ours",
                *(
                    ratio(theirs / mine)
                    for theirs, mine in (
                        (raw_cost.tools, our_cost.tools),
                        (raw_cost.arguments, our_cost.arguments),
                        (raw_cost.as_text, our_cost.as_text),
                        (raw_cost.as_structure, our_cost.as_structure),
                        (raw_cost.total, our_cost.total),
                    )
                ),
            ]
        )
    await service.aclose()
    show(
        "Tokens in the context of an agent",
        ["", "tool list", "arguments", "answer as text", "answer as structure", "all, in the worse host"],
        rows,
        f"tokenizer: {TOKENIZER}",
        "aim: the answer to the ranking of 100 passages at most 1/100 of theirs (100.00x)",
        "the tool list is paid once in a conversation; of ours it holds all four tools, of theirs the only one",
    )


def _row(title: str, cost: _Cost) -> list[str]:
    figures = (cost.tools, cost.arguments, cost.as_text, cost.as_structure, cost.total)
    return [title, *(f"{figure:,}" for figure in figures)]


async def _cost(server: MCPServer[Any], call: _Call, tokenizer: Tokenizer) -> _Cost:
    def count(shown: object) -> int:
        text = shown if isinstance(shown, str) else orjson.dumps(shown).decode()
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    async with asyncio.timeout(_TIMEOUT_SECONDS), Client(server) as client:
        tools = (await client.list_tools()).tools
        result = await client.call_tool(call.tool, dict(call.arguments))
    assert not result.is_error, result.content
    shown = [block.text for block in result.content if isinstance(block, TextContent)]
    return _Cost(
        tools=sum(count(_as_shown(tool)) for tool in tools),
        arguments=count(call.arguments),
        as_text=count("\n".join(shown)),
        as_structure=count(result.structured_content),
    )


def _as_shown(tool: Tool) -> dict[str, object]:
    """The parts of a tool that hosts show to the model; they keep titles, hints and output schemas to themselves."""
    return {"name": tool.name, "description": tool.description, "input_schema": tool.input_schema}


if __name__ == "__main__":
    main()

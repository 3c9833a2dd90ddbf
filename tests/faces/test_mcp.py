"""The MCP server as a client sees it, in both protocol eras, with an embedder that needs no model."""

from __future__ import annotations

import base64
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import jsonschema
import numpy as np
import orjson
import pytest
from anyio.from_thread import start_blocking_portal
from hypothesis import given, settings
from hypothesis import strategies as st
from mcp import Client
from mcp.shared.exceptions import MCPError
from mcp.types import (
    INVALID_PARAMS,
    CacheableResult,
    CallToolResult,
    PromptReference,
    ResourceTemplateReference,
    TextContent,
    TextResourceContents,
)

from embeddings_mcp import __version__
from embeddings_mcp.assemble import build_service
from embeddings_mcp.embedders.base import Embeddings, OnProgress
from embeddings_mcp.errors import Overloaded
from embeddings_mcp.faces.mcp.server import CARD_TEMPLATE, build_mcp_server
from embeddings_mcp.models import ModelCard
from embeddings_mcp.operations import OPERATIONS
from embeddings_mcp.settings import EndpointSettings, Settings
from tests.nim.standin import stand_in
from tests.published import TYPES, without
from tests.support import ERAS, SECONDS, FailingEmbedder, HashEmbedder, service_of, wait_until

pytestmark = pytest.mark.anyio

SNAPSHOT = Path(__file__).parent / "tools.json"
UPDATE_SNAPSHOT = bool(os.environ.get("EMBEDDINGS_MCP_UPDATE_SNAPSHOTS"))

PLAIN = ModelCard(id="test/hash", dimensions=8, max_tokens=64)
MATRYOSHKA = ModelCard(
    id="test/nested/asymmetric",
    aliases=("asymmetric",),
    dimensions=16,
    matryoshka=(4, 8),
    input_type="required",
    query_prompt="query: ",
    passage_prompt="passage: ",
)


@pytest.fixture(params=sorted(ERAS))
def era(request: pytest.FixtureRequest) -> str:
    version: str = request.param
    return version


@asynccontextmanager
async def connected(*embedders: HashEmbedder, era: str = "2026-07-28", **options: Any) -> AsyncIterator[Client]:
    """A client connected to a server with these embedders; the first is the default."""
    service = service_of(*(embedders or (HashEmbedder(PLAIN), HashEmbedder(MATRYOSHKA))))
    with anyio.fail_after(10):
        async with Client(build_mcp_server(service), mode=ERAS[era], **options) as client:
            assert client.protocol_version == era
            yield client


def text_of(result: CallToolResult) -> str:
    (block,) = result.content
    assert isinstance(block, TextContent)
    return block.text


async def answer(client: Client, tool: str, **arguments: Any) -> Any:
    """The structured content of a call that must succeed."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, text_of(result)
    return result.structured_content


async def refusal(client: Client, tool: str, arguments: dict[str, Any]) -> str:
    """The text of a call that must be refused."""
    result = await client.call_tool(tool, arguments)
    assert result.is_error
    assert result.structured_content is None
    return text_of(result)


# --- What is advertised ----------------------------------------------------------------------------------------------


async def test_create_embedding_advertises_exactly_the_published_request(era: str) -> None:
    published = TYPES["EmbeddingRequest"]
    async with connected(era=era) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    ours = tools["create_embedding"].input_schema
    assert without({"description"}, ours) == without({"description"}, published)
    # Order matters: a model fills in arguments in the order in which it reads them.
    assert list(ours["properties"]) == list(published["properties"])


async def test_the_tool_list_is_the_one_in_the_snapshot(era: str) -> None:
    """Every change to the advertised tools shows in a diff; set EMBEDDINGS_MCP_UPDATE_SNAPSHOTS=1 to accept it."""
    async with connected(era=era) as client:
        listed = await client.list_tools()
    tools = [tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in listed.tools]
    if UPDATE_SNAPSHOT:
        SNAPSHOT.write_text(json.dumps(tools, indent=2, ensure_ascii=False) + "\n")
    assert tools == json.loads(SNAPSHOT.read_text())


@pytest.mark.parametrize(("origin", "open_world"), [("local", False), ("https://nim.example/v1", True)])
async def test_every_tool_states_all_four_hints(era: str, origin: str, open_world: bool) -> None:
    async with connected(HashEmbedder(PLAIN), HashEmbedder(MATRYOSHKA, origin=origin), era=era) as client:
        for tool in (await client.list_tools()).tools:
            assert tool.title
            assert tool.annotations is not None
            assert tool.annotations.model_dump(exclude={"title"}) == {
                "read_only_hint": True,
                "destructive_hint": False,
                "idempotent_hint": True,
                "open_world_hint": open_world,
            }


async def test_every_description_fits_a_host_and_says_when_not_to_use_the_tool(era: str) -> None:
    async with connected(era=era) as client:
        for tool in (await client.list_tools()).tools:
            assert tool.description is not None
            assert len(tool.description) < 2048
            assert "Do NOT" in tool.description


async def test_the_server_introduces_itself(era: str) -> None:
    async with connected(era=era) as client:
        assert client.instructions is not None
        assert len(client.instructions) < 2048
        assert "`default`, which is test/hash" in client.instructions
        assert client.server_info is not None
        assert (client.server_info.name, client.server_info.version) == ("embeddings-mcp", __version__)


async def test_only_implemented_capabilities_are_announced(era: str) -> None:
    async with connected(era=era) as client:
        announced = client.server_capabilities.model_dump(exclude_none=True)
    assert announced == {
        "tools": {"list_changed": False},
        "prompts": {"list_changed": False},
        "resources": {"list_changed": False, "subscribe": False},
        "completions": {},
        # Before 2026-07-28 the protocol had no place for extensions.
        **({"extensions": {"io.modelcontextprotocol/skills": {}}} if era == "2026-07-28" else {}),
    }


async def test_lists_are_cacheable_and_cards_are_not() -> None:
    async with connected() as client:
        lists: list[CacheableResult] = [
            await client.list_tools(),
            await client.list_prompts(),
            await client.list_resources(),
            await client.list_resource_templates(),
        ]
        card = await client.read_resource("embeddings://models/test/hash")
    assert {(listed.ttl_ms, listed.cache_scope) for listed in lists} == {(300_000, "public")}
    assert (card.ttl_ms, card.cache_scope) == (0, "private")


async def test_the_list_of_cards_is_not_cacheable_if_endpoints_may_have_more_models() -> None:
    async with stand_in() as standing:
        service = build_service(Settings(endpoints=(EndpointSettings(url=standing.url),)))
        async with aclosing(service), Client(build_mcp_server(service), mode="auto") as client:
            tools, cards = await client.list_tools(), await client.list_resources()
    assert (tools.ttl_ms, cards.ttl_ms) == (300_000, 0)


# --- Embeddings ------------------------------------------------------------------------------------------------------


async def test_float_vectors_arrive_exactly_and_in_their_shortest_form(era: str) -> None:
    embedder = HashEmbedder(PLAIN)
    texts = ["one", "two", "one"]
    async with connected(embedder, era=era) as client:
        content = await answer(client, "create_embedding", model="test/hash", input=texts)
    assert [entry["index"] for entry in content["data"]] == [0, 1, 2]
    for text, entry in zip(texts, content["data"], strict=True):
        np.testing.assert_array_equal(np.array(entry["embedding"], np.float32), embedder.vector(text))
        shortest = orjson.dumps(embedder.vector(text), option=orjson.OPT_SERIALIZE_NUMPY)
        assert json.dumps(entry["embedding"], separators=(",", ":")).encode() == shortest
    assert content["object"] == "list"
    assert content["model"] == "test/hash"
    assert content["usage"] == {"prompt_tokens": 9, "total_tokens": 9}


async def test_base64_vectors_are_little_endian_float32(era: str) -> None:
    embedder = HashEmbedder(PLAIN)
    async with connected(embedder, era=era) as client:
        content = await answer(client, "create_embedding", model="default", input="one", encoding_format="base64")
    (entry,) = content["data"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(entry["embedding"]), "<f4"), embedder.vector("one"))


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
async def test_the_text_of_an_embedding_response_describes_the_vectors_without_containing_any(
    era: str, encoding_format: str
) -> None:
    async with connected(era=era) as client:
        result = await client.call_tool(
            "create_embedding", {"model": "default", "input": ["a", "b"], "encoding_format": encoding_format}
        )
    text = text_of(result)
    assert text.startswith("2 vectors of 8 dimensions by test/hash (6 tokens)")
    assert len(text) < 300
    assert not re.search(r"\d\.\d", text)


@pytest.mark.parametrize("text", ['["a","b"]', "[]", '{"x":1}', "null", "123", "1.5", "true", '"quoted"', " "])
async def test_a_text_that_looks_like_json_is_one_text(era: str, text: str) -> None:
    embedder = HashEmbedder(PLAIN)
    async with connected(embedder, era=era) as client:
        content = await answer(client, "create_embedding", model="default", input=text)
        ranked = await answer(client, "search", query=text, input=text)
    assert len(content["data"]) == 1
    assert len(ranked["results"]) == 1
    assert [text for batch in embedder.batches for text in batch] == [text] * 3


# --- Scores ----------------------------------------------------------------------------------------------------------


async def test_similarity_has_the_same_scores_in_text_and_in_structured_content(era: str) -> None:
    async with connected(era=era) as client:
        result = await client.call_tool("similarity", {"model": "default", "input": ["a", "b"], "other": ["a", "c"]})
    (first, second) = result.structured_content["scores"]
    assert first[0] == 1.0
    assert text_of(result) == (
        "cosine by test/hash, higher is closer; columns are other[0] to other[1]\n"
        f"input[0] {first[0]:.4f} {first[1]:.4f}\n"
        f"input[1] {second[0]:.4f} {second[1]:.4f}"
    )


async def test_the_closest_pairs_name_both_texts(era: str) -> None:
    arguments = {"model": "default", "input": ["a", "b", "a"], "top_k": 1, "metric": "euclidean"}
    async with connected(era=era) as client:
        result = await client.call_tool("similarity", arguments)
    assert result.structured_content["pairs"] == [{"input": 0, "other": 2, "score": 0.0}]
    assert text_of(result) == "euclidean by test/hash, lower is closer\ninput[0] input[2] 0.0000"


async def test_search_embeds_the_query_as_query_and_the_passages_as_passages(era: str) -> None:
    embedder = HashEmbedder(MATRYOSHKA)
    async with connected(embedder, era=era) as client:
        result = await client.call_tool("search", {"query": "a", "input": ["b", "a", "query: a"], "top_k": 2})
    expected = [float(embedder.vector("a", "query") @ embedder.vector(text, "passage")) for text in ("b", "a")]
    scores = {hit["index"]: hit["score"] for hit in result.structured_content["results"]}
    assert len(scores) == 2
    for index, score in scores.items():
        if index < 2:
            assert score == pytest.approx(expected[index], abs=1e-4)
    lines = text_of(result).splitlines()
    assert lines[0] == "cosine by test/nested/asymmetric, best first"
    assert lines[1:] == [f"input[{index}] {score:.4f}" for index, score in scores.items()]


async def test_list_models_describes_each_in_one_line(era: str) -> None:
    async with connected(era=era) as client:
        result = await client.call_tool("list_models", {})
    assert [entry["id"] for entry in result.structured_content["models"]] == [PLAIN.id, MATRYOSHKA.id]
    assert text_of(result) == (
        "test/hash: the default model; 8 dimensions; texts up to 64 tokens; input_type ignored; served from local\n"
        "test/nested/asymmetric: 16 or 4 or 8 dimensions; input_type required; served from local; "
        "also called asymmetric"
    )


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("create_embedding", {"model": "default", "input": ["a", "b"]}),
        ("create_embedding", {"model": "default", "input": "a", "encoding_format": "base64"}),
        ("create_embedding", {"model": "asymmetric-query", "input": "a", "dimensions": 4}),
        ("similarity", {"model": "default", "input": ["a", "b"]}),
        ("similarity", {"model": "default", "input": "a", "other": ["b", "c"], "top_k": 1}),
        ("search", {"query": "a", "input": ["b", "c"]}),
        ("list_models", {}),
    ],
)
async def test_structured_content_matches_the_output_schema(era: str, tool: str, arguments: dict[str, Any]) -> None:
    async with connected(era=era) as client:
        output_schema = {listed.name: listed.output_schema for listed in (await client.list_tools()).tools}[tool]
        content = await answer(client, tool, **arguments)
    assert output_schema is not None
    jsonschema.Draft202012Validator.check_schema(output_schema)
    jsonschema.Draft202012Validator(output_schema).validate(content)


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "arguments", "hint"),
    [
        ("create_embedding", {"input": "a"}, "`model` is required"),
        ("create_embedding", {"model": "default"}, "`input` is required"),
        ("create_embedding", {"model": "default", "input": ""}, "`input` must not be an empty string"),
        ("create_embedding", {"model": "default", "input": []}, "`input` must not be an empty array"),
        ("create_embedding", {"model": "default", "input": ["a", ""]}, "`input[1]` must not be an empty string"),
        ("create_embedding", {"model": "default", "input": ["a", 1]}, "`input[1]` must be a string, not a number"),
        ("create_embedding", {"model": "default", "input": [1, 2]}, "check_embedding_ctx_length=False"),
        ("create_embedding", {"model": "default", "input": None}, "must be a string or an array of strings, not null"),
        ("create_embedding", {"model": 3, "input": "a"}, "`model` must be a string, not a number"),
        ("create_embedding", {"model": "gone", "input": "a"}, "served are: test/hash, test/nested/asymmetric"),
        ("create_embedding", {"model": "default", "inputs": "a"}, "did you mean `input`?"),
        ("create_embedding", {"model": "default", "input": "a", "truncate": "MIDDLE"}, "'NONE', 'START' or 'END'"),
        ("create_embedding", {"model": "default", "input": "a", "dimensions": None}, "`dimensions` must not be null"),
        ("create_embedding", {"model": "default", "input": "a", "dimensions": 4}, "not a Matryoshka model"),
        ("create_embedding", {"model": "asymmetric", "input": "a"}, "`input_type` is required"),
        ("create_embedding", {"model": "asymmetric-query", "input": "a", "dimensions": 5}, "accepted are 4, 8 and 16"),
        ("similarity", {"model": "default", "input": "a", "encoding_format": "float"}, "is not a field"),
        ("similarity", {"model": "default", "input": "a", "top_k": 0}, "`top_k` must be at least 1, not 0"),
        ("similarity", {"model": "default", "input": ["a"] * 101}, "`top_k` is required here"),
        ("similarity", {"model": "default", "input": '["a", "b"]'}, "`other` is required where `input` is one string"),
        ("search", {"input": "a"}, "`query` is required"),
        ("search", {"query": "a", "input": "b", "model": "asymmetric-query"}, "without the suffix"),
        ("search", {"query": "a", "input": "b", "input_type": "query"}, "of this request; accepted are query, input,"),
        ("list_models", {"model": "a"}, "`model` is not a field of this request; accepted are no fields"),
    ],
)
async def test_an_invalid_call_is_answered_with_what_would_be_valid(
    era: str, tool: str, arguments: dict[str, Any], hint: str
) -> None:
    async with connected(era=era) as client:
        text = await refusal(client, tool, arguments)
    assert hint in text
    assert text.startswith("`")  # the field comes first: the SDK adds no prefix


async def test_an_embedder_error_reaches_the_client_unchanged(era: str) -> None:
    embedder = FailingEmbedder(error=Overloaded("the queue is full: try again in 3 seconds", retry_after=3))
    async with connected(embedder, era=era) as client:
        text = await refusal(client, "create_embedding", {"model": "default", "input": "a"})
    assert text == "the queue is full: try again in 3 seconds"


async def test_the_details_of_an_internal_error_appear_only_in_the_log(
    era: str, caplog: pytest.LogCaptureFixture
) -> None:
    embedder = FailingEmbedder(error=RuntimeError("secret detail"))
    async with connected(embedder, era=era) as client:
        text = await refusal(client, "create_embedding", {"model": "default", "input": "a"})
    assert text == "create_embedding failed inside the server; its log says why"
    assert "secret detail" in caplog.text


async def test_an_unknown_tool_is_a_protocol_error(era: str) -> None:
    async with connected(era=era) as client:
        with pytest.raises(MCPError, match="the tools are create_embedding, similarity, search, list_models") as caught:
            await client.call_tool("embed", {})
    assert caught.value.code == INVALID_PARAMS


Call = Callable[[str, dict[str, Any]], CallToolResult]


@pytest.fixture(scope="module")
def call() -> Iterator[Call]:
    """Calls a tool, always in the same session: connecting takes many times as long as a call."""
    server = build_mcp_server(service_of(HashEmbedder(PLAIN), HashEmbedder(MATRYOSHKA)))
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(Client(server)) as client:

        async def call_in_time(tool: str, arguments: dict[str, Any]) -> CallToolResult:
            with anyio.fail_after(SECONDS):
                return await client.call_tool(tool, arguments)

        yield functools.partial(portal.call, call_in_time)


FIELDS = sorted({field for operation in OPERATIONS for field in operation.request.model_fields})
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NEARLY_RIGHT = st.sampled_from(
    ["default", "test/hash", "asymmetric-passage", "cosine", "query", "NONE", "base64", ["a", "b"], 1, 4, 8.0]
)
ARGUMENTS = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), NEARLY_RIGHT | JSON_VALUES, max_size=6)


@given(tool=st.sampled_from([operation.name for operation in OPERATIONS]), arguments=ARGUMENTS)
@settings(max_examples=150)
def test_any_arguments_lead_to_a_result_or_to_an_error_that_names_the_field(
    call: Call, tool: str, arguments: dict[str, Any]
) -> None:
    result = call(tool, arguments)
    if result.is_error:
        assert re.match(r"`.*` (is|must|'|\d)", text_of(result), re.DOTALL)
    else:
        assert result.structured_content is not None


# --- Progress and cancelling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "arguments", "total"),
    [
        ("create_embedding", {"model": "default", "input": ["a", "b", "c"]}, 3),
        ("similarity", {"model": "default", "input": ["a", "b"], "other": "c"}, 3),
        ("search", {"query": "a", "input": ["b", "c"]}, 3),
    ],
)
async def test_progress_counts_texts_for_a_client_that_asks(
    era: str, tool: str, arguments: dict[str, Any], total: int
) -> None:
    reports: list[tuple[float, float | None, str | None]] = []

    async def report(progress: float, total: float | None, message: str | None) -> None:
        reports.append((progress, total, message))

    async with connected(era=era) as client:
        await client.call_tool(tool, arguments, progress_callback=report)
    assert reports == [(done, total, f"{done} of {total} texts embedded") for done in range(1, total + 1)]


async def test_progress_increases_with_every_report_even_while_waiting(era: str) -> None:
    """The protocol requires it; an embedder may report the same number again."""

    class Waiting(HashEmbedder):
        async def embed(self, texts: Sequence[str], *, on_progress: OnProgress | None = None, **kw: Any) -> Embeddings:
            assert on_progress is not None
            for done in (1, 1, 1, 2):
                await on_progress(done)
            return await super().embed(texts, on_progress=None, **kw)

    reports: list[tuple[float, str | None]] = []

    async def report(progress: float, total: float | None, message: str | None) -> None:
        reports.append((progress, message))

    async with connected(Waiting(PLAIN), era=era) as client:
        await client.call_tool("create_embedding", {"model": "default", "input": ["a", "b"]}, progress_callback=report)
    numbers = [number for number, _ in reports]
    assert numbers == sorted(set(numbers))
    assert [message for _, message in reports] == [
        "1 of 2 texts embedded",
        "1 of 2 texts embedded, waiting for the rest",
        "1 of 2 texts embedded, waiting for the rest",
        "2 of 2 texts embedded",
    ]


async def test_a_call_without_progress_is_reported_as_waiting(era: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients give up on a call that reports nothing: one that waits for a model to load, for instance."""
    monkeypatch.setattr("embeddings_mcp.faces.mcp.server.PROGRESS_INTERVAL_SECONDS", 0.01)
    gate = anyio.Event()
    reports: list[tuple[float, str | None]] = []

    async def report(progress: float, total: float | None, message: str | None) -> None:
        reports.append((progress, message))
        if len(reports) == 2:
            gate.set()

    with anyio.fail_after(SECONDS):
        async with connected(HashEmbedder(PLAIN, gate=gate), era=era) as client:
            await client.call_tool(
                "create_embedding", {"model": "default", "input": ["a", "b"]}, progress_callback=report
            )
    numbers = [number for number, _ in reports]
    assert numbers == sorted(set(numbers))
    assert {message for number, message in reports if number < 1} == {"0 of 2 texts embedded, waiting for the rest"}
    assert "2 of 2 texts embedded" in [message for _, message in reports]


async def test_a_client_that_does_not_ask_receives_no_progress(era: str) -> None:
    received: list[object] = []

    async def receive(message: object) -> None:
        received.append(message)

    async with connected(era=era, message_handler=receive) as client:
        await answer(client, "create_embedding", model="default", input=["a", "b"])
    assert received == []


async def test_cancelling_a_call_cancels_the_embedding(era: str) -> None:
    embedder = HashEmbedder(PLAIN, gate=anyio.Event())
    async with connected(embedder, era=era) as client:
        async with anyio.create_task_group() as calls:
            calls.start_soon(client.call_tool, "create_embedding", {"model": "default", "input": "a"})
            await wait_until(lambda: embedder.batches)
            calls.cancel_scope.cancel()
        await wait_until(lambda: embedder.cancelled)
        embedder.gate = None
        assert await answer(client, "create_embedding", model="default", input="b")


# --- Resources, completions, prompts ---------------------------------------------------------------------------------


async def test_every_model_is_listed_as_a_resource_that_can_be_read(era: str) -> None:
    async with connected(era=era) as client:
        resources = (await client.list_resources()).resources
        listed = [resource for resource in resources if resource.uri.startswith("embeddings://")]
        templates = (await client.list_resource_templates()).resource_templates
        described = {entry["id"]: entry for entry in (await answer(client, "list_models"))["models"]}
        for resource in listed:
            (content,) = (await client.read_resource(resource.uri)).contents
            assert isinstance(content, TextResourceContents)
            assert content.mime_type == resource.mime_type == "application/json"
            assert json.loads(content.text) == described[resource.name]
    assert [resource.uri for resource in listed] == [
        "embeddings://models/test/hash",
        "embeddings://models/test/nested/asymmetric",
    ]
    assert [template.uri_template for template in templates] == [CARD_TEMPLATE]


@pytest.mark.parametrize(
    "name",
    [
        "test/nested/asymmetric",
        "test%2Fnested%2Fasymmetric",
        "TEST/nested/asymmetric",
        "asymmetric",
        "asymmetric-query",
    ],
)
async def test_a_card_is_found_by_any_name_of_its_model(era: str, name: str) -> None:
    async with connected(era=era) as client:
        (content,) = (await client.read_resource(f"embeddings://models/{name}")).contents
    assert isinstance(content, TextResourceContents)
    assert json.loads(content.text)["id"] == "test/nested/asymmetric"


@pytest.mark.parametrize(
    "uri", ["embeddings://models/gone", "embeddings://models/", "embeddings://models/../x", "file:///etc/passwd"]
)
async def test_an_unknown_resource_is_not_found(era: str, uri: str) -> None:
    async with connected(era=era) as client:
        with pytest.raises(MCPError) as caught:
            await client.read_resource(uri)
    assert caught.value.code == INVALID_PARAMS
    assert caught.value.data == {"uri": uri}


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("", ["default", "test/hash", "test/nested/asymmetric"]),
        ("test/", ["test/hash", "test/nested/asymmetric"]),
        ("HASH", ["test/hash"]),
        ("zzz", []),
    ],
)
async def test_model_names_are_completed(era: str, typed: str, offered: list[str]) -> None:
    async with connected(era=era) as client:
        for reference in (
            ResourceTemplateReference(type="ref/resource", uri=CARD_TEMPLATE),
            PromptReference(type="ref/prompt", name="answer_from_texts"),
        ):
            completion = (await client.complete(reference, {"name": "model", "value": typed})).completion
            assert completion.values == offered
            assert completion.total == len(offered)


async def test_free_text_is_not_completed(era: str) -> None:
    reference = PromptReference(type="ref/prompt", name="answer_from_texts")
    async with connected(era=era) as client:
        completion = (await client.complete(reference, {"name": "question", "value": "wh"})).completion
    assert completion.values == []


async def test_the_prompt_asks_for_a_search_with_the_question(era: str) -> None:
    async with connected(era=era) as client:
        (prompt, _) = (await client.list_prompts()).prompts
        assert prompt.name == "answer_from_texts"
        assert prompt.description
        assert [(argument.name, argument.required) for argument in prompt.arguments or []] == [
            ("question", True),
            ("model", False),
        ]
        assert all(argument.description for argument in prompt.arguments or [])
        rendered = await client.get_prompt(prompt.name, {"question": '["why?"]', "model": "test/hash"})
    (message,) = rendered.messages
    assert isinstance(message.content, TextContent)
    assert 'Answer this question from the texts I gave you or named: ["why?"]' in message.content.text
    assert "Call `search`" in message.content.text
    assert "'test/hash'" in message.content.text


@pytest.mark.parametrize(("name", "arguments"), [("gone", {}), ("answer_from_texts", {})])
async def test_an_invalid_prompt_request_is_reported_as_invalid_params(
    era: str, name: str, arguments: dict[str, str]
) -> None:
    async with connected(era=era) as client:
        with pytest.raises(MCPError) as caught:
            await client.get_prompt(name, arguments)
    assert caught.value.code == INVALID_PARAMS


# --- Cost ------------------------------------------------------------------------------------------------------------


def test_importing_the_server_does_not_import_the_encoder() -> None:
    heavy = "{'torch', 'transformers', 'tokenizers', 'huggingface_hub'}"
    script = f"import sys, embeddings_mcp.faces.mcp.server; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []

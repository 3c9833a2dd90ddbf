"""The MCP face: the service's operations as tools, its model cards as resources, and one prompt.

One server object answers over stdio and over streamable HTTP, in the protocol versions 2025-11-25 and 2026-07-28. It
only translates: what a request means, and what is wrong with it, is known further down.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import orjson
from mcp.server.caching import CacheableMethod, CacheHint
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ResourceError, ResourceNotFoundError, UnexpectedToolError
from mcp.shared.exceptions import MCPError
from mcp.shared.message import SessionMessage
from mcp.types import (
    INVALID_PARAMS,
    CallToolResult,
    Completion,
    CompletionArgument,
    CompletionContext,
    GetPromptResult,
    InputRequiredResult,
    PromptReference,
    Resource,
    ResourceTemplateReference,
    TextContent,
    Tool,
    ToolAnnotations,
)
from pydantic import BaseModel, Field

from embeddings_mcp import __version__
from embeddings_mcp.embedders.base import OnProgress
from embeddings_mcp.errors import EmbeddingsError, UnknownModel
from embeddings_mcp.faces.mcp import response_size
from embeddings_mcp.faces.mcp.skills import SKILL_URI, SkillsExtension, use_embeddings
from embeddings_mcp.operations import CREATE_EMBEDDING, LIST_MODELS, OPERATIONS, SEARCH, SIMILARITY, Operation
from embeddings_mcp.publish.schemas import json_schema
from embeddings_mcp.request_limits import DEFAULT_LIMITS, Limits
from embeddings_mcp.schema import (
    EmbeddingRequest,
    EmbeddingResponse,
    ListModelsRequest,
    ModelEntry,
    ModelsResponse,
    SearchRequest,
    SearchResponse,
    SimilarityRequest,
    SimilarityResponse,
    count_texts,
    texts_of,
)
from embeddings_mcp.serialization import dump_json, parse
from embeddings_mcp.service import EmbeddingService

if TYPE_CHECKING:
    from mcp.shared._stream_protocols import ReadStream, WriteStream

CARD_TEMPLATE = "embeddings://models/{+model}"
"""Address of a model's card; the plus lets the slashes of a model id stand as they are (RFC 6570, section 3.2.3)."""

_LISTS: tuple[CacheableMethod, ...] = (
    "server/discover",
    "tools/list",
    "prompts/list",
    "resources/list",
    "resources/templates/list",
)
"""What cannot change while the server runs, and is the same for every caller. A card may grow more exact."""

_LISTS_FRESH_MS = 5 * 60 * 1000
"""A client that stays while the server is restarted with other models sees them this much later, at most."""

_MOST_COMPLETIONS = 100  # the protocol's limit


class EmbeddingsServer(MCPServer[dict[str, Any]]):
    """An `MCPServer` whose tools are the service's operations, with exactly the schemas that we publish.

    The SDK makes a tool from a function's signature: it derives the schema, decodes strings that look like JSON, and
    drops unknown arguments. Each of these would break the mirrored API, so the methods that list and call tools are
    overridden, and arguments reach `serialization.parse` as they came.

    Attributes:
        listed: set once a client has asked for the tools.
    """

    def __init__(self, service: EmbeddingService, limits: Limits) -> None:
        self._service = service
        self._limits = limits
        self._operations = {operation.name: operation for operation in OPERATIONS}
        self.listed = asyncio.Event()
        self._advertised = [_tool(operation, open_world=not service.catalogue.local) for operation in OPERATIONS]
        super().__init__(
            "embeddings-mcp",
            title="Text embeddings",
            version=__version__,
            instructions=_instructions(service),
            extensions=[SkillsExtension()],
            cache_hints={
                method: CacheHint(ttl_ms=_LISTS_FRESH_MS, scope="public")
                for method in _LISTS
                if method != "resources/list" or service.catalogue.local  # endpoints are found to have more models
            },
            subscriptions=False,
            log_level="WARNING",
        )

    async def run_on(self, read: ReadStream[SessionMessage | Exception], write: WriteStream[SessionMessage]) -> None:
        """Serve the client at the other end of two streams until it closes them."""
        await self._lowlevel_server.run(read, write, self._lowlevel_server.create_initialization_options())

    async def list_tools(self) -> list[Tool]:
        """The operations as tools, in the order of their table."""
        self.listed.set()
        return [*self._advertised]

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[dict[str, Any], Any] | None = None
    ) -> CallToolResult:
        """Answer a tool call; what the caller can put right comes back as a result with ``is_error``.

        Raises:
            MCPError: there is no such tool.
            UnexpectedToolError: a fault of ours. Its cause goes to the log and not to the caller.
        """
        operation = self._operations.get(name)
        if operation is None:
            raise MCPError(INVALID_PARAMS, f"Unknown tool: {name!r}; the tools are {', '.join(self._operations)}")
        try:
            request = parse(operation.request, arguments)
            over_http = _came_over_http(context)
            if over_http and isinstance(request, EmbeddingRequest):
                await self._check_expected(request)
            response = await self._limits.answer(self._service, operation, request, _reporter(request, context))
            text, structured = _READABLE[operation](request, response), dump_json(response)
            if over_http:
                response_size.check(request, len(text) + len(structured), self._limits.mcp_answer_bytes)
        except EmbeddingsError as error:
            return CallToolResult(content=[TextContent(text=error.message)], is_error=True)
        except Exception as error:
            raise UnexpectedToolError(f"{name} failed inside the server; its log says why") from error
        return CallToolResult(
            content=[TextContent(text=text)],
            # By way of JSON, since a Python float read from the shortest digits of a float32 is written with the same.
            structured_content=orjson.loads(structured),
        )

    async def _check_expected(self, request: EmbeddingRequest) -> None:
        """Refuse vectors that would be too large together, where it is known how long they will be."""
        length = request.dimensions
        if length is None:
            embedder, _ = await self._service.catalogue.find(request.model)
            length = embedder.card.dimensions
        if length is not None:
            response_size.check(request, response_size.expected_bytes(request, length), self._limits.mcp_answer_bytes)

    async def list_resources(self) -> list[Resource]:
        """The cards of the models known now, and what else has been added."""
        cards = [
            Resource(
                uri=CARD_TEMPLATE.replace("{+model}", quote(entry["id"], safe="/")),
                name=entry["id"],
                title=f"Embedding model {entry['id']}",
                description=_model_as_text(entry),
                mime_type="application/json",
            )
            for entry in self._service.known_models()
        ]
        return [*cards, *await super().list_resources()]

    async def get_prompt(
        self,
        name: str,
        arguments: dict[str, Any] | None = None,
        context: Context[dict[str, Any], Any] | None = None,
    ) -> GetPromptResult | InputRequiredResult:
        """Render a prompt.

        Raises:
            MCPError: no such prompt, or wrong arguments. The SDK would call both an internal error.
        """
        try:
            return await super().get_prompt(name, arguments, context)
        except ValueError as error:
            raise MCPError(INVALID_PARAMS, str(error)) from error


def build_mcp_server(service: EmbeddingService, limits: Limits = DEFAULT_LIMITS) -> EmbeddingsServer:
    """The server for both transports; it does not close the service, which whoever made it does."""
    server = EmbeddingsServer(service, limits)
    _add_cards(server, service)
    server.prompt(title="Answer a question from texts")(answer_from_texts)
    server.prompt(title="Use embeddings well")(use_embeddings)

    async def complete(
        _about: PromptReference | ResourceTemplateReference,
        argument: CompletionArgument,
        _context: CompletionContext | None,
    ) -> Completion | None:
        if argument.name != "model":
            return None
        names = ["default", *(entry["id"] for entry in service.known_models())]
        fitting = [name for name in names if argument.value.lower() in name.lower()]
        return Completion(
            values=fitting[:_MOST_COMPLETIONS], total=len(fitting), has_more=len(fitting) > _MOST_COMPLETIONS
        )

    server.completion()(complete)  # type: ignore[no-untyped-call]  # the SDK left its return type out
    return server


def _tool(operation: Operation, *, open_world: bool) -> Tool:
    return Tool(
        name=operation.name,
        title=operation.title,
        description=operation.description,
        input_schema=json_schema(operation.request),
        output_schema=json_schema(operation.response),
        annotations=ToolAnnotations(
            title=operation.title,
            read_only_hint=True,
            destructive_hint=False,
            idempotent_hint=True,
            open_world_hint=open_world,
        ),
    )


def _instructions(service: EmbeddingService) -> str:
    """What a host puts before the model once, beside the tools' own descriptions; hosts cut it at 2,048 characters."""
    return (
        "Compares and ranks texts by meaning, and makes embedding vectors.\n"
        "- Which of these passages answer a question? `search`.\n"
        "- How alike are these texts, which are duplicates? `similarity`, with `top_k` where there are many.\n"
        "- Vectors for a program, a file or a vector database? `create_embedding`; never to compare texts yourself.\n"
        "Give many texts in one call, as an array. Every string is taken as it is, also one that looks like JSON. "
        "Positions in answers count from 0. A call knows only the texts that it is given.\n"
        f"`model` may be `default`, which is {service.catalogue.default_name}; `list_models` describes every model. "
        "Vectors and scores of different models cannot be compared.\n"
        f"Thresholds, choosing a model, what to do on errors: the skill {SKILL_URI}."
    )


def _came_over_http(context: Context[dict[str, Any], Any] | None) -> bool:
    return context is not None and context.request_context.request is not None


def _reporter(request: BaseModel, context: Context[dict[str, Any], Any] | None) -> OnProgress | None:
    """Tells the client how many texts are done; the SDK sends nothing to one that has not asked for progress."""
    if context is None:
        return None
    total = sum(map(count_texts, texts_of(request).values()))
    told = 0.0

    async def report(done: int) -> None:
        nonlocal told
        waits = done <= told
        told = told + 0.001 if waits else done  # the protocol wants every report to be above the last
        so_far = f"{done} of {total} texts embedded"
        await context.report_progress(told, total, f"{so_far}, waiting for the rest" if waits else so_far)

    return report


# --- Resources and the prompt ----------------------------------------------------------------------------------------


def _add_cards(server: EmbeddingsServer, service: EmbeddingService) -> None:
    """Every model's card as a resource, by any of the model's names."""

    async def read_card(model: str) -> str:
        try:
            return orjson.dumps(await service.describe(model), option=orjson.OPT_INDENT_2).decode()
        except UnknownModel as error:
            raise ResourceNotFoundError(error.message) from None
        except EmbeddingsError as error:
            raise ResourceError(error.message) from None

    server.resource(
        CARD_TEMPLATE,
        name="model",
        title="Embedding model",
        description="What a model takes and gives: vector lengths, longest text, input types, where it runs.",
        mime_type="application/json",
    )(read_card)


def answer_from_texts(
    question: Annotated[str, Field(description="What to find out.")],
    model: Annotated[str, Field(description="Embedding model to search with; `default` when left out.")] = "default",
) -> str:
    """Find the passages that answer a question in the texts at hand, by meaning, and answer from them alone."""
    return (
        f"Answer this question from the texts that I gave you or named: {question}\n\n"
        "1. Split the texts into passages of one to three paragraphs, and note where each comes from.\n"
        f"2. Call `search` once with all passages as `input`, the question as `query`, `model` '{model}' and `top_k` 5."
        " If it finds little, ask again in the words that an answer would use.\n"
        "3. Answer from the passages found and from nothing else, and name the source of every claim. Scores rank "
        "passages but prove nothing: read them, and say so plainly if they do not answer the question.\n\n"
        f"More on passages, scores and errors: the skill {SKILL_URI}."
    )


# --- Answers as text -------------------------------------------------------------------------------------------------
# Some hosts show the model this text alone, others the structured content alone, so both say the same; but never a
# vector, which nobody can read.


def _embeddings_as_text(request: EmbeddingRequest, response: EmbeddingResponse) -> str:
    vectors, tokens = response["data"], response["usage"]["prompt_tokens"]
    first = vectors[0]["embedding"]
    length = len(base64.b64decode(first)) // 4 if isinstance(first, str) else len(first)
    if request.encoding_format == "base64":
        form = "each base64 of little-endian float32 bytes"
    else:
        form = (
            "as arrays of numbers. `encoding_format` 'base64' takes less than half of the room; to compare or rank "
            "texts, `similarity` and `search` answer without vectors"
        )
    count = "1 vector" if len(vectors) == 1 else f"{len(vectors)} vectors"
    return f"{count} of {length} numbers by {response['model']} ({tokens} tokens) in the structured content, {form}."


def _similarity_as_text(request: SimilarityRequest, response: SimilarityResponse) -> str:
    other = "input" if request.other is None else "other"
    measure = response.get("metric", request.mode)
    closer = "lower is closer" if measure == "euclidean" else "higher is closer"
    lines = [f"{measure} by {response['model']}, {closer}"]
    if "pairs" in response:
        lines += [f"input[{pair['input']}] {other}[{pair['other']}] {pair['score']:.4f}" for pair in response["pairs"]]
    else:
        width = len(response["scores"][0])
        lines[0] += f"; columns are {other}[0]" + (f" to {other}[{width - 1}]" if width > 1 else "")
        lines += [
            f"input[{index}] {' '.join(f'{score:.4f}' for score in row)}"
            for index, row in enumerate(response["scores"])
        ]
    return "\n".join(lines)


def _search_as_text(request: SearchRequest, response: SearchResponse) -> str:
    measure = "cosine" if request.mode == "dense" else request.mode
    hits = [f"input[{hit['index']}] {hit['score']:.4f}" for hit in response["results"]]
    return "\n".join([f"{measure} by {response['model']}, best first", *hits])


def _models_as_text(_request: ListModelsRequest, response: ModelsResponse) -> str:
    return "\n".join(f"{entry['id']}: {_model_as_text(entry)}" for entry in response["models"])


def _model_as_text(entry: ModelEntry) -> str:
    facts = ["the default model"] if entry["default"] else []
    if "dimensions" in entry:
        lengths = [entry["dimensions"], *entry["allowed_dimensions"]]
        facts.append(f"{' or '.join(map(str, lengths))} dimensions")
    if "max_tokens" in entry:
        facts.append(f"texts up to {entry['max_tokens']} tokens")
    facts.append(f"input_type {entry['input_type']}")
    if len(entry["modes"]) > 1:
        facts.append(f"modes {', '.join(entry['modes'])}")
    facts.append(f"served from {entry['served_from']}")
    if "licence" in entry:
        facts.append(f"licence {entry['licence']}")
    if entry["aliases"]:
        facts.append(f"also called {', '.join(entry['aliases'])}")
    return "; ".join(facts)


_READABLE: Mapping[Operation, Callable[[Any, Any], str]] = {
    CREATE_EMBEDDING: _embeddings_as_text,
    SIMILARITY: _similarity_as_text,
    SEARCH: _search_as_text,
    LIST_MODELS: _models_as_text,
}

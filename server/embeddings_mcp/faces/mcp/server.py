"""The MCP server: the service's operations as tools, model cards and the Agent Skill as resources, and two prompts.

One server object handles both stdio and streamable HTTP, in protocol versions 2025-11-25 and 2026-07-28. This layer
only translates; requests are parsed, validated and executed by the modules below it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
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
from embeddings_mcp.faces.mcp.response_text import model_as_text, response_as_text
from embeddings_mcp.faces.mcp.skills import SKILL_URI, SkillsExtension, use_embeddings
from embeddings_mcp.operations import OPERATIONS, Operation
from embeddings_mcp.publish.schemas import json_schema
from embeddings_mcp.request_limits import DEFAULT_LIMITS, Limits
from embeddings_mcp.schema import EmbeddingRequest, total_texts
from embeddings_mcp.serialization import dump_json, parse
from embeddings_mcp.service import EmbeddingService

if TYPE_CHECKING:
    from mcp.shared._stream_protocols import ReadStream, WriteStream

CARD_TEMPLATE = "embeddings://models/{+model}"
"""URI template of a model card; the plus leaves slashes in a model id unescaped (RFC 6570, section 3.2.3)."""

_CACHEABLE_METHODS: tuple[CacheableMethod, ...] = (
    "server/discover",
    "tools/list",
    "prompts/list",
    "resources/list",
    "resources/templates/list",
)
"""Methods whose results are the same for every caller and do not change while the server runs.

Reading a card is not among them: a card may gain details later.
"""

_LIST_TTL_MS = 5 * 60 * 1000
"""Longest time for which a client may see stale lists after the server was restarted with other models."""

PROGRESS_INTERVAL_SECONDS = 5.0
"""Seconds between two reports that a call is waiting: clients give up on a call without progress."""

_MAX_COMPLETIONS = 100  # the protocol's limit


class EmbeddingsServer(MCPServer[dict[str, Any]]):
    """An `MCPServer` whose tools are the service's operations, with exactly the published schemas.

    The SDK builds a tool from a function signature: it derives the schema, decodes strings that look like JSON, and
    drops unknown arguments. Each of these would break the mirrored API, so the methods that list and call tools are
    overridden and `serialization.parse` receives the arguments unchanged.

    Attributes:
        tools_listed: set once a client has requested the list of tools.
    """

    def __init__(self, service: EmbeddingService, limits: Limits) -> None:
        self._service = service
        self._limits = limits
        self._operations = {operation.name: operation for operation in OPERATIONS}
        self.tools_listed = asyncio.Event()
        self._advertised_tools = [_tool(operation, open_world=not service.catalog.is_local) for operation in OPERATIONS]
        super().__init__(
            "embeddings-mcp",
            title="Text embeddings",
            version=__version__,
            instructions=_instructions(service),
            extensions=[SkillsExtension()],
            cache_hints={
                method: CacheHint(ttl_ms=_LIST_TTL_MS, scope="public")
                for method in _CACHEABLE_METHODS
                if method != "resources/list" or service.catalog.is_local  # endpoint models are discovered later
            },
            subscriptions=False,
            log_level="WARNING",
        )

    async def run_on(self, read: ReadStream[SessionMessage | Exception], write: WriteStream[SessionMessage]) -> None:
        """Serve the client connected to these streams until it closes them."""
        await self._lowlevel_server.run(read, write, self._lowlevel_server.create_initialization_options())

    async def list_tools(self) -> list[Tool]:
        """Return the operations as tools, in the order of `OPERATIONS`."""
        self.tools_listed.set()
        return [*self._advertised_tools]

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[dict[str, Any], Any] | None = None
    ) -> CallToolResult:
        """Call a tool. Errors that the caller can fix are returned as a result with ``is_error``.

        Raises:
            MCPError: there is no such tool.
            UnexpectedToolError: an internal error. Its cause is logged and not sent to the caller.
        """
        operation = self._operations.get(name)
        if operation is None:
            raise MCPError(INVALID_PARAMS, f"Unknown tool: {name!r}; the tools are {', '.join(self._operations)}")
        try:
            request = parse(operation.request, arguments)
            over_http = _is_http(context)
            if over_http and isinstance(request, EmbeddingRequest):
                await self._check_expected_size(request)
            async with _progress_reports(request, context) as on_progress:
                response = await self._limits.run(self._service, operation, request, on_progress)
            text, structured = response_as_text(operation, request, response), dump_json(response)
            if over_http:
                response_size.check(request, len(text) + len(structured), self._limits.max_mcp_response_bytes)
        except EmbeddingsError as error:
            return CallToolResult(content=[TextContent(text=error.message)], is_error=True)
        except Exception as error:
            raise UnexpectedToolError(f"{name} failed inside the server; its log says why") from error
        return CallToolResult(
            content=[TextContent(text=text)],
            # Round-trip through JSON, so that floats keep the shortest digits of a float32.
            structured_content=orjson.loads(structured),
        )

    async def _check_expected_size(self, request: EmbeddingRequest) -> None:
        """Reject a request whose response would be too large, if the vector length is known in advance."""
        dimensions = request.dimensions
        if dimensions is None:
            embedder, _ = await self._service.catalog.find(request.model)
            dimensions = embedder.card.dimensions
        if dimensions is not None:
            expected = response_size.expected_bytes(request, dimensions)
            response_size.check(request, expected, self._limits.max_mcp_response_bytes)

    async def list_resources(self) -> list[Resource]:
        """Return the cards of the currently known models, followed by all other resources."""
        cards = [
            Resource(
                uri=CARD_TEMPLATE.replace("{+model}", quote(entry["id"], safe="/")),
                name=entry["id"],
                title=f"Embedding model {entry['id']}",
                description=model_as_text(entry),
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
            MCPError: unknown prompt or invalid arguments; the SDK alone would report both as internal errors.
        """
        try:
            return await super().get_prompt(name, arguments, context)
        except ValueError as error:
            raise MCPError(INVALID_PARAMS, str(error)) from error


def build_mcp_server(service: EmbeddingService, limits: Limits = DEFAULT_LIMITS) -> EmbeddingsServer:
    """Build the server for both transports. The caller remains responsible for closing `service`."""
    server = EmbeddingsServer(service, limits)
    _add_card_resources(server, service)
    server.prompt(title="Answer a question from texts")(answer_from_texts)
    server.prompt(title="Use embeddings well")(use_embeddings)

    async def complete(
        _reference: PromptReference | ResourceTemplateReference,
        argument: CompletionArgument,
        _context: CompletionContext | None,
    ) -> Completion | None:
        if argument.name != "model":
            return None
        names = ["default", *(entry["id"] for entry in service.known_models())]
        matching = [name for name in names if argument.value.lower() in name.lower()]
        return Completion(
            values=matching[:_MAX_COMPLETIONS], total=len(matching), has_more=len(matching) > _MAX_COMPLETIONS
        )

    server.completion()(complete)  # type: ignore[no-untyped-call]  # the SDK omits the return type
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
    """Return the instructions that hosts show the model along with the tools; hosts cut them at 2,048 characters."""
    return (
        "Compares and ranks texts by meaning, and makes embedding vectors.\n"
        "- Which of these passages answer a question? `search`.\n"
        "- How similar are these texts, which are duplicates? `similarity`, with `top_k` for many texts.\n"
        "- Vectors for a program, a file or a vector database? `create_embedding`; never to compare texts yourself.\n"
        "Give many texts in one call, as an array. Every string is taken literally, even if it looks like JSON. "
        "Indexes in results start at 0. A call knows only the texts it is given.\n"
        f"`model` may be `default`, which is {service.catalog.default_name}; `list_models` describes all models. "
        "Vectors and scores of different models cannot be compared.\n"
        f"Thresholds, choosing a model, handling errors: see the skill {SKILL_URI}."
    )


def _is_http(context: Context[dict[str, Any], Any] | None) -> bool:
    return context is not None and context.request_context.request is not None


@contextlib.asynccontextmanager
async def _progress_reports(
    request: BaseModel, context: Context[dict[str, Any], Any] | None
) -> AsyncIterator[OnProgress | None]:
    """Yield a callback that reports progress to the client; while nothing is done, the last report is repeated.

    The SDK sends nothing unless the client asked for it.
    """
    total = total_texts(request)
    if context is None or not total:
        yield None
        return
    latest, reported = 0, 0.0

    async def report(done: int) -> None:
        nonlocal latest, reported
        latest, waiting = done, done <= reported
        reported = reported + 0.001 if waiting else done  # the protocol requires progress to increase every time
        rest = ", waiting for the rest" if waiting and done < total else ""
        await context.report_progress(reported, total, f"{done} of {total} texts embedded{rest}")

    async def report_waiting() -> None:
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL_SECONDS)
            await report(latest)

    # Not a task group, which would wrap an exception of the block in an ExceptionGroup.
    reporter = asyncio.create_task(report_waiting())
    try:
        yield report
    finally:
        reporter.cancel()


# --- Resources and prompts -------------------------------------------------------------------------------------------


def _add_card_resources(server: EmbeddingsServer, service: EmbeddingService) -> None:
    """Serve every model's card as a resource, under any of the model's names."""

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
        description="What a model accepts and returns: vector lengths, maximum tokens, input types, where it runs.",
        mime_type="application/json",
    )(read_card)


def answer_from_texts(
    question: Annotated[str, Field(description="The question to answer.")],
    model: Annotated[str, Field(description="Embedding model to search with; `default` if omitted.")] = "default",
) -> str:
    """Find the passages that answer a question in the given texts, by meaning, and answer from them alone."""
    return (
        f"Answer this question from the texts I gave you or named: {question}\n\n"
        "1. Split the texts into passages of one to three paragraphs, and note the source of each.\n"
        f"2. Call `search` once with all passages as `input`, the question as `query`, `model` '{model}' and `top_k` 5."
        " If it finds little, search again with the words an answer would use.\n"
        "3. Answer only from the passages found, and cite the source of every claim. Scores rank passages but prove "
        "nothing: read the passages, and say so plainly if they do not answer the question.\n\n"
        f"More on passages, scores and errors: see the skill {SKILL_URI}."
    )

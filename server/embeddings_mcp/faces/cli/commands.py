"""The command line: it starts the server, and asks what the tools ask, for people and scripts.

Answers go to stdout, as a table or with ``--json`` as the very response that REST gives; all else goes to stderr. Exit
codes: 0 done, 1 refused or failed (a line on stderr says why), 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import anyio
import typer

from embeddings_mcp import __version__, logs
from embeddings_mcp.assemble import build_service, open_embedder
from embeddings_mcp.errors import EmbeddingsError, InvalidSetting
from embeddings_mcp.faces.cli.flags import refuse_self_endpoint, service_of, settings_of
from embeddings_mcp.faces.cli.options import (
    AskedEndpointOption,
    CacheOption,
    DefaultModelOption,
    DeviceOption,
    DimensionsOption,
    EndpointOption,
    InputTypeOption,
    JsonOption,
    ModelOption,
    ModeOption,
    PrecisionOption,
    ServedOption,
    TextsArgument,
    Transport,
    TruncateOption,
)
from embeddings_mcp.faces.cli.terminal import ask, lines_of, write
from embeddings_mcp.gc_pause import gc_paused
from embeddings_mcp.misspelt_settings import misspelt
from embeddings_mcp.models import find_id
from embeddings_mcp.operations import CREATE_EMBEDDING, LIST_MODELS, SEARCH, SIMILARITY
from embeddings_mcp.publish import identity
from embeddings_mcp.request_limits import Limits
from embeddings_mcp.schema import EncodingFormat
from embeddings_mcp.serialization import dump_json
from embeddings_mcp.service import EmbeddingService
from embeddings_mcp.settings import Load, Settings
from embeddings_mcp.vectors import Metric

_logger = logging.getLogger(__name__)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; an error that was foreseen, or is the system's, is one line on stderr and exit code 1."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr does: an answer is not lost for a character that the terminal, or a pipe on Windows, cannot hold.
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.getLogger("stamina").setLevel(logging.ERROR)  # says that something is tried again; who tries says what
    try:
        app()
    except EmbeddingsError as error:
        sys.stderr.write(f"embeddings-mcp: {error}\n")
        sys.exit(1)
    except (OSError, UnicodeError) as error:  # the latter of an argument that is not UTF-8
        sys.stderr.write(f"embeddings-mcp: {error}\n")
        sys.stdout = None  # where it could not be written, Python would try once more, and say a second error
        sys.exit(1)


@app.command()
def serve(
    *,
    transport: Annotated[Transport, typer.Option(help="stdio for one MCP host, http for MCP and REST.")] = "stdio",
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 if not set.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 8000 if not set, 0 takes a free one.")] = None,
    model: ServedOption = None,
    endpoint: EndpointOption = None,
    capability: Annotated[
        Path | None,
        typer.Option(
            "--manifest", metavar="FILE", help="An Ikanos or Naftiko capability that says where endpoints are."
        ),
    ] = None,
    default_model: DefaultModelOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    workers: Annotated[int | None, typer.Option(help="Batches of a local model at the same time.")] = None,
    load: Annotated[
        Load | None, typer.Option(help="When the default model is loaded; beside the first answers if not set.")
    ] = None,
    cache: CacheOption = None,
) -> None:
    """Serve the tools over MCP (stdio or HTTP) and the REST API (HTTP)."""
    settings = settings_of(
        models=model,
        endpoints=endpoint,
        default_model=default_model,
        device=device,
        precision=precision,
        workers=workers,
        load=load,
        cache=cache,
        host=host,
        port=port,
    )
    if capability is not None:
        from embeddings_mcp.manifest import read_manifest

        read = read_manifest(capability)
        for note in read.notes:
            sys.stderr.write(f"embeddings-mcp: {note}\n")
        settings = read.added_to(settings)
    logs.configure(settings)
    for word in misspelt(os.environ, settings):
        _logger.warning(word)
    if transport == "http":
        refuse_self_endpoint(settings)
        if settings.model_process is None and os.name == "posix":
            settings = settings.model_copy(update={"model_process": True})
    # Imported late, since the other commands need none of it.
    with gc_paused():
        from embeddings_mcp.faces.mcp.server import build_mcp_server

        service = build_service(settings)
        server = build_mcp_server(service, Limits.of(settings))
    if transport == "http":
        from embeddings_mcp.faces.http.app import serve_http

        serve_http(service, server, settings)
    else:
        from embeddings_mcp.faces.mcp.stdio import serve_stdio

        serve_stdio(service, server, settings)


@app.command()
def embed(
    texts: TextsArgument,
    *,
    model: ModelOption = None,
    endpoint: AskedEndpointOption = None,
    input_type: InputTypeOption = None,
    truncate: TruncateOption = "NONE",
    dimensions: DimensionsOption = None,
    encoding_format: Annotated[EncodingFormat, typer.Option(help="How --json writes a vector.")] = "float",
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn texts into vectors."""
    lines = lines_of(texts)
    answer = ask(
        CREATE_EMBEDDING,
        service_of(model, endpoint, device, precision, cache),
        input=lines,
        input_type=input_type,
        truncate=truncate,
        dimensions=dimensions,
        encoding_format=encoding_format if as_json else "float",
    )
    from embeddings_mcp.faces.cli import tables

    write(dump_json(answer) if as_json else tables.embeddings(answer, lines))


@app.command()
def similarity(
    texts: TextsArgument,
    *,
    other: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Compare with this text; may be given several times.")
    ] = None,
    metric: Annotated[Metric, typer.Option(help="How closeness is measured.")] = "cosine",
    mode: ModeOption = "dense",
    top_k: Annotated[int | None, typer.Option(help="Show only this many closest pairs.")] = None,
    model: ModelOption = None,
    endpoint: AskedEndpointOption = None,
    input_type: InputTypeOption = None,
    truncate: TruncateOption = "NONE",
    dimensions: DimensionsOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score how alike texts are: with each other, or with every --other."""
    lines = lines_of(texts)
    others = lines_of(other) if other else None
    answer = ask(
        SIMILARITY,
        service_of(model, endpoint, device, precision, cache),
        input=lines,
        other=others,
        metric=metric,
        mode=mode,
        top_k=top_k,
        input_type=input_type,
        truncate=truncate,
        dimensions=dimensions,
    )
    from embeddings_mcp.faces.cli import tables

    write(dump_json(answer) if as_json else tables.similarity(answer, lines, others or lines))


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    texts: TextsArgument,
    *,
    top_k: Annotated[int, typer.Option(help="Show at most this many passages.")] = 10,
    mode: ModeOption = "dense",
    model: ModelOption = None,
    endpoint: AskedEndpointOption = None,
    truncate: TruncateOption = "NONE",
    dimensions: DimensionsOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Rank passages by how well they answer a query."""
    lines = lines_of(texts)
    answer = ask(
        SEARCH,
        service_of(model, endpoint, device, precision, cache),
        query=query,
        input=lines,
        top_k=top_k,
        mode=mode,
        truncate=truncate,
        dimensions=dimensions,
    )
    from embeddings_mcp.faces.cli import tables

    write(dump_json(answer) if as_json else tables.search(answer, lines))


@app.command()
def models(
    *,
    model: ServedOption = None,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the models that would be served."""

    async def service() -> EmbeddingService:
        return build_service(settings_of(models=model, endpoints=endpoint))

    answer = ask(LIST_MODELS, service)
    from embeddings_mcp.faces.cli import tables

    write(dump_json(answer) if as_json else tables.models(answer))


@app.command()
def verify(
    *,
    model: Annotated[str, typer.Option(metavar="ID[=PATH]", help="The model that is to take over.")],
    against: Annotated[
        str, typer.Option(metavar="URL|ID[=PATH]", help="What made the vectors so far: an endpoint, or a local model.")
    ],
    against_model: Annotated[
        str | None, typer.Option(metavar="ID", help="The model's name at the endpoint, where it has several.")
    ] = None,
    endpoint: AskedEndpointOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
) -> None:
    """Tell whether two models make the same vectors: before you move off an endpoint that is switched off."""
    from embeddings_mcp.faces.cli import tables
    from embeddings_mcp.verification import Verdict
    from embeddings_mcp.verification import verify as verify_embedders

    async def compare() -> Verdict:
        async with contextlib.AsyncExitStack() as stack:
            service = await stack.enter_async_context(
                contextlib.aclosing(await service_of(model, endpoint, device, precision)())
            )
            one, _ = await service.catalogue.find("default")
            other = await open_embedder(against, against_model or one.card.id, settings_of(device=device))
            stack.push_async_callback(other.aclose)
            return await verify_embedders(one, other)

    verdict = anyio.run(compare)
    write(tables.comparisons(verdict))
    write(f"{verdict.words}\n".encode())
    raise typer.Exit(0 if verdict.same else 1)


@app.command()
def manifest(
    *,
    document: Annotated[identity.Format, typer.Option("--format", help="Which description.")] = "ikanos",
    url: Annotated[str, typer.Option(help="Address of the server that it is about.")] = identity.LOCAL_URL,
) -> None:
    """Print what the server publishes of itself: a capability, its API, or a card for an index."""
    if not url.startswith(("http://", "https://")):
        raise InvalidSetting(f"--url must be an address such as {identity.LOCAL_URL}, not {url!r}")
    from embeddings_mcp.publish.documents import FORMATS

    write(FORMATS[document].text(url.rstrip("/")).rstrip("\n").encode())


@app.command()
def demo(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to try it on.")] = None,
) -> None:
    """Start the server over stdio as an MCP host would, and ask it a few things."""
    from embeddings_mcp.faces.cli.demo import run_demo

    anyio.run(run_demo, lines_of(texts) if texts else None)


@app.command()
def doctor(
    *,
    model: ServedOption = None,
    endpoint: EndpointOption = None,
    default_model: DefaultModelOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Try all that a server with these settings would use; for each problem, say the next step, and exit with 1."""
    from rich.console import Console

    from embeddings_mcp.faces.cli import tables
    from embeddings_mcp.faces.cli.doctor import Finding, examine, problem

    found: list[Finding] = []

    def take(finding: Finding) -> None:
        found.append(finding)
        if not as_json:
            Console().print(tables.finding(finding), soft_wrap=True)

    async def look(settings: Settings) -> None:
        async for finding in examine(settings):
            take(finding)

    try:
        settings = settings_of(
            models=model, endpoints=endpoint, default_model=default_model, device=device, precision=precision
        )
    except InvalidSetting as error:
        take(problem("settings", error))
    else:
        anyio.run(look, settings)
    healthy = all(finding.state != "problem" for finding in found)
    if as_json:
        write(_with_paths({"healthy": healthy, "findings": [asdict(finding) for finding in found]}))
    raise typer.Exit(0 if healthy else 1)


@app.command()
def key(name: Annotated[str, typer.Argument(help="Whose key it is to be.")]) -> None:
    """Make an API key: it goes to stderr and is kept nowhere; its line for the file of keys goes to stdout."""
    from embeddings_mcp.faces.http.api_keys import new_key

    made, line = new_key(name)
    sys.stderr.write(f"embeddings-mcp: the key of {name}, shown only now: {made}\n")
    write(line.encode())


@app.command("cache")
def keep_cache(
    action: Annotated[Literal["info", "clear"], typer.Argument(help="Say what it holds, or have it forget that.")],
    *,
    cache: CacheOption = None,
    model: Annotated[str | None, typer.Option(metavar="ID", help="Forget this model's vectors only.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Look into the folder of the cache, or clear it, also for running servers; restart those that have no folder."""
    settings = settings_of(cache=cache)
    chosen = settings.cache
    if chosen in {"memory", "off"}:
        raise InvalidSetting(
            "the cache has no folder: give it with --cache DIR, or in EMBEDDINGS_MCP_CACHE; what a server remembers in "
            "memory only is forgotten when it is restarted"
        )
    from embeddings_mcp.embedders.cache import maintenance

    place = Path(chosen)
    if action == "clear":
        forgotten = maintenance.clear(place, None if model is None else find_id(model, settings.cards))
        said = f"{forgotten:,} vectors forgotten"
        if not forgotten and (left := {holding.model for holding in maintenance.inspect_cache(place).holdings}):
            said += f": the cache has none of {model}, only of {', '.join(sorted(left))}"
        write(dump_json({"forgotten": forgotten}) if as_json else said.encode())
        return
    from embeddings_mcp.faces.cli import tables

    contents = maintenance.inspect_cache(place)
    write(_with_paths(asdict(contents)) if as_json else tables.cache(contents))


def _with_paths(answer: object) -> bytes:
    """An answer as JSON, where bytes of a path that are not UTF-8 have half of a character each, as Python has them."""
    return json.dumps(answer, ensure_ascii=False).encode(errors="backslashreplace")


@app.command()
def version() -> None:
    """Print the version."""
    write(__version__.encode())


def _print_version(wanted: bool) -> None:  # noqa: FBT001 - as typer calls it
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def before_any_command(
    *,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Text embeddings for agents: an MCP server with an OpenAI-compatible REST API, and the same from a terminal."""

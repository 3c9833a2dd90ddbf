"""The command line: starts the server, and offers the tools' operations to people and scripts.

Results go to stdout, as a table or, with ``--json``, as the JSON that the tool returns; everything else goes to
stderr. Exit codes: 0 success, 1 error (explained by one line on stderr), 2 wrong usage.
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
from embeddings_mcp.faces.cli.flags import refuse_self_endpoint, service_factory, settings_from_flags
from embeddings_mcp.faces.cli.options import (
    CacheOption,
    DefaultModelOption,
    DeviceOption,
    DimensionsOption,
    InputTypeOption,
    JsonOption,
    ModelEndpointOption,
    ModelOption,
    ModeOption,
    PrecisionOption,
    ServedEndpointsOption,
    ServedModelsOption,
    TextsArgument,
    Transport,
    TruncateOption,
)
from embeddings_mcp.faces.cli.terminal import expand_stdin, run_operation, write_result
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
    """Run the command line. Expected errors and errors of the system become one line on stderr and exit code 1."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As for stderr: escape characters that the encoding of a terminal or a Windows pipe lacks, instead of failing.
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.getLogger("stamina").setLevel(logging.ERROR)  # retries are logged by the code that makes them
    try:
        app()
    except EmbeddingsError as error:
        sys.stderr.write(f"embeddings-mcp: {error}\n")
        sys.exit(1)
    except (OSError, UnicodeError) as error:  # UnicodeError: an argument is not UTF-8
        sys.stderr.write(f"embeddings-mcp: {error}\n")
        sys.stdout = None  # otherwise Python flushes it again at exit and reports a second error
        sys.exit(1)


@app.command(epilog=f"Other settings, such as API keys, are environment variables: {identity.REPOSITORY}#settings")
def serve(
    *,
    transport: Annotated[
        Transport, typer.Option(help="stdio for the MCP host that starts it, http for MCP and REST.")
    ] = "stdio",
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 by default.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 8000 by default, 0 picks a free port.")] = None,
    model: ServedModelsOption = None,
    endpoint: ServedEndpointsOption = None,
    capability: Annotated[
        Path | None,
        typer.Option("--manifest", metavar="FILE", help="Ikanos or Naftiko capability file that declares endpoints."),
    ] = None,
    default_model: DefaultModelOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    workers: Annotated[int | None, typer.Option(help="Number of batches that a local model runs in parallel.")] = None,
    load: Annotated[
        Load | None, typer.Option(help="When to load the default model; in the background by default.")
    ] = None,
    cache: CacheOption = None,
) -> None:
    """Serve the tools over MCP (stdio or HTTP) and the REST API (HTTP)."""
    if transport == "stdio" and (host is not None or port is not None):
        # The server would silently wait for MCP messages on stdin, and the address would refuse connections.
        raise InvalidSetting("--host and --port have an effect only with --transport http")
    settings = settings_from_flags(
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

        declared = read_manifest(capability)
        for note in declared.notes:
            sys.stderr.write(f"embeddings-mcp: {note}\n")
        settings = declared.added_to(settings)
    logs.configure(settings)
    for warning in misspelt(os.environ, settings):
        _logger.warning(warning)
    if transport == "http":
        refuse_self_endpoint(settings)
        if settings.model_process is None and os.name == "posix":
            settings = settings.model_copy(update={"model_process": True})
    # Imported late: the other commands do not need these modules.
    with gc_paused():
        from embeddings_mcp.faces.mcp.server import build_mcp_server

        service = build_service(settings)
        server = build_mcp_server(service, Limits.from_settings(settings))
    if transport == "http":
        from embeddings_mcp.faces.http.app import serve_http

        serve_http(service, server, settings)
    else:
        from embeddings_mcp.faces.mcp.stdio import serve_stdio

        if sys.stdin is not None and sys.stdin.isatty():  # started by a person, who would see nothing happen
            sys.stderr.write("embeddings-mcp: waiting for MCP messages on stdin; for a URL, use --transport http\n")
        serve_stdio(service, server, settings)


@app.command()
def embed(
    texts: TextsArgument,
    *,
    model: ModelOption = None,
    endpoint: ModelEndpointOption = None,
    input_type: InputTypeOption = None,
    truncate: TruncateOption = "NONE",
    dimensions: DimensionsOption = None,
    encoding_format: Annotated[
        EncodingFormat, typer.Option(help="Encoding of vectors in the --json output.")
    ] = "float",
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn texts into vectors."""
    lines = expand_stdin(texts)
    response = run_operation(
        CREATE_EMBEDDING,
        service_factory(model, endpoint, device, precision, cache),
        input=lines,
        input_type=input_type,
        truncate=truncate,
        dimensions=dimensions,
        encoding_format=encoding_format if as_json else "float",
    )
    from embeddings_mcp.faces.cli import tables

    write_result(dump_json(response) if as_json else tables.embeddings(response, lines))


@app.command()
def similarity(
    texts: TextsArgument,
    *,
    other: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Compare with this text; can be repeated.")
    ] = None,
    metric: Annotated[Metric, typer.Option(help="Similarity or distance measure.")] = "cosine",
    mode: ModeOption = "dense",
    top_k: Annotated[int | None, typer.Option(help="Show only this many closest pairs.")] = None,
    model: ModelOption = None,
    endpoint: ModelEndpointOption = None,
    input_type: InputTypeOption = None,
    truncate: TruncateOption = "NONE",
    dimensions: DimensionsOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score how similar texts are: to each other, or to every --other text."""
    lines = expand_stdin(texts)
    others = expand_stdin(other) if other else None
    response = run_operation(
        SIMILARITY,
        service_factory(model, endpoint, device, precision, cache),
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

    write_result(dump_json(response) if as_json else tables.similarity(response, lines, others or lines))


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    texts: TextsArgument,
    *,
    top_k: Annotated[int, typer.Option(help="Show at most this many passages.")] = 10,
    mode: ModeOption = "dense",
    model: ModelOption = None,
    endpoint: ModelEndpointOption = None,
    truncate: TruncateOption = "NONE",
    dimensions: DimensionsOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Rank passages by how well they answer a query."""
    lines = expand_stdin(texts)
    response = run_operation(
        SEARCH,
        service_factory(model, endpoint, device, precision, cache),
        query=query,
        input=lines,
        top_k=top_k,
        mode=mode,
        truncate=truncate,
        dimensions=dimensions,
    )
    from embeddings_mcp.faces.cli import tables

    write_result(dump_json(response) if as_json else tables.search(response, lines))


@app.command()
def models(
    *,
    model: ServedModelsOption = None,
    endpoint: ServedEndpointsOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the models that would be served."""

    async def service() -> EmbeddingService:
        return build_service(settings_from_flags(models=model, endpoints=endpoint))

    response = run_operation(LIST_MODELS, service)
    from embeddings_mcp.faces.cli import tables

    write_result(dump_json(response) if as_json else tables.models(response))


@app.command()
def verify(
    *,
    model: Annotated[str, typer.Option(metavar="ID[=PATH]", help="The new model.")],
    against: Annotated[
        str,
        typer.Option(metavar="URL|ID[=PATH]", help="The source of the existing vectors: an endpoint or a local model."),
    ],
    against_model: Annotated[
        str | None, typer.Option(metavar="ID", help="The model's name at the endpoint, if it serves several.")
    ] = None,
    endpoint: ModelEndpointOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
) -> None:
    """Check whether two models produce the same vectors, e.g. before an endpoint is switched off."""
    from embeddings_mcp.faces.cli import tables
    from embeddings_mcp.verification import Verdict
    from embeddings_mcp.verification import verify as verify_embedders

    async def compare() -> Verdict:
        async with contextlib.AsyncExitStack() as stack:
            service = await stack.enter_async_context(
                contextlib.aclosing(await service_factory(model, endpoint, device, precision)())
            )
            one, _ = await service.catalog.find("default")
            other = await open_embedder(against, against_model or one.card.id, settings_from_flags(device=device))
            stack.push_async_callback(other.aclose)
            return await verify_embedders(one, other)

    verdict = anyio.run(compare)
    write_result(tables.comparisons(verdict))
    write_result(f"{verdict.summary}\n".encode())
    raise typer.Exit(0 if verdict.same else 1)


@app.command()
def manifest(
    *,
    document: Annotated[identity.Format, typer.Option("--format", help="Which document to print.")] = "ikanos",
    url: Annotated[str, typer.Option(help="URL of the server that it describes.")] = identity.LOCAL_URL,
) -> None:
    """Print a document that describes the server: a capability, the API, or an index entry."""
    if not url.startswith(("http://", "https://")):
        raise InvalidSetting(f"--url must be a URL such as {identity.LOCAL_URL}, not {url!r}")
    from embeddings_mcp.publish.documents import FORMATS

    write_result(FORMATS[document].text(url.rstrip("/")).rstrip("\n").encode())


@app.command()
def demo(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to use instead of the built-in samples.")] = None,
) -> None:
    """Start the server over stdio as an MCP host would, and call its tools."""
    from embeddings_mcp.faces.cli.demo import run_demo

    anyio.run(run_demo, expand_stdin(texts) if texts else None)


@app.command()
def doctor(
    *,
    model: ServedModelsOption = None,
    endpoint: ServedEndpointsOption = None,
    default_model: DefaultModelOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check everything that a server with these settings would use, and suggest fixes; exit with 1 on any problem."""
    from rich.console import Console

    from embeddings_mcp.faces.cli import tables
    from embeddings_mcp.faces.cli.doctor import Finding, examine, problem

    findings: list[Finding] = []

    def report(finding: Finding) -> None:
        findings.append(finding)
        if not as_json:
            Console().print(tables.finding(finding), soft_wrap=True)

    async def check(settings: Settings) -> None:
        async for finding in examine(settings):
            report(finding)

    try:
        settings = settings_from_flags(
            models=model, endpoints=endpoint, default_model=default_model, device=device, precision=precision
        )
    except InvalidSetting as error:
        report(problem("settings", error))
    else:
        anyio.run(check, settings)
    healthy = all(finding.state != "problem" for finding in findings)
    if as_json:
        write_result(_json_with_paths({"healthy": healthy, "findings": [asdict(finding) for finding in findings]}))
    raise typer.Exit(0 if healthy else 1)


@app.command()
def key(name: Annotated[str, typer.Argument(help="Name of the caller that will use the key.")]) -> None:
    """Create an API key: print it to stderr, without storing it, and its line for the file of keys to stdout."""
    from embeddings_mcp.faces.http.api_keys import new_key

    created, line = new_key(name)
    sys.stderr.write(f"embeddings-mcp: the key of {name}, shown only once: {created}\n")
    write_result(line.encode())


@app.command("cache")
def manage_cache(
    action: Annotated[Literal["info", "clear"], typer.Argument(help="Show the contents, or delete them.")],
    *,
    cache: Annotated[
        str | None, typer.Option(metavar="DIR", help="The cache folder; EMBEDDINGS_MCP_CACHE if not given.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="ID", help="Only delete the vectors of this model.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Inspect or clear the cache folder, also while servers use it; to clear a cache in memory, restart the server."""
    settings = settings_from_flags(cache=cache)
    if settings.cache in {"memory", "off"}:
        raise InvalidSetting(
            "the cache has no folder: set one with --cache DIR or EMBEDDINGS_MCP_CACHE; a cache in memory is cleared "
            "by restarting the server"
        )
    from embeddings_mcp.embedders.cache import maintenance

    folder = Path(settings.cache)
    if action == "clear":
        removed = maintenance.clear(folder, None if model is None else find_id(model, settings.cards))
        message = f"{removed:,} vectors removed"
        if not removed and (remaining := {holding.model for holding in maintenance.inspect_cache(folder).holdings}):
            message += f": the cache has none of {model}, only of {', '.join(sorted(remaining))}"
        write_result(dump_json({"removed": removed}) if as_json else message.encode())
        return
    from embeddings_mcp.faces.cli import tables

    contents = maintenance.inspect_cache(folder)
    write_result(_json_with_paths(asdict(contents)) if as_json else tables.cache(contents))


def _json_with_paths(content: object) -> bytes:
    """Encode as JSON; path bytes that are not UTF-8 become lone surrogate escapes, as in Python strings."""
    return json.dumps(content, ensure_ascii=False).encode(errors="backslashreplace")


@app.command()
def version() -> None:
    """Print the version."""
    write_result(__version__.encode())


def _print_version(wanted: bool) -> None:  # noqa: FBT001 - the signature that typer requires
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def root(
    *,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Text embeddings for agents: an MCP server with an OpenAI-compatible REST API, also usable from the terminal."""

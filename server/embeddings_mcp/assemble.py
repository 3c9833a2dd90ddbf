"""Build services and embedders from settings; the one module that knows every kind of embedder."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import SecretStr

from embeddings_mcp.catalog import DEFAULT, ModelSource, model_ids, resolve_name
from embeddings_mcp.embedders.base import Embedder
from embeddings_mcp.embedders.cache import Cache, DiskStore, MemoryStore, cached
from embeddings_mcp.embedders.local.checkpoint import Checkpoint, read_checkpoint
from embeddings_mcp.embedders.local.fingerprint import file_digest, file_state
from embeddings_mcp.embedders.local.locate import find_bundled
from embeddings_mcp.embedders.local.model_files import ModelFiles
from embeddings_mcp.embedders.local.runtime.load_parameters import LoadParameters
from embeddings_mcp.embedders.local.runtime.loaded_model import LoadedModel
from embeddings_mcp.embedders.local_embedder import LocalEmbedder
from embeddings_mcp.errors import CheckpointInvalid, InvalidRequest, InvalidSetting, UnknownModel
from embeddings_mcp.models import DEFAULT_MODEL, ModelCard, find_card, find_cards, find_id
from embeddings_mcp.service import EmbeddingService
from embeddings_mcp.settings import EndpointSettings, Settings

# Modules for endpoints are imported only if there is one: a server without endpoints starts without an HTTP client.
if TYPE_CHECKING:
    from embeddings_mcp.embedders.nim import Endpoint

_TIMESTAMP_RESOLUTION_SECONDS = 2.0
"""Resolution of file timestamps on some file systems: two changes closer together than this may have the same time."""


def build_service(settings: Settings) -> EmbeddingService:
    """Build a service for the models of the settings, without reading weights or calling endpoints.

    Raises:
        CheckpointInvalid: a folder given as a model's path is not a checkpoint.
        InvalidSetting: a model is not given as ``ID`` or ``ID=PATH``, two models have the same name or alias, the
            default model is not among them, or an endpoint's settings are invalid.
    """
    cache = _open_cache(settings)
    embedders = [_with_cache(_local_embedder(spec, settings, cache), cache) for spec in _local_models(settings)]
    default = settings.default_model or (embedders[0].card.id if embedders else DEFAULT_MODEL)
    return EmbeddingService(
        embedders, default_model=default, sources=endpoint_models(settings, cache), keys=_keys_in(settings)
    )


async def build_service_for_model(
    settings: Settings, model: str | None, *, at_endpoint: bool = False
) -> EmbeddingService:
    """Build a service for one model, which is its default.

    A name is looked up among the models of the settings, then at endpoints; otherwise it is a model that runs locally.
    The endpoints of the settings are asked for their models; the hosted API is not: its built-in list is used.

    Args:
        settings: the models and endpoints.
        model: ``ID`` or ``ID=PATH``; ``default`` or None for the default model or, with `at_endpoint`, the only one.
        at_endpoint: whether the model must be served by an endpoint.

    Raises:
        InvalidRequest: no model was named, and the endpoints have several.
        EmbeddingsError: an endpoint cannot be reached, or none has the model; and as `build_service`.
    """
    if model is not None and model.lower() == DEFAULT:
        model = None
    if not at_endpoint:
        if model is None:
            return build_service(settings)
        if "=" in model or _find_spec(model, settings):
            return build_service(settings_for_model(settings, model))
    sources = endpoint_models(settings, _open_cache(settings), ask_hosted=False)
    async with contextlib.AsyncExitStack() as stack:
        for source in sources:
            stack.push_async_callback(source.aclose)
            await source.discover(0)
        models = [source.models for source in sources]
        ids = model_ids(*models)
        if model is None and len(ids) != 1:
            raise InvalidRequest(f"say which model with --model: the endpoint has {', '.join(ids) or 'none'}")
        name = ids[0] if model is None else model
        if at_endpoint or any(resolve_name(name, of_source) for of_source in models):
            stack.pop_all()
            return EmbeddingService((), default_model=name, sources=sources)
    return build_service(settings_for_model(settings, name))


def settings_for_model(settings: Settings, model: str) -> Settings:
    """Return the settings reduced to one local model, which is the default.

    Args:
        settings: give the path of the model, if they have a model of that name.
        model: ``ID`` or ``ID=PATH``.
    """
    spec = model if "=" in model else _find_spec(model, settings) or model
    changes = {"models": (spec,), "default_model": None, "endpoints": (), "nvidia_api_key": None}
    return settings.model_copy(update=changes)


async def open_embedder(where: str, model: str, settings: Settings) -> Embedder:
    """Open one embedder outside of a service, for a local model or for a model of an endpoint.

    Args:
        where: the endpoint's URL, or a local model as ``ID`` or ``ID=PATH``; ``default`` for the default model.
        model: name or alias of the endpoint's model.
        settings: if they have a local model of that name, its path is used; if they have an endpoint of that URL, its
            key and options.

    Raises:
        UnknownModel: the endpoint has no such model.
        EmbeddingsError: the endpoint cannot be reached.
    """
    if "://" not in where:
        name = (settings.default_model or settings.models[0]) if where.lower() == DEFAULT else where
        (spec,) = settings_for_model(settings, name).models
        return _local_embedder(spec, settings)
    url = _normalized(where)
    configured = (endpoint for endpoint in settings.endpoints if _normalized(endpoint.url) == url)
    endpoint = next(configured, EndpointSettings(url=where))
    source, *_ = endpoint_models(settings.model_copy(update={"endpoints": (endpoint,)}))
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(source.aclose)
        await source.discover(0)
        names = {model.lower()} | (card.names if (card := find_card(model)) else set())
        embedder = next((embedder for name, embedder in source.models.items() if name in names), None)
        if embedder is not None:
            stack.pop_all()
            return embedder
    raise UnknownModel(f"{where} has no model {model!r}; it has: {', '.join(model_ids(source.models)) or 'none'}")


def endpoint_models(settings: Settings, cache: Cache | None = None, *, ask_hosted: bool = True) -> list[ModelSource]:
    """Return the models of each endpoint in the order of the settings, then those of the hosted API if there is a key.

    Args:
        settings: the endpoints and their keys.
        cache: the cache to wrap their embedders with.
        ask_hosted: whether to ask the hosted API for its models if it is not among the endpoints of the settings.
    """
    if not settings.endpoints and settings.nvidia_api_key is None:
        return []
    from embeddings_mcp.embedders.nim import HOSTED_MODELS, HOSTED_URL, EndpointClient, EndpointModels

    endpoints = [(configured, _endpoint(configured, settings)) for configured in settings.endpoints]
    if settings.nvidia_api_key is not None and not any(endpoint.hosted for _, endpoint in endpoints):
        hosted = EndpointSettings(url=HOSTED_URL, models=None if ask_hosted else HOSTED_MODELS)
        endpoints.append((hosted, _endpoint(hosted, settings)))
    return [
        EndpointModels(
            EndpointClient(endpoint),
            known=configured.models or (HOSTED_MODELS if endpoint.hosted else ()),
            complete=configured.models is not None,
            user_cards=settings.cards,
            wrap=functools.partial(_with_cache, cache=cache),
        )
        for configured, endpoint in endpoints
    ]


def _endpoint(configured: EndpointSettings, settings: Settings) -> Endpoint:
    """Return the endpoint of these settings, with its key."""
    from embeddings_mcp.embedders.nim import Endpoint

    options = configured.model_dump(exclude_none=True, exclude={"models", "api_key", "api_key_env"})
    endpoint = Endpoint(**options)
    if configured.api_key is not None:
        return replace(endpoint, api_key=configured.api_key, key_name="the endpoint's `api_key`")
    if (variable := configured.api_key_env) is not None:
        key = os.environ.get(variable)
        if not key and not re.fullmatch("[A-Z_][A-Z0-9_]*", variable):
            raise InvalidSetting(
                f"`api_key_env` of the endpoint {endpoint.url} takes the name of an environment variable, not the key; "
                "no variable of the given name is set, and the name is not repeated here, since it may be the key"
            )
        if not key:
            raise InvalidSetting(
                f"the endpoint {endpoint.url} has its key in the environment variable {variable}, which is not set"
            )
        return replace(endpoint, api_key=SecretStr(key), key_name=variable)
    if endpoint.hosted:
        return replace(endpoint, api_key=settings.nvidia_api_key)
    return replace(endpoint, key_name="the endpoint's `api_key_env`")


def _keys_in(settings: Settings) -> list[SecretStr]:
    """Return the keys of this server and of the endpoints."""
    keys = [settings.api_key, settings.nvidia_api_key]
    if settings.api_keys is not None:
        keys += [SecretStr(entry.partition("=")[2]) for entry in settings.api_keys.get_secret_value().split()]
    keys += [_endpoint(configured, settings).api_key for configured in settings.endpoints]
    return [key for key in keys if key is not None]


def _local_models(settings: Settings) -> tuple[str, ...]:
    """Return the specs of the local models: none if they are not set explicitly, there are endpoints and no torch."""
    explicit = "models" in settings.model_fields_set
    has_endpoints = bool(settings.endpoints) or settings.nvidia_api_key is not None
    return settings.models if explicit or not has_endpoints or _has_torch() else ()


def _has_torch() -> bool:
    try:
        return importlib.util.find_spec("torch") is not None
    except ModuleNotFoundError:  # an import hook that blocks packages may raise it
        return False


def _normalized(url: str) -> str:
    return url.strip().rstrip("/").removesuffix("/v1").lower()


def _local_embedder(spec: str, settings: Settings, cache: Cache | None = None) -> LocalEmbedder:
    """Return the embedder of a model given as ``ID`` or ``ID=PATH``.

    With a cache on disk, its identity must stay the same across restarts, so its files are hashed.
    """
    given_name, folder = _parse_spec(spec)
    name = find_id(given_name, settings.cards)
    user_card, builtin_card = find_cards(given_name, settings.cards)
    if checkpoint := folder or find_bundled(name):
        try:
            card = read_checkpoint(checkpoint, builtin_card).card(name, builtin_card, user_card)
        except OSError as error:
            raise CheckpointInvalid(f"{checkpoint} cannot be read: {error}") from error
    else:
        card = builtin_card or ModelCard(id=name)
        card = user_card.apply_to(card) if user_card else card
    files = ModelFiles(
        name,
        builtin_card=builtin_card,
        user_card=user_card,
        folder=folder,
        repository=card.repository,
        device=settings.device,
        precision=settings.precision,
        cuda_graphs=settings.cuda_graphs,
        start_process=functools.partial(_start_process, workers=settings.workers) if settings.model_process else None,
        digest=file_state if cache is None or cache.disk is None else _memoized_digest(cache.disk),
    )
    return LocalEmbedder(
        card,
        files.load,
        files.identify,
        max_queued_tokens=settings.max_queued_tokens,
        workers=settings.workers,
    )


def _start_process(load_parameters: LoadParameters, checkpoint: Checkpoint, *, workers: int | None) -> LoadedModel:
    """Load the model in a subprocess."""
    # Imported here, since it imports the tokenizer, which is slow.
    from embeddings_mcp.embedders.local.runtime.model_process import ModelProcess

    return ModelProcess(load_parameters, checkpoint, workers=workers)


def _open_cache(settings: Settings) -> Cache | None:
    """Return the cache of the settings; its file is opened on first use."""
    if settings.cache == "off":
        return None
    memory = MemoryStore(settings.cache_memory_mb << 20)
    if settings.cache == "memory":
        return Cache(memory)
    return Cache(memory, DiskStore(Path(settings.cache), settings.cache_disk_mb << 20))


def _with_cache(embedder: Embedder, cache: Cache | None) -> Embedder:
    """Wrap an embedder with the cache, if there is one."""
    return embedder if cache is None else cached(embedder, cache)


def _memoized_digest(disk: DiskStore) -> Callable[[Path], str]:
    """Return `file_digest`, which reads the whole file, memoized on disk by the file's state."""

    def digest(path: Path) -> str:
        if time.time() - path.stat().st_ctime < _TIMESTAMP_RESOLUTION_SECONDS:
            return file_digest(path)
        return disk.get_or_compute_note(file_state(path), lambda: file_digest(path))

    return digest


def _find_spec(model: str, settings: Settings) -> str | None:
    """Return the spec of the model of this name in the settings; None if they do not have it."""

    def resolved(spec: str) -> str:
        name, _ = _parse_spec(spec)
        return find_id(name, settings.cards).lower()

    model_id = resolved(model)
    return next((spec for spec in settings.models if resolved(spec) == model_id), None)


def _parse_spec(spec: str) -> tuple[str, Path | None]:
    """Split ``ID`` or ``ID=PATH`` into the name and the folder, if there is one.

    Raises:
        InvalidSetting: it is neither.
    """
    name, equals, path = spec.partition("=")
    if not name or (equals and not path):
        raise InvalidSetting(f"the model {spec!r} must be given as ID or as ID=PATH")
    if not name.isprintable():
        raise InvalidSetting(f"the model {spec!r} must have a name in UTF-8 without control characters")
    if name.startswith(("/", ".", "~")) or "\\" in name:
        raise InvalidSetting(f"the model {spec!r} is a path: give it a name, as in my-model={spec}")
    try:
        return name, Path(path).expanduser() if path else None
    except RuntimeError as error:
        raise InvalidSetting(f"the path of the model {spec!r} cannot be found: {error}") from None

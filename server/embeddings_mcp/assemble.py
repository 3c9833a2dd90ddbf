"""From settings to a service: the one place that knows every kind of embedder."""

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

from embeddings_mcp.catalogue import DEFAULT, ModelSource, ids_of, meaning
from embeddings_mcp.embedders.base import Embedder
from embeddings_mcp.embedders.cache import Cache, DiskStore, MemoryStore, cached
from embeddings_mcp.embedders.local.checkpoint import Checkpoint, read_checkpoint
from embeddings_mcp.embedders.local.fingerprint import file_digest, file_state
from embeddings_mcp.embedders.local.locate import find_bundled
from embeddings_mcp.embedders.local.model_files import ModelFiles
from embeddings_mcp.embedders.local.running.loaded import LoadedModel
from embeddings_mcp.embedders.local.running.loading import Loading
from embeddings_mcp.embedders.local_embedder import LocalEmbedder
from embeddings_mcp.errors import CheckpointInvalid, InvalidRequest, InvalidSetting, UnknownModel
from embeddings_mcp.models import DEFAULT_MODEL, ModelCard, find_card, find_cards, find_id
from embeddings_mcp.service import EmbeddingService
from embeddings_mcp.settings import EndpointSettings, Settings

# Endpoints' modules are imported where there is one: a server without any starts without an HTTP client.
if TYPE_CHECKING:
    from embeddings_mcp.embedders.nim import Endpoint

_TICK_SECONDS = 2.0
"""Two changes of a file that lie closer together may leave it with the same times on some file systems."""


def build_service(settings: Settings) -> EmbeddingService:
    """A service for the models of these settings; no weights are read yet, and no endpoint is asked.

    Raises:
        CheckpointInvalid: a folder given as a model's path is not a checkpoint.
        InvalidSetting: a model is not given as ``ID`` or ``ID=PATH``, two of them answer to one name, none can be the
            default model, or an endpoint is not described as it should be.
    """
    cache = _open_cache(settings)
    embedders = [_behind(cache)(_local(spec, settings, cache)) for spec in _models_here(settings)]
    default = settings.default_model or (embedders[0].card.id if embedders else DEFAULT_MODEL)
    return EmbeddingService(embedders, default_model=default, sources=endpoint_models(settings, cache))


async def service_for(settings: Settings, model: str | None, *, at_endpoint: bool = False) -> EmbeddingService:
    """A service to ask one model, which is its default.

    That is the model of the settings that has the name, else one of an endpoint, else one that runs here. Endpoints of
    the settings are asked for it; the hosted API is not, and counts with the models that it is known to have.

    Args:
        settings: where models are.
        model: ``ID`` or ``ID=PATH``; ``default`` and None for the default model or, `at_endpoint`, for the only one.
        at_endpoint: an endpoint has to have it.

    Raises:
        InvalidRequest: no model was named, and the endpoints have several.
        EmbeddingsError: an endpoint cannot be asked, or none has the model; as `build_service`.
    """
    if model is not None and model.lower() == DEFAULT:
        model = None
    if not at_endpoint:
        if model is None:
            return build_service(settings)
        if "=" in model or _of_settings(model, settings):
            return build_service(only(settings, model))
    sources = endpoint_models(settings, _open_cache(settings), ask_hosted=False)
    async with contextlib.AsyncExitStack() as stack:
        for source in sources:
            stack.push_async_callback(source.aclose)
            await source.discover(0)
        places = [source.models for source in sources]
        ids = ids_of(*places)
        if model is None and len(ids) != 1:
            raise InvalidRequest(f"say which model with --model: the endpoint has {', '.join(ids) or 'none'}")
        name = ids[0] if model is None else model
        if at_endpoint or any(meaning(name, models) for models in places):
            stack.pop_all()
            return EmbeddingService((), default_model=name, sources=sources)
    return build_service(only(settings, name))


def only(settings: Settings, model: str) -> Settings:
    """The same settings for one model that runs here, which is the default then.

    Args:
        settings: if they have a model of that name, they also say where it is.
        model: ``ID`` or ``ID=PATH``.
    """
    spec = model if "=" in model else _of_settings(model, settings) or model
    alone = {"models": (spec,), "default_model": None, "endpoints": (), "nvidia_api_key": None}
    return settings.model_copy(update=alone)


async def open_embedder(where: str, model: str, settings: Settings) -> Embedder:
    """One embedder that is not part of a service: of an endpoint, or of a model that runs here.

    Args:
        where: the endpoint's address, or a model as ``ID`` or ``ID=PATH``.
        model: which of the endpoint's models, by any of its names.
        settings: for what runs here; if they have an endpoint of that address, they also say what its key is.

    Raises:
        UnknownModel: the endpoint has no such model.
        EmbeddingsError: the endpoint cannot be asked.
    """
    if "://" not in where:
        return _local(where, settings)
    address = _address(where)
    described = (endpoint for endpoint in settings.endpoints if _address(endpoint.url) == address)
    endpoint = next(described, EndpointSettings(url=where))
    source, *_ = endpoint_models(settings.model_copy(update={"endpoints": (endpoint,)}))
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(source.aclose)
        await source.discover(0)
        names = {model.lower()} | (known.names if (known := find_card(model)) else set())
        found = next((embedder for name, embedder in source.models.items() if name in names), None)
        if found is not None:
            stack.pop_all()
            return found
    raise UnknownModel(f"{where} has no model {model!r}; it has: {', '.join(ids_of(source.models)) or 'none'}")


def endpoint_models(settings: Settings, cache: Cache | None = None, *, ask_hosted: bool = True) -> list[ModelSource]:
    """The models of every endpoint, in the order of the settings; last, with a key to it, those of the hosted API.

    Args:
        settings: which endpoints there are.
        cache: what to put before them.
        ask_hosted: whether the hosted API, where the settings do not name it, may be asked for its models.
    """
    if not settings.endpoints and settings.nvidia_api_key is None:
        return []
    from embeddings_mcp.embedders.nim import HOSTED_MODELS, HOSTED_URL, EndpointClient, EndpointModels

    described = [(endpoint, _endpoint(endpoint, settings)) for endpoint in settings.endpoints]
    if settings.nvidia_api_key is not None and not any(endpoint.hosted for _, endpoint in described):
        hosted = EndpointSettings(url=HOSTED_URL, models=None if ask_hosted else HOSTED_MODELS)
        described.append((hosted, _endpoint(hosted, settings)))
    return [
        EndpointModels(
            EndpointClient(endpoint),
            known=of_settings.models or (HOSTED_MODELS if endpoint.hosted else ()),
            complete=of_settings.models is not None,
            cards=settings.cards,
            wrap=_behind(cache),
        )
        for of_settings, endpoint in described
    ]


def _endpoint(described: EndpointSettings, settings: Settings) -> Endpoint:
    """The endpoint with its key, from where the settings say that it is."""
    from embeddings_mcp.embedders.nim import Endpoint

    chosen = described.model_dump(exclude_none=True, exclude={"models", "api_key", "api_key_env"})
    endpoint = Endpoint(**chosen)
    if described.api_key is not None:
        return replace(endpoint, api_key=described.api_key, key_name="the endpoint's `api_key`")
    if (variable := described.api_key_env) is not None:
        key = os.environ.get(variable)
        if not key and not re.fullmatch("[A-Z_][A-Z0-9_]*", variable):
            raise InvalidSetting(
                f"`api_key_env` of the endpoint {endpoint.url} takes the name of an environment variable, not the key; "
                "what is given is no variable that is set, and not repeated, since it may be the key"
            )
        if not key:
            raise InvalidSetting(
                f"the endpoint {endpoint.url} has its key in the environment variable {variable}, which is not set"
            )
        return replace(endpoint, api_key=SecretStr(key), key_name=variable)
    if endpoint.hosted:
        return replace(endpoint, api_key=settings.nvidia_api_key)
    return replace(endpoint, key_name="the endpoint's `api_key_env`")


def _models_here(settings: Settings) -> tuple[str, ...]:
    """The models that run here: beside endpoints not the one that nobody named, if there is nothing to run it with."""
    named = "models" in settings.model_fields_set
    beside_endpoints = bool(settings.endpoints) or settings.nvidia_api_key is not None
    return settings.models if named or not beside_endpoints or _has_torch() else ()


def _has_torch() -> bool:
    try:
        return importlib.util.find_spec("torch") is not None
    except ModuleNotFoundError:  # as whoever keeps packages from being imported may answer
        return False


def _address(url: str) -> str:
    return url.strip().rstrip("/").removesuffix("/v1").lower()


def _local(spec: str, settings: Settings, cache: Cache | None = None) -> LocalEmbedder:
    """The embedder of a model given as ``ID`` or ``ID=PATH``; what it is told apart by suits the cache."""
    given, folder = _read(spec)
    name = find_id(given, settings.cards)
    own, known = find_cards(given, settings.cards)
    if described := folder or find_bundled(name):
        try:
            card = read_checkpoint(described, known).card(name, known, own)
        except OSError as error:
            raise CheckpointInvalid(f"{described} cannot be read: {error}") from error
    else:
        card = known or ModelCard(id=name)
        card = own.over(card) if own else card
    files = ModelFiles(
        name,
        known=known,
        own=own,
        folder=folder,
        repository=card.repository,
        device=settings.device,
        precision=settings.precision,
        cuda_graphs=settings.cuda_graphs,
        process=functools.partial(_apart, workers=settings.workers) if settings.model_process else None,
        digest=file_state if cache is None or cache.disk is None else _noted_digest(cache.disk),
    )
    return LocalEmbedder(
        card,
        files.load,
        files.identify,
        max_queued_tokens=settings.max_queued_tokens,
        workers=settings.workers,
    )


def _apart(loading: Loading, checkpoint: Checkpoint, *, workers: int | None) -> LoadedModel:
    """The model in a process of its own."""
    from embeddings_mcp.embedders.local.running.model_process import (
        ModelProcess,  # with a tokenizer, which is slow to import
    )

    return ModelProcess(loading, checkpoint, workers=workers)


def _open_cache(settings: Settings) -> Cache | None:
    """The cache that the settings want; its file is opened when it is needed."""
    if settings.cache == "off":
        return None
    memory = MemoryStore(settings.cache_memory_mb << 20)
    if settings.cache == "memory":
        return Cache(memory)
    return Cache(memory, DiskStore(Path(settings.cache), settings.cache_disk_mb << 20))


def _behind(cache: Cache | None) -> Callable[[Embedder], Embedder]:
    """Puts the cache before an embedder, where there is one."""
    return lambda embedder: embedder if cache is None else cached(embedder, cache)


def _noted_digest(disk: DiskStore) -> Callable[[Path], str]:
    """`file_digest`, which reads all of a file, made once for every state in which the file is found."""

    def digest(path: Path) -> str:
        if time.time() - path.stat().st_ctime < _TICK_SECONDS:
            return file_digest(path)
        return disk.noted(file_state(path), lambda: file_digest(path))

    return digest


def _of_settings(model: str, settings: Settings) -> str | None:
    """How the settings give the model of this name."""

    def meant(spec: str) -> str:
        name, _ = _read(spec)
        return find_id(name, settings.cards).lower()

    wanted = meant(model)
    return next((spec for spec in settings.models if meant(spec) == wanted), None)


def _read(spec: str) -> tuple[str, Path | None]:
    """The name and the folder, where there is one, of ``ID`` or ``ID=PATH``.

    Raises:
        InvalidSetting: it is neither.
    """
    name, equals, path = spec.partition("=")
    if not name or (equals and not path):
        raise InvalidSetting(f"the model {spec!r} must be given as ID or as ID=PATH")
    if not name.isprintable():
        raise InvalidSetting(f"the model {spec!r} must have a name in UTF-8, and without control characters")
    if name.startswith(("/", ".", "~")) or "\\" in name:
        raise InvalidSetting(f"the model {spec!r} is a path: give it a name to be asked for, as in my-model={spec}")
    try:
        return name, Path(path).expanduser() if path else None
    except RuntimeError as error:
        raise InvalidSetting(f"the path of the model {spec!r} cannot be found: {error}") from None

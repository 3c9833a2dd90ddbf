"""The catalog of served models, and the resolution of model names.

A name resolves to the first model with that id or alias: first among the local models, then among the endpoints in
their order. An endpoint's models are listed lazily, when a name cannot be resolved without them. While an endpoint
cannot list its models, no later endpoint is tried: an outage must never send texts to a different provider than the
configured order says.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

import anyio
from pydantic import SecretStr

from embeddings_mcp.embedders.base import Embedder
from embeddings_mcp.errors import EmbeddingsError, InvalidSetting, UnknownModel, UpstreamUnavailable
from embeddings_mcp.models import InputType, find_card
from embeddings_mcp.redaction import mask_keys

logger = logging.getLogger(__name__)

MODEL_LIST_TTL_SECONDS = 60.0
"""How long an endpoint's list of models stays fresh."""

DEFAULT = "default"
"""The alias of the default model."""

_SUFFIXES: dict[str, InputType] = {"-query": "query", "-passage": "passage"}


class ModelSource(Protocol):
    """An endpoint, whose models have to be listed by a request."""

    @property
    def origin(self) -> str:
        """The URL of the endpoint, without secrets."""
        ...

    @property
    def models(self) -> Mapping[str, Embedder]:
        """The embedders known so far, by id and alias in lower case; makes no request."""
        ...

    async def discover(self, max_age: float) -> None:
        """Update `models`, unless it was updated in the last `max_age` seconds.

        Raises:
            EmbeddingsError: the models cannot be listed; the message says why.
        """
        ...

    @property
    def key_name(self) -> str | None:
        """The setting, environment variable or header that holds the API key; None if there is no key."""
        ...

    async def check(self) -> None:
        """Check that the endpoint is ready; do nothing if it has no readiness route.

        Raises:
            EmbeddingsError: it is not ready, or cannot be reached.
        """
        ...

    async def aclose(self) -> None:
        """Close all of the endpoint's embedders."""
        ...


ResolvedModel = tuple[Embedder, InputType | None]
"""The embedder for a model name, and the input type if the name's suffix implies one."""


class Catalog:
    """The models served.

    Args:
        embedders: one per local model.
        sources: endpoints with more models, in the order in which they are tried.
        default: the model name that ``default`` stands for.
        keys: configured keys, which no error repeats if one is given in the place of a model's name.

    Attributes:
        sources: as given.

    Raises:
        InvalidSetting: two embedders share a name, one is named ``default``, or none can be the default model.
    """

    def __init__(
        self,
        embedders: Iterable[Embedder],
        sources: Iterable[ModelSource],
        *,
        default: str,
        keys: Collection[SecretStr] = (),
    ) -> None:
        self._embedders = list(embedders)
        self.sources = list(sources)
        self._local_models: dict[str, Embedder] = {}
        for embedder in self._embedders:
            for name in embedder.card.names:
                if name == DEFAULT:
                    raise InvalidSetting("no model can be named 'default', which stands for the default model")
                if name in self._local_models:
                    raise InvalidSetting(f"two models have the name {name!r}: give each a name of its own")
                self._local_models[name] = embedder
        self._default = default
        self._keys = keys
        if not self.sources and self.default is None:
            raise InvalidSetting(
                f"the default model {self._quote(default)} is not among the models served: {self._ids()}; `--model` "
                "serves it here, `--endpoint` from an endpoint that has it, and NVIDIA_API_KEY brings those of the "
                "hosted API"
            )

    @property
    def known(self) -> list[Embedder]:
        """The models known so far, without endpoint models whose name an earlier model has; makes no request."""
        known, taken = list(self._embedders), set(self._local_models)
        for source in self.sources:
            known += [
                embedder
                for name, embedder in source.models.items()
                if name == embedder.card.id.lower() and name not in taken
            ]
            taken |= source.models.keys()
        return known

    @property
    def default(self) -> Embedder | None:
        """The default model; None until the endpoint that may serve it has listed its models."""
        candidates = (resolve_name(self._default, models) for models in self._name_tables())
        resolved = next(filter(None, candidates), None)
        return resolved and resolved[0]

    @property
    def default_name(self) -> str:
        """The default model's id, or the configured name while the model is not known yet."""
        return self._default if self.default is None else self.default.card.id

    @property
    def is_local(self) -> bool:
        """Whether all vectors are computed on this machine."""
        return not self.sources and all(embedder.origin == "local" for embedder in self._embedders)

    async def find(self, model: str) -> ResolvedModel:
        """Resolve a name: an id, an alias or ``default``, optionally with an input type as its suffix.

        Raises:
            UnknownModel: no model has this name.
            UpstreamUnavailable: an endpoint that may serve the model cannot list its models.
        """
        name = self._expand_default(model)
        if resolved := resolve_name(name, self._local_models):
            return resolved
        for max_age in (math.inf, MODEL_LIST_TTL_SECONDS):  # the first pass asks only endpoints that were never asked
            for source in self.sources:
                if resolved := resolve_name(name, source.models):
                    return resolved
                await self._discover(source, name, max_age)
                if resolved := resolve_name(name, source.models):
                    return resolved
        raise UnknownModel(
            f"`model` {self._quote(name)} is not served here; served are: {self._ids()} (or `default`){_advice(name)}",
            param="model",
        )

    async def refresh(self) -> None:
        """Update the model lists that are no longer fresh; a list that cannot be updated stays as it was."""
        async with anyio.create_task_group() as group:
            for source in self.sources:
                group.start_soon(_refresh, source)

    async def aclose(self) -> None:
        """Close every embedder, even if closing one of them fails."""
        async with contextlib.AsyncExitStack() as stack:
            for embedder in self._embedders:
                stack.push_async_callback(embedder.aclose)
            for source in self.sources:
                stack.push_async_callback(source.aclose)

    async def _discover(self, source: ModelSource, name: str, max_age: float) -> None:
        try:
            await source.discover(max_age)
        except EmbeddingsError as error:
            raise UpstreamUnavailable(
                f"whether `model` {self._quote(name)} is served is not known: {error.message}",
                param="model",
                retry_after=error.retry_after,
            ) from error

    def _quote(self, name: str) -> str:
        """Quote a name that a caller gave, which may be a key in the wrong place.

        Configured keys are recognized as a whole only: masking a part would tell callers which texts contain one.
        """
        return "'***'" if SecretStr(name) in self._keys else repr(mask_keys(name)[:100])

    def _expand_default(self, model: str) -> str:
        """Replace ``default`` with the default model's name; a suffix stays."""
        for suffix in ("", *_SUFFIXES):
            if model.lower() == DEFAULT + suffix:
                return self._default + suffix
        return model

    def _name_tables(self) -> list[Mapping[str, Embedder]]:
        return [self._local_models, *(source.models for source in self.sources)]

    def _ids(self) -> str:
        return ", ".join(embedder.card.id for embedder in self.known)


def resolve_name(model: str, models: Mapping[str, Embedder]) -> ResolvedModel | None:
    """Resolve a name among these models; an exact match takes precedence over a name with a suffix."""
    name = model.lower()
    if embedder := models.get(name):
        return embedder, None
    for suffix, implied in _SUFFIXES.items():
        if name.endswith(suffix) and (embedder := models.get(name.removesuffix(suffix))):
            return embedder, implied
    return None


def model_ids(*name_tables: Mapping[str, Embedder]) -> list[str]:
    """Return the ids of these models without duplicates, although a model may have several names."""
    return list(dict.fromkeys(embedder.card.id for models in name_tables for embedder in models.values()))


async def _refresh(source: ModelSource) -> None:
    try:
        await source.discover(MODEL_LIST_TTL_SECONDS)
    except EmbeddingsError as error:
        logger.warning("cannot update the list of models of %s: %s", source.origin, error.message)


def _advice(name: str) -> str:
    """Say how a known model that is not served could be served; empty for an unknown model."""
    card = find_card(name)
    if card is None:
        return ""
    end_of_life = f"NVIDIA's hosted API ended it on {card.hosted_until}; " if card.hosted_until else ""
    return f". {end_of_life}a server started with `--model {card.id}{'' if card.repository else '=FOLDER'}` has it"

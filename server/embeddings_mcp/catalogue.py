"""Which models there are, and which of them a name means.

A name means the first model that answers to it: of those given one by one, which run here, then of the endpoints in
their order. An endpoint may have to be asked what it has, which happens when a name makes it necessary. As long as one
that comes first has not told, none that comes after it answers in its place: texts never go to another house than the
order says because the first one happens to be down.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import anyio

from embeddings_mcp.embedders.base import Embedder
from embeddings_mcp.errors import EmbeddingsError, InvalidSetting, UnknownModel, UpstreamUnavailable
from embeddings_mcp.models import InputType, find_card

logger = logging.getLogger(__name__)

FRESH_SECONDS = 60.0
"""How long an endpoint's list of models is taken for true."""

DEFAULT = "default"
"""The name that stands for the default model."""

_SUFFIXES: dict[str, InputType] = {"-query": "query", "-passage": "passage"}


class ModelSource(Protocol):
    """A place with several models that has to be asked which ones they are: an endpoint."""

    @property
    def origin(self) -> str:
        """Its address. Holds no secret."""
        ...

    @property
    def models(self) -> Mapping[str, Embedder]:
        """The embedders known now, by every name that each answers to, in lower case; nothing is asked for it."""
        ...

    async def discover(self, max_age: float) -> None:
        """Ask which models there are, unless that was asked in the last `max_age` seconds; `models` then has them.

        Raises:
            EmbeddingsError: it cannot be asked, and why.
        """
        ...

    @property
    def key_name(self) -> str | None:
        """What holds the key that it is asked with; None where there is no key."""
        ...

    async def check(self) -> None:
        """Return once it says that it is ready; at once where it has no way to say so.

        Raises:
            EmbeddingsError: it is not, or cannot be reached.
        """
        ...

    async def aclose(self) -> None:
        """Close all of its embedders."""
        ...


Meant = tuple[Embedder, InputType | None]
"""What a model's name means: an embedder, and the input type where the name ends in one."""


class Catalogue:
    """The models served.

    Args:
        embedders: one for each model that runs here.
        sources: where there are more, in the order in which they are asked.
        default: the name that ``default`` stands for.

    Attributes:
        sources: as given.

    Raises:
        InvalidSetting: two embedders answer to one name, one to ``default``, or none can be the default model.
    """

    def __init__(self, embedders: Iterable[Embedder], sources: Iterable[ModelSource], *, default: str) -> None:
        self._embedders = list(embedders)
        self.sources = list(sources)
        self._here: dict[str, Embedder] = {}
        for embedder in self._embedders:
            for name in embedder.card.names:
                if name == DEFAULT:
                    raise InvalidSetting("no model can be named 'default', which stands for the default model")
                if name in self._here:
                    raise InvalidSetting(f"two of the models answer to the name {name!r}: give each a name of its own")
                self._here[name] = embedder
        self._default = default
        if not self.sources and self.default is None:
            raise InvalidSetting(
                f"the default model {default!r} is not among the models served: {self._ids()}; `--model` serves it "
                "here, `--endpoint` from an endpoint that has it, and NVIDIA_API_KEY brings those of the hosted API"
            )

    @property
    def known(self) -> list[Embedder]:
        """The models known now, those of endpoints only where their names are not taken; nothing is asked for it."""
        known, taken = list(self._embedders), set(self._here)
        for source in self.sources:
            by_id = ((name, it) for name, it in source.models.items() if name == it.card.id.lower())
            known += [embedder for name, embedder in by_id if name not in taken]
            taken |= source.models.keys()
        return known

    @property
    def default(self) -> Embedder | None:
        """The default model; None while the endpoint that may have it has not been asked."""
        meant = next(filter(None, (meaning(self._default, models) for models in self._places())), None)
        return meant and meant[0]

    @property
    def default_name(self) -> str:
        """The default model's id, or the name that it was given as long as nobody knows more."""
        return self._default if self.default is None else self.default.card.id

    @property
    def local(self) -> bool:
        """Whether all vectors are made on this machine."""
        return not self.sources and all(embedder.origin == "local" for embedder in self._embedders)

    async def find(self, model: str) -> Meant:
        """What a name means: the name of a model, an alias, either with an input type as its suffix, or ``default``.

        Raises:
            UnknownModel: no model answers to it.
            UpstreamUnavailable: whether one does cannot be told, since an endpoint cannot be asked.
        """
        name = next((self._default + end for end in ("", *_SUFFIXES) if model.lower() == DEFAULT + end), model)
        if meant := meaning(name, self._here):
            return meant
        for max_age in (math.inf, FRESH_SECONDS):  # first those that were never asked
            for source in self.sources:
                if meant := meaning(name, source.models):
                    return meant
                await _ask(source, name, max_age)
                if meant := meaning(name, source.models):
                    return meant
        raise UnknownModel(
            f"`model` {name[:100]!r} is not served here; served are: {self._ids()} (or `default`){_advice(name)}",
            param="model",
        )

    async def refresh(self) -> None:
        """Ask every endpoint that has not been asked lately; one that cannot be is left as it was known."""
        async with anyio.create_task_group() as group:
            for source in self.sources:
                group.start_soon(_refresh, source)

    async def aclose(self) -> None:
        """Close every embedder, also where one cannot be closed."""
        async with contextlib.AsyncExitStack() as stack:
            for embedder in self._embedders:
                stack.push_async_callback(embedder.aclose)
            for source in self.sources:
                stack.push_async_callback(source.aclose)

    def _places(self) -> list[Mapping[str, Embedder]]:
        return [self._here, *(source.models for source in self.sources)]

    def _ids(self) -> str:
        return ", ".join(embedder.card.id for embedder in self.known)


def meaning(model: str, models: Mapping[str, Embedder]) -> Meant | None:
    """What a name means among these models; the whole name goes before one with a suffix."""
    name = model.lower()
    if embedder := models.get(name):
        return embedder, None
    for suffix, implied in _SUFFIXES.items():
        if name.endswith(suffix) and (embedder := models.get(name.removesuffix(suffix))):
            return embedder, implied
    return None


def ids_of(*places: Mapping[str, Embedder]) -> list[str]:
    """The ids of these models, each once, however many names it answers to."""
    return list(dict.fromkeys(embedder.card.id for models in places for embedder in models.values()))


async def _ask(source: ModelSource, name: str, max_age: float) -> None:
    try:
        await source.discover(max_age)
    except EmbeddingsError as error:
        raise UpstreamUnavailable(
            f"whether `model` {name[:100]!r} is served cannot be told: {error.message}",
            param="model",
            retry_after=error.retry_after,
        ) from error


async def _refresh(source: ModelSource) -> None:
    try:
        await source.discover(FRESH_SECONDS)
    except EmbeddingsError as error:
        logger.warning("which models %s has now cannot be told: %s", source.origin, error.message)


def _advice(name: str) -> str:
    """How a model that is not served could be, where it is known at all."""
    card = find_card(name)
    if card is None:
        return ""
    gone = f"NVIDIA's hosted API ended it on {card.hosted_until}; " if card.hosted_until else ""
    return f". {gone}a server started with `--model {card.id}{'' if card.repository else '=FOLDER'}` has it"

"""The models of one endpoint as a source of embedders."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence

import anyio

from embeddings_mcp.embedders.base import Embedder
from embeddings_mcp.embedders.nim.client import EndpointClient
from embeddings_mcp.embedders.nim.discovery import card_for, discover
from embeddings_mcp.embedders.nim.embedder import NimEmbedder
from embeddings_mcp.errors import EmbeddingsError, UpstreamTimeout
from embeddings_mcp.models import ModelCard, OwnCard

DISCOVERY_SECONDS = 10.0
"""Longest wait for an endpoint's list of models."""

RETRY_SECONDS = 10.0
"""An endpoint that could not be asked is not asked again so soon: who asks for models must not use up its limits."""


class EndpointModels:
    """Follows `catalogue.ModelSource`.

    Args:
        client: the way to the endpoint.
        known: names of models that it has, by which they can be used before it is asked.
        complete: there are no others: it is never asked.
        cards: the user's own; what they say goes before all else.
        wrap: puts something around each embedder, such as a cache.
    """

    def __init__(
        self,
        client: EndpointClient,
        *,
        known: Sequence[str] = (),
        complete: bool = False,
        cards: Sequence[OwnCard] = (),
        wrap: Callable[[Embedder], Embedder] = lambda embedder: embedder,
    ) -> None:
        self._client = client
        self._cards = cards
        self._wrap = wrap
        self._embedders: dict[str, Embedder] = {}
        self._turn = anyio.Lock()
        self._asked = math.inf if complete else None
        self._failed = 0.0
        self._failure: EmbeddingsError | None = None
        self._take({name: card_for(name, dialect=client.endpoint.dialect, cards=cards) for name in known})

    @property
    def origin(self) -> str:
        """The endpoint's address."""
        return self._client.endpoint.url

    @property
    def key_name(self) -> str | None:
        """See `ModelSource.key_name`."""
        endpoint = self._client.endpoint
        return None if endpoint.api_key is None else endpoint.key_name

    @property
    def models(self) -> Mapping[str, Embedder]:
        """See `ModelSource.models`."""
        return self._models

    async def discover(self, max_age: float) -> None:
        """See `ModelSource.discover`."""
        async with self._turn:  # who has waited finds the answer there
            now = anyio.current_time()
            if self._asked is not None and now - self._asked <= max_age:
                return
            if self._failure is not None and now - self._failed <= RETRY_SECONDS:
                raise self._failure.with_traceback(None)
            try:
                found = await self._ask()
            except EmbeddingsError as error:
                self._failure, self._failed = error, anyio.current_time()
                raise
            self._take(found)
            self._asked, self._failure = anyio.current_time(), None

    async def check(self) -> None:
        """See `ModelSource.check`."""
        with anyio.move_on_after(DISCOVERY_SECONDS):
            await self._client.check()
            return
        raise UpstreamTimeout(f"the endpoint {self.origin} did not say in {DISCOVERY_SECONDS:g} s whether it is ready")

    async def aclose(self) -> None:
        """Close the embedders and the client that they share, also where one cannot be closed."""
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._client.aclose)
            for embedder in self._embedders.values():
                stack.push_async_callback(embedder.aclose)

    async def _ask(self) -> dict[str, ModelCard]:
        with anyio.move_on_after(DISCOVERY_SECONDS):
            return await discover(self._client, self._cards)
        raise UpstreamTimeout(f"the endpoint {self.origin} did not say in {DISCOVERY_SECONDS:g} s which models it has")

    def _take(self, cards: Mapping[str, ModelCard]) -> None:
        """Have an embedder for each of these models, the one that there is already where there is one.

        Of two names with one card the card's own is taken, or else the first.
        """
        chosen: dict[str, str] = {}
        for name, card in cards.items():
            if card.id not in chosen or name.lower() == card.id.lower():
                chosen[card.id] = name
        self._embedders = {
            name: self._embedders.get(name) or self._wrap(NimEmbedder(self._client, cards[name], model=name))
            for name in chosen.values()
        }
        self._models: dict[str, Embedder] = {}
        for name, embedder in self._embedders.items():
            for answered in (name.lower(), *embedder.card.names):
                self._models.setdefault(answered, embedder)

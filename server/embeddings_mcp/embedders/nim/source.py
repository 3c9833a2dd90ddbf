"""`EndpointModels`: the models of one endpoint, as a source of embedders for the catalog."""

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
from embeddings_mcp.models import CardOverride, ModelCard

DISCOVERY_TIMEOUT_SECONDS = 10.0
"""Longest wait for an endpoint's list of models."""

RETRY_SECONDS = 10.0
"""Pause after a failed discovery, so that requests for models cannot use up the endpoint's rate limit."""


class EndpointModels:
    """The models of one endpoint; follows `catalog.ModelSource`.

    Args:
        client: of the endpoint.
        known: names of models that are available before discovery.
        complete: `known` lists all models, so there is no discovery.
        user_cards: the user's cards; they take precedence over everything else.
        wrap: wraps each embedder, for example in a cache.
    """

    def __init__(
        self,
        client: EndpointClient,
        *,
        known: Sequence[str] = (),
        complete: bool = False,
        user_cards: Sequence[CardOverride] = (),
        wrap: Callable[[Embedder], Embedder] = lambda embedder: embedder,
    ) -> None:
        self._client = client
        self._user_cards = user_cards
        self._wrap = wrap
        self._embedders: dict[str, Embedder] = {}
        self._lock = anyio.Lock()
        self._discovered_at = math.inf if complete else None  # a complete list never becomes stale
        self._failed_at = 0.0
        self._failure: EmbeddingsError | None = None
        self._set_models(
            {name: card_for(name, dialect=client.endpoint.dialect, user_cards=user_cards) for name in known}
        )

    @property
    def origin(self) -> str:
        """The endpoint's URL."""
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
        async with self._lock:  # single-flight: callers that waited find a fresh result
            now = anyio.current_time()
            if self._discovered_at is not None and now - self._discovered_at <= max_age:
                return
            if self._failure is not None and now - self._failed_at <= RETRY_SECONDS:
                raise self._failure.with_traceback(None)
            try:
                cards = await self._list_models()
            except EmbeddingsError as error:
                self._failure, self._failed_at = error, anyio.current_time()
                raise
            self._set_models(cards)
            self._discovered_at, self._failure = anyio.current_time(), None

    async def check(self) -> None:
        """See `ModelSource.check`."""
        with anyio.move_on_after(DISCOVERY_TIMEOUT_SECONDS):
            await self._client.check()
            return
        raise UpstreamTimeout(
            f"the endpoint {self.origin} did not report within {DISCOVERY_TIMEOUT_SECONDS:g} s whether it is ready"
        )

    async def aclose(self) -> None:
        """Close the embedders and the client that they share, even if closing one of them fails."""
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._client.aclose)
            for embedder in self._embedders.values():
                stack.push_async_callback(embedder.aclose)

    async def _list_models(self) -> dict[str, ModelCard]:
        with anyio.move_on_after(DISCOVERY_TIMEOUT_SECONDS):
            return await discover(self._client, self._user_cards)
        raise UpstreamTimeout(
            f"the endpoint {self.origin} did not list its models within {DISCOVERY_TIMEOUT_SECONDS:g} s"
        )

    def _set_models(self, cards: Mapping[str, ModelCard]) -> None:
        """Set the models, keeping embedders that exist already.

        Of several names with the same card, the card's id is used, or else the first name.
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
            for alias in (name.lower(), *embedder.card.names):
                self._models.setdefault(alias, embedder)

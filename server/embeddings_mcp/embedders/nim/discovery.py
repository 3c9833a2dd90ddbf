"""Model discovery: which models an endpoint serves, and their cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import httpx

from embeddings_mcp.embedders.nim.client import EndpointClient
from embeddings_mcp.embedders.nim.endpoint import Dialect
from embeddings_mcp.embedders.nim.failures import Failure
from embeddings_mcp.embedders.nim.wire import InvalidResponse, parse_json
from embeddings_mcp.models import CARDS, CardOverride, InputTypeUse, ModelCard, find_card, find_cards

_CARDS = (
    # Served only by endpoints: this server has no recipe for it.
    ModelCard(
        id="nvidia/llama-nemotron-embed-vl-1b-v2",
        aliases=("llama-nemotron-embed-vl-1b-v2",),
        dimensions=2048,
        max_tokens=2048,
        input_type="required",
        query_prompt="query: ",
        passage_prompt="passage: ",
        license="NVIDIA Open Model License and Llama 3.2 Community License",
        hub="",
    ),
    *CARDS,
)

_NIM_MAX_TOKENS = {"nvidia/nemotron-3-embed-1b": 4096}
"""Models whose NIM has a lower token limit than the model itself (support matrix 2.4)."""


def card_for(
    name: str,
    *,
    dialect: Dialect = "nim",
    user_cards: Sequence[CardOverride] = (),
    listed: Mapping[str, object] | None = None,
) -> ModelCard:
    """Return the card of a model, given its name at an endpoint.

    Whether a model without a card needs ``input_type`` is unknown, so it is forwarded when the caller gives it. Whether
    its weights are on the hub is unknown too.

    Args:
        name: of the model at the endpoint.
        dialect: of the endpoint.
        user_cards: the user's cards; they take precedence over everything else.
        listed: the model's entry in the endpoint's list of models.
    """
    user_card, card = find_cards(name, user_cards, _CARDS)
    if card is None:
        card = ModelCard(id=name, input_type="optional", hub="")
    elif dialect == "nim" and (limit := _NIM_MAX_TOKENS.get(card.id)):
        card = replace(card, max_tokens=limit)
    card = _with_listing(card, listed or {})
    if user_card:
        card = user_card.apply_to(card)
    return replace(card, modes=("dense",))  # endpoints return dense vectors only


async def discover(client: EndpointClient, user_cards: Sequence[CardOverride] = ()) -> dict[str, ModelCard]:
    """Return the cards of the embedding models that the endpoint lists, by their names there.

    The hosted API lists its whole catalog, including chat models and models that the account may not call. Of those,
    only models with a card or with "embed" in their name are kept; whether the account may call one is known only once
    it is called.

    Args:
        client: of the endpoint; the request is not retried, since a caller that needs the list asks again.
        user_cards: the user's cards.

    Raises:
        EmbeddingsError: the list cannot be fetched.
    """
    try:
        entries = await client.fetch("/models", _parse_entries, retry=False)
    except Failure as error:
        failure = error
    else:
        dialect, hosted = client.endpoint.dialect, client.endpoint.hosted
        return {
            name: card_for(name, dialect=dialect, user_cards=user_cards, listed=entry)
            for entry in entries
            if is_embedding_model(name := entry["id"]) or not hosted
        }
    raise failure.error


def _parse_entries(response: httpx.Response) -> list[dict[str, Any]]:
    payload = parse_json(response.content)
    entries = payload.get("data") if isinstance(payload, dict) else None
    if not isinstance(entries, list):
        raise InvalidResponse("it has no `data` list")
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]


def is_embedding_model(name: str) -> bool:
    """Return whether a model is likely to be an embedding model, given only its name at an endpoint."""
    return "embed" in name.lower() or find_card(name, _CARDS) is not None


def _with_listing(card: ModelCard, entry: Mapping[str, object]) -> ModelCard:
    """Refine the card with the details that some servers list: this server several, vLLM ``max_model_len``."""
    max_tokens = _positive_int(entry.get("max_tokens")) or _positive_int(entry.get("max_model_len"))
    dimensions = _positive_int(entry.get("dimensions"))
    use: InputTypeUse | None = next((use for use in get_args(InputTypeUse) if use == entry.get("input_type")), None)
    allowed_dimensions = entry.get("allowed_dimensions")
    return replace(
        card,
        max_tokens=max_tokens or card.max_tokens,
        dimensions=card.dimensions or dimensions,
        input_type=use or card.input_type,
        matryoshka=tuple(filter(_positive_int, allowed_dimensions))
        if isinstance(allowed_dimensions, list)
        else card.matryoshka,
    )


def _positive_int(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None

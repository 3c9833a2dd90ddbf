"""Which models an endpoint has, and what is known of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import httpx

from embeddings_mcp.embedders.nim.client import EndpointClient
from embeddings_mcp.embedders.nim.endpoint import Dialect
from embeddings_mcp.embedders.nim.failures import Failure
from embeddings_mcp.embedders.nim.wire import AnswerInvalid, read_json
from embeddings_mcp.models import CARDS, InputTypeUse, ModelCard, OwnCard, find_card, find_cards

_CARDS = (
    # Served by endpoints only: this server has no recipe for it.
    ModelCard(
        id="nvidia/llama-nemotron-embed-vl-1b-v2",
        aliases=("llama-nemotron-embed-vl-1b-v2",),
        dimensions=2048,
        max_tokens=2048,
        input_type="required",
        query_prompt="query: ",
        passage_prompt="passage: ",
        licence="NVIDIA Open Model License and Llama 3.2 Community License",
        hub="",
    ),
    *CARDS,
)

_NIM_MAX_TOKENS = {"nvidia/nemotron-3-embed-1b": 4096}
"""Where a NIM takes shorter texts than the model itself does (support matrix 2.4)."""


def card_for(
    name: str,
    *,
    dialect: Dialect = "nim",
    cards: Sequence[OwnCard] = (),
    listed: Mapping[str, object] | None = None,
) -> ModelCard:
    """What is known of a model by its name at an endpoint.

    One that no card names may or may not want ``input_type``: it is sent on when the caller gives it. Nor is it known
    whether its weights are on the hub.

    Args:
        name: the model's, at the endpoint.
        dialect: the endpoint's.
        cards: the user's own; what they say goes before all else.
        listed: what the endpoint's list says of it.
    """
    own, card = find_cards(name, cards, _CARDS)
    if card is None:
        card = ModelCard(id=name, input_type="optional", hub="")
    elif dialect == "nim" and (limit := _NIM_MAX_TOKENS.get(card.id)):
        card = replace(card, max_tokens=limit)
    card = _as_listed(card, listed or {})
    return own.over(card) if own else card


async def discover(client: EndpointClient, cards: Sequence[OwnCard] = ()) -> dict[str, ModelCard]:
    """The embedding models that the endpoint lists: each under its name there, with its card.

    The hosted API lists its whole catalogue, chat models included, and models that the account may not call. Those are
    kept that a card knows or that call themselves embedding models; whether the account may call one, only a call can
    tell.

    Args:
        client: the way to the endpoint, which is asked once: whoever needs to know asks again.
        cards: the user's own.

    Raises:
        EmbeddingsError: the endpoint cannot be asked.
    """
    try:
        entries = await client.fetch("/models", _read_entries, once=True)
    except Failure as error:
        failure = error
    else:
        dialect, hosted = client.endpoint.dialect, client.endpoint.hosted
        return {
            name: card_for(name, dialect=dialect, cards=cards, listed=entry)
            for entry in entries
            if _embeds(name := entry["id"]) or not hosted
        }
    raise failure.error


def _read_entries(response: httpx.Response) -> list[dict[str, Any]]:
    payload = read_json(response.content)
    entries = payload.get("data") if isinstance(payload, dict) else None
    if not isinstance(entries, list):
        raise AnswerInvalid("it holds no list `data`")
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]


def _embeds(name: str) -> bool:
    return "embed" in name.lower() or find_card(name, _CARDS) is not None


def _as_listed(card: ModelCard, entry: Mapping[str, object]) -> ModelCard:
    """The card, more exact by what some servers say of a model: this one, in what it lists, and vLLM of its length."""
    max_tokens = _length(entry.get("max_tokens")) or _length(entry.get("max_model_len"))
    dimensions = _length(entry.get("dimensions"))
    use: InputTypeUse | None = next((use for use in get_args(InputTypeUse) if use == entry.get("input_type")), None)
    shorter = entry.get("allowed_dimensions")
    return replace(
        card,
        max_tokens=max_tokens or card.max_tokens,
        dimensions=card.dimensions or dimensions,
        input_type=use or card.input_type,
        matryoshka=tuple(filter(_length, shorter)) if isinstance(shorter, list) else card.matryoshka,
    )


def _length(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None

"""Which models an endpoint has."""

from __future__ import annotations

import httpx

from embeddings_mcp.embedders.nim.client import EndpointClient
from embeddings_mcp.embedders.nim.failures import Failure
from embeddings_mcp.embedders.nim.wire import AnswerInvalid, read_json
from embeddings_mcp.models import ModelCard, find_card


def card_for(name: str) -> ModelCard:
    """What is known of a model by its name at an endpoint.

    One that no card names may or may not want ``input_type``: it is sent on when the caller gives it. Nor is it known
    whether its weights are on the hub.
    """
    return find_card(name) or ModelCard(id=name, input_type="optional", hub="")


async def discover(client: EndpointClient) -> dict[str, ModelCard]:
    """The embedding models that the endpoint lists: each under its name there, with its card.

    The hosted API lists its whole catalogue, chat models included, and models that the account may not call. Those are
    kept that a card knows or that call themselves embedding models; whether the account may call one, only a call can
    tell.

    Raises:
        EmbeddingsError: the endpoint cannot be asked.
    """
    try:
        names = await client.fetch("GET", "/models", _read_names)
    except Failure as error:
        failure = error
    else:
        return {name: card_for(name) for name in names if not client.endpoint.hosted or _embeds(name)}
    raise failure.error


def _read_names(response: httpx.Response) -> list[str]:
    payload = read_json(response.content)
    entries = payload.get("data") if isinstance(payload, dict) else None
    if not isinstance(entries, list):
        raise AnswerInvalid("it holds no list `data`")
    return [entry["id"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]


def _embeds(name: str) -> bool:
    return "embed" in name.lower() or find_card(name) is not None

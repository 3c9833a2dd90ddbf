"""A user's card overrides exactly the properties that it sets."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModel

from embeddings_mcp.assemble import build_service
from embeddings_mcp.embedders.local.checkpoint import read_checkpoint
from embeddings_mcp.errors import InputTooLong
from embeddings_mcp.models import InputType, ModelCard
from embeddings_mcp.schema import EmbeddingRequest
from embeddings_mcp.service import EmbeddingService
from embeddings_mcp.settings import EndpointSettings, Settings
from tests.local.checkpoints import SMALL, WIDTH, save, save_plain
from tests.nim.standin import StandIn, answering, stand_in

pytestmark = pytest.mark.anyio

NEMOTRON = "nvidia/nemotron-3-embed-1b"
PROMPTS = {"query": "q: ", "document": "d: "}


@asynccontextmanager
async def open_service(settings: Settings) -> AsyncIterator[EmbeddingService]:
    service = build_service(settings)
    try:
        with anyio.fail_after(60):
            yield service
    finally:
        await service.aclose()


def local_settings(folder: Path, **card: Any) -> Settings:
    """Settings for a checkpoint, with a card if any of its fields are given."""
    cards = json.dumps([{"id": "acme/legal", **card}] if card else [])
    return Settings.model_validate({"models": (f"acme/legal={folder}",), "cards": cards, "cache": "off"})


async def describe(settings: Settings) -> dict[str, Any]:
    async with open_service(settings) as service:
        (entry,) = service.known_models()
        return dict(entry)


async def embed(settings: Settings, input_type: InputType) -> list[float]:
    async with open_service(settings) as service:
        request = EmbeddingRequest(model="acme/legal", input="Water.", input_type=input_type)
        answer = await service.create_embedding(request)
    return list(map(float, answer["data"][0]["embedding"]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with different prompts for queries and passages."""
    save(tmp_path, Pooling(WIDTH), prompts=PROMPTS)
    return tmp_path


async def test_a_card_changes_only_what_it_sets_on_a_checkpoint(folder: Path) -> None:
    bare, shortened = local_settings(folder), local_settings(folder, matryoshka=[16])

    assert await describe(shortened) == await describe(bare) | {"allowed_dimensions": [16]}
    kinds: tuple[InputType, ...] = ("query", "passage")
    for input_type in kinds:
        assert await embed(shortened, input_type) == await embed(bare, input_type)


async def test_a_card_can_override_with_default_values(folder: Path) -> None:
    bare, unprompted = local_settings(folder), local_settings(folder, query_prompt="")
    symmetric = local_settings(folder, input_type="ignored")

    assert await describe(symmetric) == await describe(bare) | {"input_type": "ignored"}
    assert await embed(unprompted, "query") != await embed(bare, "query")
    assert await embed(unprompted, "passage") == await embed(bare, "passage")


async def test_a_card_sets_the_maximum_length_of_a_text(folder: Path) -> None:
    async with open_service(local_settings(folder, max_tokens=8)) as service:
        request = EmbeddingRequest(model="acme/legal", input="water " * 20, input_type="query")
        with pytest.raises(InputTooLong) as caught:
            await service.create_embedding(request)
    assert caught.value.max_tokens == 8


async def test_prompts_on_a_card_take_effect_without_an_input_type(tmp_path: Path) -> None:
    save(tmp_path / "with", Pooling(WIDTH), prompts=PROMPTS)
    save(tmp_path / "without", Pooling(WIDTH))
    prompted = local_settings(tmp_path / "without", query_prompt="q: ", passage_prompt="d: ")

    assert await describe(prompted) == await describe(local_settings(tmp_path / "with"))
    assert await embed(prompted, "query") == await embed(local_settings(tmp_path / "with"), "query")


async def test_a_card_does_not_change_the_pooling_of_a_plain_model(tmp_path: Path) -> None:
    save_plain(tmp_path, "bert", AutoModel, **SMALL)
    bare, shortened = local_settings(tmp_path), local_settings(tmp_path, matryoshka=[16])

    assert await embed(shortened, "query") == await embed(bare, "query")


async def test_a_known_model_keeps_the_default_prompt_of_its_files(tmp_path: Path) -> None:
    save(tmp_path, Pooling(WIDTH), prompts={"query": "q: ", "sts": "s: "}, default_prompt_name="sts")
    builtin_card = ModelCard(id="test/known", input_type="optional", passage_prompt="p: ")

    card = read_checkpoint(tmp_path, builtin_card).card(builtin_card.id, builtin_card)

    assert [card.prompt(input_type) for input_type in ("query", "passage", None)] == ["q: ", "p: ", "s: "]


@pytest.mark.parametrize("name", [NEMOTRON, "nemotron-3-embed"])
async def test_a_card_changes_only_what_it_sets_on_a_known_model(name: str) -> None:
    (bare,) = build_service(Settings(models=(name,))).known_models()
    cards = json.dumps([{"id": NEMOTRON, "matryoshka": [512]}])
    (shortened,) = build_service(Settings.model_validate({"models": (name,), "cards": cards})).known_models()

    assert shortened == bare | {"allowed_dimensions": [512]}


async def test_a_card_under_an_alias_of_a_known_model_keeps_all_its_names() -> None:
    cards = json.dumps([{"id": "nemotron-3-embed", "max_tokens": 512}])
    settings = Settings.model_validate({"models": (NEMOTRON,), "cards": cards})
    async with open_service(settings) as service:
        for name in (NEMOTRON, "nemotron-3-embed", "nvidia/Nemotron-3-Embed-1B-BF16"):
            embedder, _ = await service.catalog.find(name)
            assert (embedder.card.id, embedder.card.max_tokens) == ("nemotron-3-embed", 512)
            assert embedder.card.repository == "nvidia/Nemotron-3-Embed-1B-BF16"


def endpoint_settings(endpoint: StandIn, **card: Any) -> Settings:
    """Settings for an endpoint with a card."""
    return Settings.model_validate({"endpoints": (EndpointSettings(url=endpoint.url),), "cards": json.dumps([card])})


async def test_a_card_changes_only_what_it_sets_on_a_known_model_at_an_endpoint() -> None:
    models = {NEMOTRON: ModelCard(id=NEMOTRON, dimensions=2048, input_type="optional")}
    async with (
        stand_in(models=models) as endpoint,
        open_service(endpoint_settings(endpoint, id=NEMOTRON, matryoshka=[512])) as service,
    ):
        await service.create_embedding(EmbeddingRequest(model=NEMOTRON, input="a", input_type="query"))
        embedder, _ = await service.catalog.find("nemotron-3-embed")

    card = embedder.card
    assert endpoint.seen[-1].json["input_type"] == "query"
    assert (card.input_type, card.dimensions, card.max_tokens, card.matryoshka) == ("optional", 2048, 4096, (512,))


async def test_a_card_takes_precedence_over_the_endpoints_model_list() -> None:
    listing = answering(200, {"data": [{"id": "own/model", "max_tokens": 512, "dimensions": 8}]})
    async with (
        stand_in(route_faults={"/v1/models": listing}) as endpoint,
        open_service(endpoint_settings(endpoint, id="own/model", aliases=["mine"], max_tokens=7)) as service,
    ):
        embedder, _ = await service.catalog.find("mine")

    card = embedder.card
    assert (card.id, card.max_tokens, card.dimensions, card.input_type) == ("own/model", 7, 8, "optional")

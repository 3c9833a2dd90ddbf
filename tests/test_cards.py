"""A card of the user's own changes what it says of a model, and nothing else."""

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
async def opened(settings: Settings) -> AsyncIterator[EmbeddingService]:
    service = build_service(settings)
    try:
        with anyio.fail_after(60):
            yield service
    finally:
        await service.aclose()


def here(folder: Path, **card: Any) -> Settings:
    """Settings of a checkpoint with a card that says this, or without one."""
    cards = json.dumps([{"id": "acme/legal", **card}] if card else [])
    return Settings.model_validate({"models": (f"acme/legal={folder}",), "cards": cards, "cache": "off"})


async def described(settings: Settings) -> dict[str, Any]:
    async with opened(settings) as service:
        (entry,) = service.known_models()
        return dict(entry)


async def embedded(settings: Settings, input_type: InputType) -> list[float]:
    async with opened(settings) as service:
        request = EmbeddingRequest(model="acme/legal", input="Water.", input_type=input_type)
        answer = await service.create_embedding(request)
    return list(map(float, answer["data"][0]["embedding"]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that tells queries from passages."""
    save(tmp_path, Pooling(WIDTH), prompts=PROMPTS)
    return tmp_path


async def test_of_a_checkpoint_all_stays_that_the_card_does_not_say(folder: Path) -> None:
    bare, shortened = here(folder), here(folder, matryoshka=[16])

    assert await described(shortened) == await described(bare) | {"allowed_dimensions": [16]}
    kinds: tuple[InputType, ...] = ("query", "passage")
    for input_type in kinds:
        assert await embedded(shortened, input_type) == await embedded(bare, input_type)


async def test_what_the_card_says_holds_also_where_it_is_what_is_usual(folder: Path) -> None:
    bare, unprompted = here(folder), here(folder, query_prompt="")

    assert await described(here(folder, input_type="ignored")) == await described(bare) | {"input_type": "ignored"}
    assert await embedded(unprompted, "query") != await embedded(bare, "query")
    assert await embedded(unprompted, "passage") == await embedded(bare, "passage")


async def test_a_text_may_be_as_long_as_the_card_says(folder: Path) -> None:
    async with opened(here(folder, max_tokens=8)) as service:
        request = EmbeddingRequest(model="acme/legal", input="water " * 20, input_type="query")
        with pytest.raises(InputTooLong) as caught:
            await service.create_embedding(request)
    assert caught.value.allowed == 8


async def test_a_card_that_brings_the_prompts_need_not_say_that_they_are_used(tmp_path: Path) -> None:
    save(tmp_path / "with", Pooling(WIDTH), prompts=PROMPTS)
    save(tmp_path / "without", Pooling(WIDTH))
    prompted = here(tmp_path / "without", query_prompt="q: ", passage_prompt="d: ")

    assert await described(prompted) == await described(here(tmp_path / "with"))
    assert await embedded(prompted, "query") == await embedded(here(tmp_path / "with"), "query")


async def test_a_plain_model_is_pooled_with_a_card_as_without_one(tmp_path: Path) -> None:
    save_plain(tmp_path, "bert", AutoModel, **SMALL)
    bare, shortened = here(tmp_path), here(tmp_path, matryoshka=[16])

    assert await embedded(shortened, "query") == await embedded(bare, "query")


async def test_a_known_model_keeps_what_its_files_say_of_texts_without_a_type(tmp_path: Path) -> None:
    save(tmp_path, Pooling(WIDTH), prompts={"query": "q: ", "sts": "s: "}, default_prompt_name="sts")
    known = ModelCard(id="test/known", input_type="optional", passage_prompt="p: ")

    card = read_checkpoint(tmp_path, known).card(known.id, known)

    assert [card.prompt(input_type) for input_type in ("query", "passage", None)] == ["q: ", "p: ", "s: "]


@pytest.mark.parametrize("name", [NEMOTRON, "nemotron-3-embed"])
async def test_of_a_known_model_all_stays_that_the_card_does_not_say(name: str) -> None:
    (bare,) = build_service(Settings(models=(name,))).known_models()
    cards = json.dumps([{"id": NEMOTRON, "matryoshka": [512]}])
    (shortened,) = build_service(Settings.model_validate({"models": (name,), "cards": cards})).known_models()

    assert shortened == bare | {"allowed_dimensions": [512]}


async def test_a_card_by_another_name_of_a_known_model_leaves_it_all_its_names() -> None:
    cards = json.dumps([{"id": "nemotron-3-embed", "max_tokens": 512}])
    settings = Settings.model_validate({"models": (NEMOTRON,), "cards": cards})
    async with opened(settings) as service:
        for name in (NEMOTRON, "nemotron-3-embed", "nvidia/Nemotron-3-Embed-1B-BF16"):
            embedder, _ = await service.catalogue.find(name)
            assert (embedder.card.id, embedder.card.max_tokens) == ("nemotron-3-embed", 512)
            assert embedder.card.repository == "nvidia/Nemotron-3-Embed-1B-BF16"


def there(standing: StandIn, **card: Any) -> Settings:
    """Settings of an endpoint with a card that says this."""
    return Settings.model_validate({"endpoints": (EndpointSettings(url=standing.url),), "cards": json.dumps([card])})


async def test_of_a_known_model_at_an_endpoint_all_stays_that_the_card_does_not_say() -> None:
    models = {NEMOTRON: ModelCard(id=NEMOTRON, dimensions=2048, input_type="optional")}
    async with (
        stand_in(models=models) as standing,
        opened(there(standing, id=NEMOTRON, matryoshka=[512])) as service,
    ):
        await service.create_embedding(EmbeddingRequest(model=NEMOTRON, input="a", input_type="query"))
        embedder, _ = await service.catalogue.find("nemotron-3-embed")

    card = embedder.card
    assert standing.seen[-1].json["input_type"] == "query"
    assert (card.input_type, card.dimensions, card.max_tokens, card.matryoshka) == ("optional", 2048, 4096, (512,))


async def test_what_the_card_says_goes_before_the_endpoints_list_which_says_the_rest() -> None:
    listing = answering(200, {"data": [{"id": "own/model", "max_tokens": 512, "dimensions": 8}]})
    async with (
        stand_in(elsewhere={"/v1/models": listing}) as standing,
        opened(there(standing, id="own/model", aliases=["mine"], max_tokens=7)) as service,
    ):
        embedder, _ = await service.catalogue.find("mine")

    card = embedder.card
    assert (card.id, card.max_tokens, card.dimensions, card.input_type) == ("own/model", 7, 8, "optional")

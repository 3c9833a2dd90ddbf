"""Does `verify` tell the same vectors from others? Asked of the tiny E5 checkpoint, whose prompts matter."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embeddings_mcp.assemble import build_service, open_embedder
from embeddings_mcp.embedders.base import Embedder
from embeddings_mcp.errors import UnknownModel
from embeddings_mcp.faces.cli import app
from embeddings_mcp.faces.http import create_app
from embeddings_mcp.faces.mcp import build_mcp_server
from embeddings_mcp.models import find_card
from embeddings_mcp.settings import Settings
from embeddings_mcp.verification import SAMPLES, verify
from tests.support import serving

GOLDEN = Path(__file__).parent / "golden"
E5 = f"e5={GOLDEN / 'e5' / 'model'}"


@pytest.fixture
async def opened() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def open_one(opened: AsyncExitStack, where: str, model: str = "e5", settings: Settings | None = None) -> Embedder:
    embedder = await open_embedder(where, model, settings or Settings())
    opened.push_async_callback(embedder.aclose)
    return embedder


@pytest.mark.anyio
async def test_a_model_and_a_server_of_it_make_the_same_vectors(opened: AsyncExitStack) -> None:
    model = f"tiny/nemotron={GOLDEN / 'nemotron-3-embed' / 'model'}"
    settings = Settings(models=(model,))
    service = build_service(settings)
    with serving(create_app(service, build_mcp_server(service), settings)) as url:
        verdict = await verify(await open_one(opened, model), await open_one(opened, url, "tiny/nemotron"))

    assert verdict.same
    assert "the same vector space: vectors are equal" in verdict.words
    assert len(verdict.comparisons) == 2 * len(SAMPLES)


@pytest.mark.anyio
async def test_forgotten_prompts_make_another_space(opened: AsyncExitStack) -> None:
    known = find_card("e5")
    assert known is not None
    bare = Settings(cards=(replace(known, query_prompt="", passage_prompt=""),))
    verdict = await verify(await open_one(opened, E5), await open_one(opened, E5, settings=bare))

    assert not verdict.same
    assert "not the same vector space" in verdict.words


@pytest.mark.anyio
async def test_one_wrong_prompt_is_told_from_two(opened: AsyncExitStack) -> None:
    known = find_card("e5")
    assert known is not None
    half = Settings(cards=(replace(known, query_prompt="question: "),))
    verdict = await verify(await open_one(opened, E5), await open_one(opened, E5, settings=half))

    assert not verdict.same
    assert "all of them embedded as query: the prompts may differ" in verdict.words


@pytest.mark.anyio
async def test_an_endpoint_without_the_model_says_which_it_has(opened: AsyncExitStack) -> None:
    settings = Settings(models=(E5,))
    service = build_service(settings)
    with (
        serving(create_app(service, build_mcp_server(service), settings)) as url,
        pytest.raises(UnknownModel, match=r"has no model 'bge-m3'; it has: nvidia/nv-embedqa-e5-v5"),
    ):
        await open_one(opened, url, "bge-m3")


def test_the_command_answers_with_a_table_a_verdict_and_an_exit_code() -> None:
    same = CliRunner().invoke(app, ["verify", "--model", E5, "--against", E5])
    other = CliRunner().invoke(app, ["verify", "--model", E5, "--against", f"bge-m3={GOLDEN / 'bge-m3' / 'model'}"])

    assert same.exit_code == 0
    assert all(sample in same.stdout for sample in SAMPLES)
    assert "the same vector space" in same.stdout
    assert other.exit_code == 1
    assert "not the same vector space" in other.stdout

"""Whether `verify` detects different vectors; mostly with the tiny E5 checkpoint, whose prompts matter."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from embeddings_mcp.assemble import build_service, open_embedder
from embeddings_mcp.embedders.base import Embedder
from embeddings_mcp.errors import UnknownModel
from embeddings_mcp.faces.cli.commands import app
from embeddings_mcp.models import CardOverride, InputType, ModelCard
from embeddings_mcp.settings import EndpointSettings, Settings
from embeddings_mcp.vectors import FloatMatrix
from embeddings_mcp.verification import SAMPLES, verify
from tests.support import HashEmbedder, http_server

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
    with http_server(build_service(Settings(models=(model,)))) as url:
        verdict = await verify(await open_one(opened, model), await open_one(opened, url, "tiny/nemotron"))

    assert verdict.same
    assert "the same vector space: vectors are equal" in verdict.summary
    assert len(verdict.comparisons) == 2 * len(SAMPLES)


@pytest.mark.anyio
async def test_an_endpoint_that_cannot_truncate_is_compared_on_samples_that_are_short_enough(
    opened: AsyncExitStack,
) -> None:
    model = f"tiny/m3={GOLDEN / 'bge-m3' / 'model'}"
    with http_server(build_service(Settings(models=(model,)))) as url:
        settings = Settings(endpoints=(EndpointSettings(url=url, dialect="openai"),))
        verdict = await verify(await open_one(opened, model), await open_one(opened, url, "tiny/m3", settings=settings))

    assert verdict.same
    compared = {comparison.sample for comparison in verdict.comparisons}
    assert compared == SAMPLES.keys() - {"paragraph", "page"}


@dataclass
class Perturbed(HashEmbedder):
    """Vectors at a given cosine to those of a `HashEmbedder`."""

    cosine: float = 1.0

    def vector(self, text: str, input_type: InputType | None = None) -> FloatMatrix:
        exact = super().vector(text, input_type)
        orthogonal = np.roll(exact, 1) - np.roll(exact, 1) @ exact * exact
        sine = math.sqrt(1 - self.cosine**2)
        perturbed: FloatMatrix = self.cosine * exact + sine * orthogonal / np.linalg.norm(orthogonal)
        return perturbed


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("cosine", "same", "words"),
    [
        (1.0, True, "vectors are equal (lowest cosine 1.0"),
        (0.9995, True, "equal up to rounding"),
        (0.998, False, "the weights may be quantized, or the prompts differ"),
        (0.95, False, "not the same vector space: 19 of 19 vectors differ (lowest 0.9500)"),
    ],
)
async def test_vectors_are_the_same_only_up_to_rounding(cosine: float, same: bool, words: str) -> None:
    card = ModelCard(id="test/hash", dimensions=8)
    verdict = await verify(HashEmbedder(card=card), Perturbed(card=card, cosine=cosine))

    assert verdict.same is same
    assert words in verdict.summary


@pytest.mark.anyio
async def test_missing_prompts_make_another_vector_space(opened: AsyncExitStack) -> None:
    bare = Settings(cards=(CardOverride(id="nvidia/nv-embedqa-e5-v5", query_prompt="", passage_prompt=""),))
    verdict = await verify(await open_one(opened, E5), await open_one(opened, E5, settings=bare))

    assert not verdict.same
    assert "not the same vector space" in verdict.summary


@pytest.mark.anyio
async def test_one_wrong_prompt_is_named(opened: AsyncExitStack) -> None:
    half = Settings(cards=(CardOverride(id="e5", query_prompt="question: "),))
    verdict = await verify(await open_one(opened, E5), await open_one(opened, E5, settings=half))

    assert not verdict.same
    assert "all of them embedded as query: the prompts may differ" in verdict.summary


@pytest.mark.anyio
async def test_an_endpoint_without_the_model_names_those_it_has(opened: AsyncExitStack) -> None:
    with (
        http_server(build_service(Settings(models=(E5,)))) as url,
        pytest.raises(UnknownModel, match=r"has no model 'bge-m3'; it has: nvidia/nv-embedqa-e5-v5"),
    ):
        await open_one(opened, url, "bge-m3")


@pytest.mark.parametrize("name", ["e5", "default"])
def test_both_models_may_be_named_as_in_the_settings(name: str) -> None:
    result = CliRunner().invoke(app, ["verify", "--model", name, "--against", name], env={"EMBEDDINGS_MCP_MODELS": E5})

    assert result.exit_code == 0
    assert "the same vector space" in result.stdout


def test_the_command_prints_a_table_and_a_verdict_and_sets_the_exit_code() -> None:
    equal = CliRunner().invoke(app, ["verify", "--model", E5, "--against", E5])
    other = CliRunner().invoke(app, ["verify", "--model", E5, "--against", f"bge-m3={GOLDEN / 'bge-m3' / 'model'}"])

    assert equal.exit_code == 0
    assert all(sample in equal.stdout for sample in SAMPLES)
    assert "the same vector space" in equal.stdout
    assert other.exit_code == 1
    assert "not the same vector space" in other.stdout

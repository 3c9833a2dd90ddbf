"""Which models an endpoint has, and whether it is ready."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest
from pydantic import SecretStr

from embeddings_mcp.embedders.nim import Endpoint, EndpointClient, NimEmbedder, discover, endpoint
from embeddings_mcp.errors import UpstreamFailed, UpstreamRefused, UpstreamTimeout, UpstreamUnavailable
from embeddings_mcp.models import DEFAULT_MODEL, ModelCard, find_card
from tests.nim.standin import SYMMETRIC, Fault, StandIn, answering, held, stand_in

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def client_of(standing: StandIn, *, silence: float = 10) -> AsyncIterator[EndpointClient]:
    client = EndpointClient(Endpoint(url=standing.url, api_key=SecretStr("nvapi-secret"), timeout=silence))
    try:
        with anyio.fail_after(10):
            yield client
    finally:
        await client.aclose()


def served(*names: str) -> dict[str, ModelCard]:
    return {name: ModelCard(id=name) for name in names}


async def test_listed_models_come_with_what_is_known_of_them() -> None:
    async with (
        stand_in(models=served(DEFAULT_MODEL.upper(), "team/own-model")) as standing,
        client_of(standing) as client,
    ):
        cards = await discover(client)
    assert cards == {
        DEFAULT_MODEL.upper(): find_card(DEFAULT_MODEL),
        "team/own-model": ModelCard(id="team/own-model", input_type="optional", hub=""),
    }


async def test_the_hosted_catalogue_is_cut_down_to_embedding_models(monkeypatch: pytest.MonkeyPatch) -> None:
    models = served("meta/llama-4", "nvidia/nemotron-3-embed-1b", DEFAULT_MODEL)
    async with stand_in(models=models) as standing, client_of(standing) as client:
        monkeypatch.setattr(endpoint, "HOSTED_URL", standing.url)
        assert list(await discover(client)) == ["nvidia/nemotron-3-embed-1b", DEFAULT_MODEL]


async def test_a_list_that_is_none_is_refused() -> None:
    no_list = answering(200, {"models": []})
    async with stand_in(elsewhere={"/v1/models": no_list}) as standing, client_of(standing) as client:
        with pytest.raises(UpstreamFailed, match="it holds no list `data`"):
            await discover(client)
    async with stand_in(elsewhere={"/v1/models": answering(404)}) as standing, client_of(standing) as client:
        with pytest.raises(UpstreamFailed, match=r"has no such route \(404\)"):
            await discover(client)


async def test_readiness_is_the_status_of_the_endpoints_own_route() -> None:
    async with stand_in() as standing, client_of(standing) as client:
        embedder = NimEmbedder(client, SYMMETRIC)
        await embedder.check()
        await embedder.check()
        assert [seen.path for seen in standing.seen] == ["/v1/health/ready", "/v1/health/ready"]


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        (
            answering(503, {"error": {"message": "starting"}}),
            UpstreamUnavailable,
            r"takes no work now \(503: starting\)",
        ),
        (answering(401), UpstreamRefused, "does not accept the API key"),
        (answering(404), UpstreamFailed, "is its address right"),
    ],
)
async def test_an_endpoint_that_is_not_ready_says_why_and_is_asked_once(
    fault: Fault, error: type[Exception], says: str
) -> None:
    async with stand_in(elsewhere={"/v1/health/ready": fault}) as standing, client_of(standing) as client:
        with pytest.raises(error, match=says):
            await NimEmbedder(client, SYMMETRIC).check()
        assert len(standing.seen) == 1


async def test_an_endpoint_that_does_not_answer_is_not_ready() -> None:
    never = anyio.Event()
    silent = {"/v1/health/ready": held(never)}
    async with stand_in(elsewhere=silent) as standing, client_of(standing, silence=0.03) as client:
        with pytest.raises(UpstreamTimeout):
            await NimEmbedder(client, SYMMETRIC).check()


async def test_the_hosted_api_is_asked_for_a_vector_until_it_gave_one(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = iter([answering(403), None])
    async with stand_in(faults=itertools.chain(faults, itertools.repeat(None))) as standing:
        monkeypatch.setattr(endpoint, "HOSTED_URL", standing.url)
        async with client_of(standing) as client:
            embedder = NimEmbedder(client, SYMMETRIC)
            with pytest.raises(UpstreamRefused, match=r"keys come from https://build\.nvidia\.com"):
                await embedder.check()
            for _ in range(3):
                await embedder.check()
            await client.check()
        assert [seen.path for seen in standing.seen] == ["/v1/embeddings", "/v1/embeddings"]

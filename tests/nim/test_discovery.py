"""Model discovery and readiness of an endpoint."""

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
async def client_of(nim: StandIn, *, read_timeout: float = 10) -> AsyncIterator[EndpointClient]:
    client = EndpointClient(Endpoint(url=nim.url, api_key=SecretStr("nvapi-secret"), timeout=read_timeout))
    try:
        with anyio.fail_after(10):
            yield client
    finally:
        await client.aclose()


def http_server(*names: str) -> dict[str, ModelCard]:
    return {name: ModelCard(id=name) for name in names}


async def test_listed_models_get_their_cards() -> None:
    async with (
        stand_in(models=http_server(DEFAULT_MODEL.upper(), "team/own-model")) as nim,
        client_of(nim) as client,
    ):
        cards = await discover(client)
    assert cards == {
        DEFAULT_MODEL.upper(): find_card(DEFAULT_MODEL),
        "team/own-model": ModelCard(id="team/own-model", input_type="optional", hub=""),
    }


async def test_the_hosted_catalog_is_filtered_for_embedding_models(monkeypatch: pytest.MonkeyPatch) -> None:
    models = http_server("meta/llama-4", "nvidia/nemotron-3-embed-1b", DEFAULT_MODEL)
    async with stand_in(models=models) as nim, client_of(nim) as client:
        monkeypatch.setattr(endpoint, "HOSTED_URL", nim.url)
        assert list(await discover(client)) == ["nvidia/nemotron-3-embed-1b", DEFAULT_MODEL]


async def test_a_response_without_a_list_is_refused() -> None:
    no_list = answering(200, {"models": []})
    async with stand_in(route_faults={"/v1/models": no_list}) as nim, client_of(nim) as client:
        with pytest.raises(UpstreamFailed, match="it has no `data` list"):
            await discover(client)
    async with stand_in(route_faults={"/v1/models": answering(404)}) as nim, client_of(nim) as client:
        with pytest.raises(UpstreamFailed, match=r"has no such route \(404\)"):
            await discover(client)


async def test_readiness_is_the_status_of_the_endpoints_readiness_route() -> None:
    async with stand_in() as nim, client_of(nim) as client:
        embedder = NimEmbedder(client, SYMMETRIC)
        await embedder.check()
        await embedder.check()
        assert [seen.path for seen in nim.seen] == ["/v1/health/ready", "/v1/health/ready"]


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        (
            answering(503, {"error": {"message": "starting"}}),
            UpstreamUnavailable,
            r"takes no work now \(503: starting\)",
        ),
        (answering(401), UpstreamRefused, "does not accept the API key"),
        (answering(404), UpstreamFailed, "is its URL right"),
    ],
)
async def test_an_endpoint_that_is_not_ready_is_reported_with_the_reason_after_one_request(
    fault: Fault, error: type[Exception], says: str
) -> None:
    async with stand_in(route_faults={"/v1/health/ready": fault}) as nim, client_of(nim) as client:
        with pytest.raises(error, match=says):
            await NimEmbedder(client, SYMMETRIC).check()
        assert len(nim.seen) == 1


async def test_an_endpoint_that_does_not_respond_is_not_ready() -> None:
    never = anyio.Event()
    silent = {"/v1/health/ready": held(never)}
    async with stand_in(route_faults=silent) as nim, client_of(nim, read_timeout=0.03) as client:
        with pytest.raises(UpstreamTimeout):
            await NimEmbedder(client, SYMMETRIC).check()


async def test_the_hosted_api_is_checked_by_embedding_until_that_succeeds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = iter([answering(403), None])
    async with stand_in(faults=itertools.chain(faults, itertools.repeat(None))) as nim:
        monkeypatch.setattr(endpoint, "HOSTED_URL", nim.url)
        async with client_of(nim) as client:
            embedder = NimEmbedder(client, SYMMETRIC)
            with pytest.raises(UpstreamRefused, match=r"keys come from https://build\.nvidia\.com"):
                await embedder.check()
            for _ in range(3):
                await embedder.check()
            await client.check()
        assert [seen.path for seen in nim.seen] == ["/v1/embeddings", "/v1/embeddings"]

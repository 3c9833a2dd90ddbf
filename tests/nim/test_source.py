"""The models of endpoints in a service: resolution of names, and when models are discovered."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from embeddings_mcp.catalog import Catalog
from embeddings_mcp.embedders.base import Embedder
from embeddings_mcp.embedders.nim import Endpoint, EndpointClient, EndpointModels, source
from embeddings_mcp.errors import InvalidRequest, InvalidSetting, UnknownModel, UpstreamUnavailable
from embeddings_mcp.models import DEFAULT_MODEL, ModelCard
from embeddings_mcp.schema import SimilarityRequest
from embeddings_mcp.serialization import parse
from embeddings_mcp.service import EmbeddingService
from tests.nim.standin import ASYMMETRIC, SYMMETRIC, StandIn, answering, held, stand_in
from tests.support import HashEmbedder

pytestmark = pytest.mark.anyio

HERE = HashEmbedder(ModelCard(id="test/here", aliases=("here",), dimensions=8))
FAILING = {"/v1/models": answering(500, b"broken")}


def models_of(nim: StandIn, **chosen: Any) -> EndpointModels:
    return EndpointModels(EndpointClient(Endpoint(url=nim.url)), **chosen)


@asynccontextmanager
async def catalog_of(
    *sources: EndpointModels, here: Sequence[Embedder] = (HERE,), default: str = "test/here"
) -> AsyncIterator[Catalog]:
    catalog = Catalog(here, sources, default=default)
    try:
        with anyio.fail_after(10):
            yield catalog
    finally:
        await catalog.aclose()


async def origin_of(catalog: Catalog, model: str) -> str:
    embedder, _ = await catalog.find(model)
    return embedder.origin


def served(catalog: Catalog) -> list[tuple[str, str]]:
    return [(embedder.card.id, embedder.origin) for embedder in catalog.known]


def discoveries(nim: StandIn) -> int:
    """Return how often the list of models was requested."""
    return sum(seen.path == "/v1/models" for seen in nim.seen)


# --- Discovery -------------------------------------------------------------------------------------------------------


async def test_models_are_discovered_once_and_only_when_a_name_or_a_list_requires_it() -> None:
    async with stand_in() as nim, catalog_of(models_of(nim)) as catalog:
        assert await origin_of(catalog, "HERE") == "local"
        assert served(catalog) == [("test/here", "local")]
        assert not nim.seen
        for name in (ASYMMETRIC.id, SYMMETRIC.id, f"{SYMMETRIC.id}-query"):
            assert await origin_of(catalog, name) == f"{nim.url}/v1"
        with pytest.raises(UnknownModel, match="served are: test/here, test/asymmetric, test/symmetric"):
            await catalog.find("gone")
        await catalog.refresh()
        assert discoveries(nim) == 1


async def test_discovery_is_single_flight() -> None:
    gate = anyio.Event()
    async with (
        stand_in(route_faults={"/v1/models": held(gate)}) as nim,
        catalog_of(models_of(nim)) as catalog,
        anyio.create_task_group() as group,
    ):
        for _ in range(5):
            group.start_soon(origin_of, catalog, SYMMETRIC.id)
        await nim.received(1)
        await anyio.wait_all_tasks_blocked()
        gate.set()
    assert discoveries(nim) == 1


async def test_a_new_model_of_an_endpoint_is_found_once_its_list_is_stale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with stand_in(models={SYMMETRIC.id: SYMMETRIC}) as nim, catalog_of(models_of(nim)) as catalog:
        first, _ = await catalog.find(SYMMETRIC.id)
        nim.models = {ASYMMETRIC.id: ASYMMETRIC, SYMMETRIC.id: SYMMETRIC}
        with pytest.raises(UnknownModel):
            await catalog.find(ASYMMETRIC.id)
        monkeypatch.setattr("embeddings_mcp.catalog.MODEL_LIST_TTL_SECONDS", 0)
        assert await origin_of(catalog, ASYMMETRIC.id) == f"{nim.url}/v1"
        assert (await catalog.find(SYMMETRIC.id))[0] is first  # which keeps its state
        nim.models = {ASYMMETRIC.id: ASYMMETRIC}
        await catalog.refresh()
        assert served(catalog)[1:] == [(ASYMMETRIC.id, f"{nim.url}/v1")]


async def test_a_stale_list_is_not_refreshed_for_a_model_that_another_endpoint_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("embeddings_mcp.catalog.MODEL_LIST_TTL_SECONDS", 0)
    async with (
        stand_in(models={ASYMMETRIC.id: ASYMMETRIC}) as first,
        stand_in(models={SYMMETRIC.id: SYMMETRIC}) as second,
        catalog_of(models_of(first), models_of(second)) as catalog,
    ):
        for _ in range(3):
            assert await origin_of(catalog, SYMMETRIC.id) == f"{second.url}/v1"
        assert (discoveries(first), discoveries(second)) == (1, 1)


async def test_there_is_no_discovery_if_the_settings_name_the_models() -> None:
    async with (
        stand_in() as nim,
        catalog_of(models_of(nim, known=[SYMMETRIC.id], complete=True)) as catalog,
    ):
        assert await origin_of(catalog, SYMMETRIC.id) == f"{nim.url}/v1"
        with pytest.raises(UnknownModel):
            await catalog.find(ASYMMETRIC.id)
        assert not nim.seen


async def test_a_failed_discovery_is_not_repeated_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stand_in(route_faults=FAILING) as nim, catalog_of(models_of(nim)) as catalog:
        for _ in range(3):
            with pytest.raises(UpstreamUnavailable, match=r"whether `model` 'x' is served is not known: .*500: broken"):
                await catalog.find("x")
            await catalog.refresh()
        assert discoveries(nim) == 1
        monkeypatch.setattr(source, "RETRY_SECONDS", 0)
        nim.route_faults = {}
        assert await origin_of(catalog, SYMMETRIC.id) == f"{nim.url}/v1"
        assert discoveries(nim) == 2


async def test_discovery_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "DISCOVERY_TIMEOUT_SECONDS", 0.05)
    silent = {"/v1/models": held(anyio.Event())}
    async with stand_in(route_faults=silent) as nim, catalog_of(models_of(nim)) as catalog:
        await catalog.refresh()
        assert served(catalog) == [("test/here", "local")]
        with pytest.raises(UpstreamUnavailable, match=r"did not list its models within 0\.05 s"):
            await catalog.find("x")


async def test_cancelling_a_discovery_leaves_it_to_the_next_caller() -> None:
    gate = anyio.Event()
    async with (
        stand_in(route_faults={"/v1/models": held(gate)}) as nim,
        catalog_of(models_of(nim)) as catalog,
    ):
        async with anyio.create_task_group() as group:
            group.start_soon(origin_of, catalog, SYMMETRIC.id)
            await nim.received(1)
            group.cancel_scope.cancel()
        gate.set()
        assert await origin_of(catalog, SYMMETRIC.id) == f"{nim.url}/v1"


# --- Precedence ------------------------------------------------------------------------------------------------------


async def test_a_local_model_takes_precedence_over_an_endpoints() -> None:
    here = HashEmbedder(SYMMETRIC)
    async with (
        stand_in() as nim,
        catalog_of(models_of(nim), here=[here], default=SYMMETRIC.id) as catalog,
    ):
        await catalog.refresh()
        assert (await catalog.find(SYMMETRIC.id))[0] is here
        assert served(catalog) == [(SYMMETRIC.id, "local"), (ASYMMETRIC.id, f"{nim.url}/v1")]


async def test_the_first_of_two_endpoints_takes_precedence_even_if_it_requires_discovery() -> None:
    async with stand_in(models={SYMMETRIC.id: SYMMETRIC}) as first, stand_in() as second:
        known = models_of(second, known=[SYMMETRIC.id, ASYMMETRIC.id])
        async with catalog_of(models_of(first), known) as catalog:
            assert await origin_of(catalog, SYMMETRIC.id) == f"{first.url}/v1"
            assert await origin_of(catalog, ASYMMETRIC.id) == f"{second.url}/v1"
            assert discoveries(second) == 0
            assert served(catalog)[1:] == [
                (SYMMETRIC.id, f"{first.url}/v1"),
                (ASYMMETRIC.id, f"{second.url}/v1"),
            ]


async def test_there_is_no_failover_to_the_second_endpoint_if_the_first_is_down() -> None:
    async with stand_in() as first:
        pass
    async with stand_in() as second, catalog_of(models_of(first), models_of(second)) as catalog:
        with pytest.raises(UpstreamUnavailable, match=f"cannot connect to the endpoint {first.url}"):
            await catalog.find(SYMMETRIC.id)
        assert not second.seen
        assert await origin_of(catalog, "test/here") == "local"


async def test_the_last_known_list_is_used_while_an_endpoint_is_down() -> None:
    async with (
        stand_in(models={"test/other": ModelCard(id="test/other")}) as first,
        stand_in() as second,
        catalog_of(models_of(first), models_of(second)) as catalog,
    ):
        await catalog.refresh()
        first.route_faults = FAILING
        assert await origin_of(catalog, SYMMETRIC.id) == f"{second.url}/v1"


async def test_a_model_listed_under_its_old_and_new_names_is_one_model() -> None:
    old, new = "nvidia/llama-3.2-nv-embedqa-1b-v2", "nvidia/llama-nemotron-embed-1b-v2"
    models = {name: ModelCard(id=name, dimensions=2048) for name in (old, new)}
    async with stand_in(models=models) as nim, catalog_of(models_of(nim)) as catalog:
        await catalog.refresh()
        assert served(catalog)[1:] == [(new, f"{nim.url}/v1")]
        embedder, _ = await catalog.find(old)
        await embedder.embed(["a text"], input_type="query", truncate="NONE")
        assert nim.seen[-1].json["model"] == new


# --- The default -----------------------------------------------------------------------------------------------------


async def test_the_default_may_be_a_model_that_is_not_discovered_yet() -> None:
    async with (
        stand_in() as nim,
        catalog_of(models_of(nim), here=[], default=ASYMMETRIC.id) as catalog,
    ):
        assert (catalog.default, catalog.default_name) == (None, ASYMMETRIC.id)
        assert not nim.seen
        for name, implied in {"default": None, "DEFAULT-query": "query"}.items():
            embedder, input_type = await catalog.find(name)
            assert (embedder.card.id, input_type) == (ASYMMETRIC.id, implied)
            assert catalog.default is embedder


async def test_readiness_is_that_of_the_default_models_endpoint() -> None:
    async with stand_in(route_faults=FAILING) as nim:
        service = EmbeddingService([], default_model="e5", sources=[models_of(nim)])
        with pytest.raises(UpstreamUnavailable, match="is served is not known"):
            await service.check()
        await service.aclose()
        nim.route_faults = {}
        e5 = "nvidia/nv-embedqa-e5-v5"
        nim.models = {e5: ModelCard(id=e5)}
        service = EmbeddingService([], default_model="e5", sources=[models_of(nim)])
        await service.check()
        await service.aclose()
        assert [seen.path for seen in nim.seen] == ["/v1/models", "/v1/models", "/v1/health/ready"]


async def test_without_endpoints_the_default_must_be_a_local_model() -> None:
    with pytest.raises(InvalidSetting, match="`--endpoint` from an endpoint that has it"):
        Catalog([HERE], [], default=ASYMMETRIC.id)


async def test_an_unserved_model_that_could_run_locally_is_named_with_how_to_serve_it() -> None:
    async with catalog_of() as catalog:
        with pytest.raises(UnknownModel) as caught:
            await catalog.find("nv-embed-v1")
        assert caught.value.message.endswith(
            "served are: test/here (or `default`). NVIDIA's hosted API ended it on 2026-08-25; a server started with "
            "`--model nvidia/nv-embed-v1` has it"
        )
        with pytest.raises(UnknownModel, match=r"`--model nvidia/nv-embedqa-e5-v5=FOLDER` has it"):
            await catalog.find("e5")
        with pytest.raises(UnknownModel, match=r"served are: test/here \(or `default`\)$"):
            await catalog.find("gone")


# --- Model cards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({}, {"max_tokens": None, "dimensions": None, "input_type": "optional", "matryoshka": ()}),
        ({"max_model_len": 8192}, {"max_tokens": 8192}),
        (
            {"max_tokens": 512, "dimensions": 64, "allowed_dimensions": [16, 32], "input_type": "required"},
            {"max_tokens": 512, "dimensions": 64, "matryoshka": (16, 32), "input_type": "required"},
        ),
        (
            {"max_tokens": True, "dimensions": "64", "allowed_dimensions": 3, "input_type": "maybe"},
            {"max_tokens": None, "dimensions": None, "matryoshka": (), "input_type": "optional"},
        ),
    ],
    ids=["nothing", "vLLM", "a server of ours", "nonsense"],
)
async def test_details_listed_by_an_endpoint_refine_the_card(entry: dict[str, Any], expected: dict[str, Any]) -> None:
    listing = answering(200, {"object": "list", "data": [{"id": "own/model", **entry}]})
    async with stand_in(route_faults={"/v1/models": listing}) as nim, catalog_of(models_of(nim)) as catalog:
        embedder, _ = await catalog.find("own/model")
    assert {name: getattr(embedder.card, name) for name in expected} == expected


async def test_the_token_limit_of_nemotron_3_is_lower_at_a_nim() -> None:
    name = "nvidia/nemotron-3-embed-1b"
    async with stand_in(models={name: ModelCard(id=name)}) as nim:
        for dialect, limit in (("nim", 4096), ("openai", 32768)):
            endpoint = Endpoint(url=nim.url, dialect=dialect)  # type: ignore[arg-type]
            async with catalog_of(EndpointModels(EndpointClient(endpoint))) as catalog:
                assert (await catalog.find("nemotron-3-embed"))[0].card.max_tokens == limit


async def test_a_model_at_an_endpoint_has_only_the_mode_that_endpoints_have() -> None:
    name = "baai/bge-m3"
    async with stand_in(models={name: ModelCard(id=name)}) as nim:
        service = EmbeddingService([], default_model=name, sources=[models_of(nim)])
        assert (await service.describe(name))["modes"] == ["dense"]
        request = parse(SimilarityRequest, {"model": name, "input": ["a", "b"], "mode": "sparse"})
        with pytest.raises(InvalidRequest, match=r"does not support mode 'sparse'; its modes are: dense$"):
            await service.similarity(request)
        await service.aclose()


async def test_models_of_endpoints_are_described_like_local_ones() -> None:
    async with stand_in() as nim:
        local = HashEmbedder(ModelCard(id=DEFAULT_MODEL, dimensions=8))
        service = EmbeddingService([local], default_model=DEFAULT_MODEL, sources=[models_of(nim)])
        assert [entry["id"] for entry in service.known_models()] == [DEFAULT_MODEL]
        listed = (await service.list_models())["models"]
        assert [(entry["id"], entry["served_from"], entry["default"]) for entry in listed] == [
            (DEFAULT_MODEL, "local", True),
            (ASYMMETRIC.id, f"{nim.url}/v1", False),
            (SYMMETRIC.id, f"{nim.url}/v1", False),
        ]
        assert await service.describe(SYMMETRIC.id) == listed[2]
        await service.aclose()


async def test_discovery_counts_towards_the_rate_limit() -> None:
    async with stand_in() as nim:
        endpoint = Endpoint(url=nim.url, requests_per_minute=1)
        async with catalog_of(EndpointModels(EndpointClient(endpoint))) as catalog:
            embedder, _ = await catalog.find(SYMMETRIC.id)
            with anyio.move_on_after(1), pytest.raises(Exception, match="is busy"):
                await embedder.embed(["a"], input_type=None, truncate="NONE")
    assert len(nim.seen) == 1


def test_a_catalog_is_created_without_requests() -> None:
    endpoints = (
        EndpointModels(EndpointClient(Endpoint(url=f"http://localhost:{port}"))) for port in itertools.count(1)
    )
    catalog = Catalog([HERE], itertools.islice(endpoints, 20), default="test/here")
    assert not catalog.is_local
    assert served(catalog) == [("test/here", "local")]

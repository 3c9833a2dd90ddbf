"""Endpoints in the settings, and the service assembled from them."""

from __future__ import annotations

import json
from contextlib import aclosing
from pathlib import Path

import anyio
import httpx
import pytest
from pydantic import SecretStr, ValidationError

from embeddings_mcp.assemble import build_service, build_service_for_model, endpoint_models, open_embedder
from embeddings_mcp.embedders.nim import HOSTED_DEFAULT_MODEL, HOSTED_MODELS, HOSTED_URL, EndpointModels
from embeddings_mcp.errors import InvalidRequest, InvalidSetting, UnknownModel, UpstreamUnavailable
from embeddings_mcp.models import DEFAULT_MODEL, CardOverride
from embeddings_mcp.service import EmbeddingService
from embeddings_mcp.settings import EndpointSettings, Settings
from tests.nim.standin import ASYMMETRIC, SYMMETRIC, stand_in
from tests.support import SECONDS, http_server

KEY = "nvapi-not-to-be-seen"
HERE, THERE = "http://localhost:8001", "https://nim.example"


def settings_of(*endpoints: str | EndpointSettings, **chosen: object) -> Settings:
    return Settings(endpoints=endpoints, **chosen)  # type: ignore[arg-type]


def served(service: EmbeddingService) -> list[tuple[str, str]]:
    return [(entry["id"], entry["served_from"]) for entry in service.known_models()]


def keys_of(settings: Settings) -> dict[str, tuple[str | None, str]]:
    """Each endpoint's key and its `key_name`."""
    keys: dict[str, tuple[str | None, str]] = {}
    for source in endpoint_models(settings):
        assert isinstance(source, EndpointModels)
        endpoint = source._client.endpoint
        key = None if endpoint.api_key is None else endpoint.api_key.get_secret_value()
        keys[endpoint.url] = (key, endpoint.key_name)
    return keys


# --- Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "endpoints"),
    [
        (f"{HERE}  {THERE}\n", [{"url": HERE}, {"url": THERE}]),
        (json.dumps([HERE, {"url": THERE, "batch_size": 7}]), [{"url": HERE}, {"url": THERE, "batch_size": 7}]),
        (
            f' [{{"url": "{HERE}", "models": ["a", "b"], "dialect": "openai", "api_key_env": "MINE"}}]',
            [{"url": HERE, "models": ("a", "b"), "dialect": "openai", "api_key_env": "MINE"}],
        ),
        ("[]", []),
    ],
)
def test_endpoints_are_addresses_or_json(
    monkeypatch: pytest.MonkeyPatch, text: str, endpoints: list[dict[str, object]]
) -> None:
    monkeypatch.setenv("EMBEDDINGS_MCP_ENDPOINTS", text)
    assert [endpoint.model_dump(exclude_none=True) for endpoint in Settings().endpoints] == endpoints


def test_an_endpoint_given_by_flag_replaces_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDINGS_MCP_ENDPOINTS", THERE)
    given = settings_of(HERE, f'{{"url": "{THERE}", "timeout": 5}}')
    assert given.endpoints == (EndpointSettings(url=HERE), EndpointSettings(url=THERE, timeout=5))


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("[", (), "must be JSON"),
        ("[3]", (0,), "valid dictionary"),
        ('[{"dialect": "nim"}]', (0, "url"), "Field required"),
        (f'[{{"url": "{HERE}", "key": "{KEY}"}}]', (0,), "an endpoint has no field 'key'; its fields are url, "),
        (f'[{{"url": "{HERE}", "dialect": "tei"}}]', (0, "dialect"), "'nim' or 'openai'"),
        (f'[{{"url": "{HERE}", "models": []}}]', (0, "models"), "at least 1 item"),
        (f'[{{"url": "{HERE}", "batch_size": 0}}]', (0, "batch_size"), "greater than 0"),
        (f'[{{"url": "{HERE}", "api_key": "{KEY}", "api_key_env": "MINE"}}]', (0,), "both `api_key` and `api_key_env`"),
        (
            f'[{{"url": "{HERE}", "caller_keys": true}}, {{"url": "{THERE}", "caller_keys": true}}]',
            (),
            "for one endpoint only",
        ),
    ],
)
def test_an_invalid_endpoint_is_refused_without_repeating_its_key(
    monkeypatch: pytest.MonkeyPatch, text: str, place: tuple[object, ...], problem: str
) -> None:
    monkeypatch.setenv("EMBEDDINGS_MCP_ENDPOINTS", text)
    with pytest.raises(ValidationError) as caught:
        Settings()
    error, *_ = caught.value.errors()
    assert error["loc"] == ("endpoints", *place)
    assert problem in error["msg"]
    assert KEY not in str(caught.value)


def test_keys_are_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_API_KEY", KEY)
    settings = settings_of(EndpointSettings(url=HERE, api_key=SecretStr(KEY)))
    assert settings.nvidia_api_key is not None
    printed = [str(settings), repr(settings), settings.model_dump_json(), repr(endpoint_models(settings))]
    assert not [text for text in printed if KEY in text]


@pytest.mark.anyio
async def test_a_key_in_the_place_of_a_models_name_is_not_repeated() -> None:
    keys = ["nvapi-in-the-wrong-place", "emk_in-the-wrong-place", "of-the-server", "of-alice", "of-the-endpoint"]
    async with stand_in() as nim:
        endpoint = EndpointSettings(url=nim.url, api_key=SecretStr("of-the-endpoint"))
        settings = Settings(
            endpoints=(endpoint,), api_key=SecretStr("of-the-server"), api_keys=SecretStr("alice=of-alice")
        )
        with http_server(build_service(settings)) as url:
            async with httpx.AsyncClient(base_url=url, timeout=SECONDS) as http:
                for key in keys:
                    for answer in (
                        await http.post("/v1/embeddings", json={"model": key, "input": "a"}),
                        await http.get(f"/v1/models/{key}"),
                    ):
                        assert answer.status_code == 404
                        assert answer.json()["error"]["message"].startswith("`model` '***' is not served here")
    with pytest.raises(InvalidSetting, match=r"the default model '\*\*\*' is not among the models served"):
        build_service(Settings(default_model="nvapi-in-the-wrong-place"))


# --- Keys ------------------------------------------------------------------------------------------------------------


def test_each_endpoint_has_its_own_key_and_nvidias_key_goes_to_nvidia_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "of-mine")
    settings = settings_of(
        HERE,
        EndpointSettings(url=THERE, api_key_env="MINE"),
        EndpointSettings(url="https://other.example", api_key=SecretStr("of-other")),
        nvidia_api_key=SecretStr(KEY),
    )
    assert keys_of(settings) == {
        f"{HERE}/v1": (None, "the endpoint's `api_key_env`"),
        f"{THERE}/v1": ("of-mine", "MINE"),
        "https://other.example/v1": ("of-other", "the endpoint's `api_key`"),
        HOSTED_URL: (KEY, "NVIDIA_API_KEY"),
    }


def test_the_hosted_api_can_be_configured_like_other_endpoints_and_still_gets_its_key() -> None:
    configured = EndpointSettings(url="https://integrate.api.nvidia.com", requests_per_minute=200)
    assert keys_of(settings_of(configured, nvidia_api_key=SecretStr(KEY))) == {HOSTED_URL: (KEY, "NVIDIA_API_KEY")}
    assert keys_of(settings_of(configured)) == {HOSTED_URL: (None, "NVIDIA_API_KEY")}


@pytest.mark.parametrize("value", [None, ""])
def test_a_missing_key_variable_is_an_error(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("MINE", raising=False)
    if value is not None:
        monkeypatch.setenv("MINE", value)
    with pytest.raises(InvalidSetting, match="has its key in the environment variable MINE, which is not set"):
        build_service(settings_of(EndpointSettings(url=HERE, api_key_env="MINE")))


@pytest.mark.parametrize(
    ("endpoints", "lesson"),
    [
        (KEY, "must look like https://host"),
        (f"localhost:{KEY}", "must look like https://host"),
        (f"https://localhost:{KEY}", "must look like https://host"),
        (json.dumps([{"url": HERE, "api_key_env": KEY}]), "takes the name of an environment variable, not the key"),
        (
            json.dumps([{"url": HERE, "api_key_env": KEY.replace("-", "_")}]),
            "takes the name of an environment variable",
        ),
    ],
)
def test_a_key_given_as_an_address_or_variable_name_is_refused_without_being_repeated(
    monkeypatch: pytest.MonkeyPatch, endpoints: str, lesson: str
) -> None:
    monkeypatch.setenv("EMBEDDINGS_MCP_ENDPOINTS", endpoints)
    with pytest.raises(InvalidSetting, match=lesson) as caught:
        build_service(Settings())
    assert "nvapi" not in str(caught.value)


# --- Services --------------------------------------------------------------------------------------------------------


def test_with_only_nvidias_key_the_hosted_models_are_served_next_to_the_default() -> None:
    service = build_service(Settings(nvidia_api_key=SecretStr(KEY)))
    assert served(service) == [(DEFAULT_MODEL, "local"), *((model, HOSTED_URL) for model in HOSTED_MODELS)]
    assert service.catalog.default_name == DEFAULT_MODEL
    chosen = build_service(Settings(nvidia_api_key=SecretStr(KEY), default_model="nemotron-3-embed"))
    assert chosen.catalog.default_name == HOSTED_DEFAULT_MODEL


def test_a_local_model_takes_precedence_over_the_hosted_api() -> None:
    card = CardOverride(id=HOSTED_DEFAULT_MODEL, dimensions=2048)
    settings = Settings(models=(HOSTED_DEFAULT_MODEL,), nvidia_api_key=SecretStr(KEY), cards=(card,))
    assert served(build_service(settings)) == [(HOSTED_DEFAULT_MODEL, "local"), (HOSTED_MODELS[1], HOSTED_URL)]


def test_endpoints_keep_their_order_and_the_hosted_api_comes_last() -> None:
    settings = settings_of(
        EndpointSettings(url=HERE, models=("one", HOSTED_DEFAULT_MODEL)),
        EndpointSettings(url=THERE, models=("one", "two")),
        nvidia_api_key=SecretStr(KEY),
    )
    assert served(build_service(settings))[1:] == [
        ("one", f"{HERE}/v1"),
        (HOSTED_DEFAULT_MODEL, f"{HERE}/v1"),
        ("two", f"{THERE}/v1"),
        (HOSTED_MODELS[1], HOSTED_URL),
    ]


@pytest.mark.anyio
async def test_a_single_model_is_opened_locally_or_at_the_endpoint_that_has_it() -> None:
    """The hosted API is not contacted: its address cannot be reached here."""

    async def origin(settings: Settings, model: str | None, *, at_endpoint: bool = False) -> str:
        async with aclosing(await build_service_for_model(settings, model, at_endpoint=at_endpoint)) as service:
            embedder, _ = await service.catalog.find("default")
            return embedder.origin

    hosted = Settings(nvidia_api_key=SecretStr(KEY))
    with anyio.fail_after(10):
        async with stand_in() as nim:
            both = settings_of(nim.url, nvidia_api_key=SecretStr(KEY))
            at_nim = f"{nim.url}/v1"
            assert await origin(both, SYMMETRIC.id) == at_nim
            assert await origin(both, f"{ASYMMETRIC.id}-query") == at_nim
            assert await origin(both, "nemotron-3-embed") == HOSTED_URL
            assert await origin(both, None) == "local"
            assert await origin(both, "DEFAULT") == "local"
            for local in ("all-MiniLM-L6-v2", "baai/bge-m3", "somebody/something"):
                assert await origin(both, local) == "local"
            assert await origin(hosted, HOSTED_DEFAULT_MODEL) == HOSTED_URL
            with pytest.raises(UnknownModel, match=f"served are: {ASYMMETRIC.id}, {SYMMETRIC.id}"):
                await origin(settings_of(nim.url), "baai/bge-m3", at_endpoint=True)
            with pytest.raises(InvalidRequest, match=f"with --model: the endpoint has {ASYMMETRIC.id}, {SYMMETRIC.id}"):
                await origin(settings_of(nim.url), None, at_endpoint=True)
            nim.models = {SYMMETRIC.id: SYMMETRIC}
            assert await origin(settings_of(nim.url), None, at_endpoint=True) == at_nim
        with pytest.raises(UpstreamUnavailable, match=f"cannot connect to the endpoint {nim.url}"):
            await origin(both, "somebody/something")


@pytest.mark.anyio
async def test_a_folder_is_always_opened_locally(tmp_path: Path) -> None:
    async with stand_in() as nim:
        with pytest.raises(Exception, match="config"):
            await build_service_for_model(settings_of(nim.url), f"{SYMMETRIC.id}={tmp_path}")
        assert not nim.seen


@pytest.mark.anyio
async def test_an_endpoint_to_compare_with_uses_its_key_from_the_settings() -> None:
    async with stand_in() as nim:
        settings = settings_of(EndpointSettings(url=f"{nim.url}/v1", api_key=SecretStr(KEY)))
        embedder = await open_embedder(nim.url, SYMMETRIC.id, settings)
        await embedder.embed(["a text"], input_type=None, truncate="NONE")
        await embedder.aclose()
        assert {seen.headers["authorization"] for seen in nim.seen} == {f"Bearer {KEY}"}

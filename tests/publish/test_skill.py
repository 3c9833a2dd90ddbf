"""The Agent Skill is valid by the official validator, and its content is correct."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from embeddings_mcp import __version__
from embeddings_mcp.assemble import build_service
from embeddings_mcp.errors import EmbeddingsError
from embeddings_mcp.faces.mcp import response_size
from embeddings_mcp.models import ModelCard
from embeddings_mcp.operations import CREATE_EMBEDDING, SEARCH, SIMILARITY, Operation
from embeddings_mcp.publish.skill import read_skill
from embeddings_mcp.schema import EmbeddingRequest
from embeddings_mcp.serialization import parse
from embeddings_mcp.service import EmbeddingService
from embeddings_mcp.settings import Settings
from tests.support import ROOT, START_SECONDS, HashEmbedder, service_of

FOLDER = ROOT / "skills" / "embeddings"
TEXT = (FOLDER / "SKILL.md").read_text("utf-8")
PAIRS = json.loads((ROOT / "tests" / "data" / "pairs.json").read_text("utf-8"))


def test_the_official_validator_accepts_the_skill() -> None:
    completed = subprocess.run(
        [Path(sys.executable).with_name("agentskills"), "validate", str(FOLDER)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr


def test_the_skill_respects_the_limits_of_its_format() -> None:
    skill = read_skill()
    assert set(skill.frontmatter) == {"name", "description", "license", "compatibility", "metadata"}
    assert skill.name == FOLDER.name
    assert len(skill.frontmatter["description"]) <= 1024
    assert skill.frontmatter["metadata"] == {"version": __version__}
    assert len(TEXT.splitlines()) < 500
    assert all(path.count("/") <= 1 for path in skill.files)


def test_every_linked_page_exists_and_every_page_is_linked() -> None:
    linked = {target for target in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in target}
    assert linked == {path for path in read_skill().files if path.startswith("references/")}


def test_every_file_is_served_with_its_digest() -> None:
    skill = read_skill()
    assert next(iter(skill.files)) == "SKILL.md"
    for path, file in skill.files.items():
        content = (FOLDER / path).read_bytes()
        assert file.content == content
        assert file.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
        assert file.media_type in {"text/markdown", "application/yaml"}


def test_the_archive_has_the_files_at_its_root_and_is_reproducible() -> None:
    skill = read_skill()
    with zipfile.ZipFile(io.BytesIO(skill.archive)) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == {
            path: file.content for path, file in skill.files.items()
        }
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}, "not the time of the build"


# --- Content ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service() -> Iterator[EmbeddingService]:
    """A service with the default model, on which the figures were measured."""
    service = build_service(Settings())
    yield service
    anyio.run(service.aclose)


def ask(service: EmbeddingService, operation: Operation, request: dict[str, Any]) -> Any:
    async def answer() -> Any:
        return await operation.call(service, parse(operation.request, request), None)

    return anyio.run(answer)


def test_the_examples_are_what_the_server_returns(service: EmbeddingService) -> None:
    blocks = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", TEXT, flags=re.DOTALL)]
    searched, found, compared, close, embedded = blocks

    assert ask(service, SEARCH, searched) == found
    assert ask(service, SIMILARITY, compared) == close
    vectors = ask(service, CREATE_EMBEDDING, embedded)["data"]
    assert [type(vector["embedding"]) for vector in vectors] == [str, str]


def test_the_thresholds_match_the_measurements(service: EmbeddingService) -> None:
    def vectors(texts: list[str]) -> Any:
        answer = ask(service, CREATE_EMBEDDING, {"model": "default", "input": texts})
        return np.array([vector["embedding"] for vector in answer["data"]])

    def scores(pairs: list[list[str]]) -> Any:
        return vectors([left for left, _ in pairs]) @ vectors([right for _, right in pairs]).T

    first = vectors([left for left, _ in PAIRS["same meaning"]])
    answers = scores(PAIRS["questions"])
    measured = {
        "Same meaning, other words": np.diag(scores(PAIRS["same meaning"])),
        "Same topic, other statement": np.diag(scores(PAIRS["same topic"])),
        "Nothing in common": (first @ first.T)[np.triu_indices(len(first), 1)],
        "A question and the passage that answers it": np.diag(answers),
        "A question and passages on other topics": answers[~np.eye(len(answers), dtype=bool)],
    }
    stated = {
        kind: [float(number) for number in numbers]
        for kind, *numbers in re.findall(
            r"^\| ([A-Z][^|]+) \| (-?[\d.]+) \| (-?[\d.]+) \| (-?[\d.]+) \|$", TEXT, re.MULTILINE
        )
    }
    assert {
        kind: [round(float(f(numbers)), 2) + 0.0 for f in (np.min, np.median, np.max)]
        for kind, numbers in measured.items()
    } == stated
    assert (measured["Same topic, other statement"] < 0.75).all()
    assert (measured["Nothing in common"] < 0.55).all()
    assert (measured["Same meaning, other words"] > 0.5).all()
    assert (measured["A question and the passage that answers it"] > 0.3).all()
    assert (answers.argmax(axis=1) == np.arange(len(answers))).all()


def test_a_statement_and_its_negation_score_as_similar(service: EmbeddingService) -> None:
    texts = [
        "Dogs are allowed in the hall.",
        "Dogs are not allowed in the hall.",
        "Pay before you sign.",
        "Pay after you sign.",
    ]
    scores = ask(service, SIMILARITY, {"model": "default", "input": texts})["scores"]
    assert scores[0][1] > 0.75
    assert scores[2][3] > 0.75


def test_the_commands_that_start_and_query_a_server_can_be_run_as_one_script() -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (commands,) = [block for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL) if "curl" in block]
    with socket.create_server(("127.0.0.1", 0)) as free:
        commands = commands.replace("8000", str(free.getsockname()[1]))
    completed = subprocess.run(
        ["/bin/sh", "-c", f"{commands}code=$?; kill $!; exit $code"],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=START_SECONDS,
    )
    assert completed.returncode == 0, completed.stderr
    assert [hit["index"] for hit in json.loads(completed.stdout)["results"]] == [1, 0]


# --- Errors ----------------------------------------------------------------------------------------------------------

ROWS = re.findall(r"^\| (.+) \|$", TEXT.partition("## When a call is refused")[2], re.MULTILINE)
QUOTED = [row.split(" | ")[0] for row in ROWS[2:]]  # without header and rule

REFUSED: list[tuple[Operation, dict[str, Any]]] = [
    (CREATE_EMBEDDING, {"model": "test/asymmetric", "input": "a"}),
    (CREATE_EMBEDDING, {"model": "default", "input": ["a", "b", "c", "word " * 300]}),
    (CREATE_EMBEDDING, {"model": "gone", "input": "a"}),
    (CREATE_EMBEDDING, {"model": "default", "input": "a", "dimensions": 4}),
    (SIMILARITY, {"model": "default", "input": ["a"] * 101}),
    (SIMILARITY, {"model": "default", "input": ["a", "b"], "mode": "sparse"}),
    (SEARCH, {"query": "a", "input": ["b"], "limit": 3}),
    (CREATE_EMBEDDING, {"model": "default", "input": [101, 102]}),
]


@pytest.mark.parametrize(
    ("quoted", "refused"), [*zip(QUOTED[: len(REFUSED)], REFUSED, strict=True)], ids=QUOTED[: len(REFUSED)]
)
def test_an_error_matches_the_message_quoted_in_the_skill(
    quoted: str, refused: tuple[Operation, dict[str, Any]]
) -> None:
    asymmetric = ModelCard(id="test/asymmetric", dimensions=8, max_tokens=256, input_type="required")
    plain = ModelCard(id="test/hash", dimensions=8, max_tokens=256)
    service = service_of(HashEmbedder(plain), HashEmbedder(asymmetric))

    with pytest.raises(EmbeddingsError) as caught:
        ask(service, *refused)

    assert _quotes(quoted, caught.value.message), caught.value.message


def test_the_error_of_a_response_that_is_too_large_over_mcp_is_quoted_in_the_skill() -> None:
    request = EmbeddingRequest(model="default", input=["a"] * 300)

    with pytest.raises(EmbeddingsError) as caught:
        response_size.check(request, response_size.expected_bytes(request, 384), 1_000_000)

    assert any(_quotes(quoted, caught.value.message) for quoted in QUOTED), caught.value.message


def _quotes(quoted: str, message: str) -> bool:
    pattern = re.sub(r"\d+", r"\\d+", re.escape(quoted)).replace(re.escape("..."), ".*")
    return re.search(pattern, message) is not None

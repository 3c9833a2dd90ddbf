"""Vectors of one model are never taken for those of another: what a local model is told apart by."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embeddings_mcp import assemble
from embeddings_mcp.assemble import build_service
from embeddings_mcp.embedders.local import fingerprint
from embeddings_mcp.embedders.local.encoder import Encoder
from embeddings_mcp.embedders.local.fingerprint import file_digest, number_format
from embeddings_mcp.embedders.local.model_files import ModelFiles
from embeddings_mcp.errors import CheckpointInvalid, ModelUnavailable
from embeddings_mcp.models import Precision
from embeddings_mcp.schema import EmbeddingRequest
from embeddings_mcp.settings import Settings
from embeddings_mcp.vectors import FloatMatrix
from tests.local.golden import GOLDEN
from tests.support import ROOT, out_of_files

pytestmark = pytest.mark.anyio


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small checkpoint of its own for each test."""
    return shutil.copytree(GOLDEN / "e5" / "model", tmp_path / "model")


def files_in(folder: Path, *, precision: Precision = "auto", **options: Any) -> ModelFiles:
    return ModelFiles("mine", known=None, folder=folder, repository=None, device="cpu", precision=precision, **options)


def identity(folder: Path, **options: Any) -> str:
    return files_in(folder, digest=file_digest, **options).identify()[0]


def in_place(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A change of a file that keeps its size and its times, as far as they can be kept."""

    def apply(path: Path) -> None:
        state, content = path.stat(), path.read_bytes()
        path.write_bytes(change(content))
        assert path.stat().st_size == len(content)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))

    return apply


last_byte = in_place(lambda content: content[:-1] + bytes([content[-1] ^ 1]))


# --- Identity --------------------------------------------------------------------------------------------------------


def test_the_same_files_elsewhere_are_the_same_model(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("what a model is said to be is not what it is")
    (copy / "optimizer.pt").write_bytes(b"left by a trainer")
    link = tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)
    assert identity(copy) == identity(folder) == identity(link)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_file_that_differs_in_one_byte_is_another_model(folder: Path, name: str) -> None:
    before = identity(folder)
    # JSON is changed in its last byte, which is a newline or the last bracket: no matter which, it is not read here.
    (last_byte if name.endswith("safetensors") else in_place(lambda content: content.replace(b": ", b":\n", 1)))(
        folder / name
    )
    assert identity(folder) != before


def test_another_way_of_pooling_is_another_model(folder: Path) -> None:
    (folder / "modules.json").write_text(
        '[{"type": "sentence_transformers.models.Transformer", "path": ""},'
        '{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]'
    )
    (folder / "1_Pooling").mkdir()
    found = set()
    for mode in ("mean", "cls"):
        (folder / "1_Pooling" / "config.json").write_text(
            f'{{"pooling_mode": "{mode}", "word_embedding_dimension": 8}}'
        )
        found.add(identity(folder))
    assert len(found) == 2


def test_another_number_format_is_another_model(folder: Path) -> None:
    formats: tuple[Precision, ...] = ("float32", "bfloat16", "int8")
    assert len({identity(folder, precision=precision) for precision in formats}) == len(formats)
    assert identity(folder, precision="auto") == identity(folder, precision="float32")


@pytest.mark.parametrize(
    ("precision", "device", "meant"),
    [
        ("auto", "cpu", "float32"),
        ("auto", "mps", "float32"),
        ("auto", "auto", "bfloat16"),
        ("auto", "cuda", "bfloat16"),
        ("auto", "cuda:1", "bfloat16"),
        ("float32", "cuda", "float32"),
        ("int8", "auto", "int8"),
    ],
)
def test_auto_means_bfloat16_on_a_gpu_that_computes_in_it_and_float32_elsewhere(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, device: str, meant: str
) -> None:
    monkeypatch.setattr(fingerprint, "_cuda_has_bfloat16", lambda: True)
    assert number_format(precision, device) == meant
    monkeypatch.setattr(fingerprint, "_cuda_has_bfloat16", lambda: False)
    assert number_format(precision, device) == ("float32" if precision == "auto" else precision)


def test_where_there_is_no_driver_for_a_gpu_torch_is_not_imported_to_look_for_one(tmp_path: Path) -> None:
    if fingerprint._has_cuda_driver():
        pytest.skip("NVIDIA's driver is installed here")
    about = tmp_path / "torch-2.13.0.dist-info" / "METADATA"  # as where torch comes with CUDA
    about.parent.mkdir()
    about.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n", encoding="utf-8")
    script = "import sys; from embeddings_mcp.embedders.local.fingerprint import number_format as meant"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}; print(meant('auto', 'auto'), 'torch' in sys.modules)"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["float32", "False"]


def test_in_one_process_a_file_that_was_touched_is_another_without_being_read(folder: Path) -> None:
    before = files_in(folder).identify()
    assert files_in(folder).identify() == before
    last_byte(folder / "model.safetensors")
    assert files_in(folder).identify()[0] != before[0]


def test_files_that_change_between_identifying_and_loading_are_refused(folder: Path) -> None:
    for first, second in (("identify", "load"), ("load", "identify")):
        files = files_in(folder)
        getattr(files, first)()
        last_byte(folder / "model.safetensors")
        with pytest.raises(CheckpointInvalid, match="changed after the server had looked at them: start it again"):
            getattr(files, second)()


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "merges.txt").symlink_to("nowhere")
    with pytest.raises(CheckpointInvalid, match=r"merges\.txt cannot be read: No such file"):
        identity(folder)


def test_a_system_that_can_open_no_file_now_makes_a_model_unavailable_until_it_can(folder: Path) -> None:
    files = files_in(folder)
    before = files.identify()
    for method in (files.identify, files.load):
        with out_of_files(), pytest.raises(ModelUnavailable, match="Too many open files"):
            method()
    assert files.identify() == before


# --- From settings to vectors ----------------------------------------------------------------------------------------


async def embedded(folder: Path, cache: Path, text: str = "a cat") -> FloatMatrix:
    """The text's vector, from a server of its own."""
    service = build_service(Settings(models=(f"mine={folder}",), cache=str(cache)))
    answer = await service.create_embedding(EmbeddingRequest(model="mine", input=text))
    await service.aclose()
    vector = answer["data"][0]["embedding"]
    assert isinstance(vector, np.ndarray)
    return vector


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is loaded, and which files are read all through."""
    seen: list[str] = []
    load = ModelFiles.load

    def noted_load(files: ModelFiles) -> Any:
        seen.append("loaded")
        return load(files)

    def noted_digest(path: Path) -> str:
        seen.append(path.name)
        return file_digest(path)

    monkeypatch.setattr(ModelFiles, "load", noted_load)
    monkeypatch.setattr(assemble, "file_digest", noted_digest)
    monkeypatch.setattr(assemble, "_TICK_SECONDS", 0.0)
    return seen


async def test_a_text_that_the_file_knows_needs_no_model_and_no_second_look_into_its_files(
    folder: Path, tmp_path: Path, loads: list[str]
) -> None:
    first = await embedded(folder, tmp_path / "cache")
    assert {"loaded", "model.safetensors"} <= set(loads)
    del loads[:]
    assert (await embedded(folder, tmp_path / "cache")).tobytes() == first.tobytes()
    assert loads == []


async def test_other_weights_in_the_same_place_are_never_given_for_those_before(folder: Path, tmp_path: Path) -> None:
    before = await embedded(folder, tmp_path / "cache")
    in_place(lambda content: content[:-20_000] + bytes(4000) + content[-16_000:])(folder / "model.safetensors")
    after = await embedded(folder, tmp_path / "cache")
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, await embedded(folder, tmp_path / "other cache"))


async def test_a_file_that_was_changed_a_moment_ago_is_read_again(
    folder: Path, tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble, "_TICK_SECONDS", time.time())
    for _ in range(2):
        del loads[:]
        await embedded(folder, tmp_path / "cache")
        assert "model.safetensors" in loads


def test_what_is_remembered_is_answered_without_torch(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from embeddings_mcp.faces.cli.commands import app; app(sys.argv[1:], standalone_mode=False);"
        "print('torch' in sys.modules)"
    )
    arguments = ["embed", "a cat", "--json", "--model", f"mine={folder}", "--device", "cpu", "--cache", str(tmp_path)]
    command = [sys.executable, "-c", code, *arguments]
    runs = [subprocess.check_output(command, text=True, cwd=ROOT, timeout=60).splitlines() for _ in range(2)]
    assert [run[-1] for run in runs] == ["True", "False"]
    assert runs[0][0] == runs[1][0]


@pytest.mark.parametrize(("cache", "batches"), [("memory", 1), ("off", 2)])
async def test_memory_is_asked_first_unless_the_cache_is_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cache: str, batches: int
) -> None:
    forward, seen = Encoder.forward, []

    def noted(encoder: Encoder, *arguments: Any) -> Any:
        seen.append(arguments)
        return forward(encoder, *arguments)

    monkeypatch.setattr(Encoder, "forward", noted)
    service = build_service(Settings(models=(f"mine={folder}",), cache=cache))
    await service.check()  # which has the model try itself
    del seen[:]
    for _ in range(2):
        await service.create_embedding(EmbeddingRequest(model="mine", input="a cat"))
    await service.aclose()
    assert len(seen) == batches
    assert Settings().cache == "memory"

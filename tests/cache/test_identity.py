"""Identity of local models: cached vectors of one model are never returned for another."""

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
from tests.support import ROOT, no_file_descriptors_left

pytestmark = pytest.mark.anyio


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A fresh copy of a small checkpoint."""
    return shutil.copytree(GOLDEN / "e5" / "model", tmp_path / "model")


def files_in(folder: Path, *, precision: Precision = "auto", **options: Any) -> ModelFiles:
    return ModelFiles(
        "mine", builtin_card=None, folder=folder, repository=None, device="cpu", precision=precision, **options
    )


def identity(folder: Path, **options: Any) -> str:
    return files_in(folder, digest=file_digest, **options).identify()[0]


def in_place(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change a file's content but not its size, and restore its access and modification times."""

    def apply(path: Path) -> None:
        state, content = path.stat(), path.read_bytes()
        path.write_bytes(change(content))
        assert path.stat().st_size == len(content)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))

    return apply


last_byte = in_place(lambda content: content[:-1] + bytes([content[-1] ^ 1]))


# --- Identity --------------------------------------------------------------------------------------------------------


def test_the_same_files_in_another_folder_are_the_same_model(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("documentation is not part of the model")
    (copy / "optimizer.pt").write_bytes(b"training state")
    link = tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)
    assert identity(copy) == identity(folder) == identity(link)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_file_that_differs_in_one_byte_is_a_different_model(folder: Path, name: str) -> None:
    before = identity(folder)
    one_newline = in_place(lambda content: content.replace(b": ", b":\n", 1))  # which keeps the JSON valid
    change = last_byte if name.endswith("safetensors") else one_newline
    change(folder / name)
    assert identity(folder) != before


def test_a_different_pooling_mode_is_a_different_model(folder: Path) -> None:
    (folder / "modules.json").write_text(
        '[{"type": "sentence_transformers.models.Transformer", "path": ""},'
        '{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]'
    )
    (folder / "1_Pooling").mkdir()
    identities = set()
    for mode in ("mean", "cls"):
        (folder / "1_Pooling" / "config.json").write_text(
            f'{{"pooling_mode": "{mode}", "word_embedding_dimension": 8}}'
        )
        identities.add(identity(folder))
    assert len(identities) == 2


def test_a_different_precision_is_a_different_model(folder: Path) -> None:
    formats: tuple[Precision, ...] = ("float32", "bfloat16", "int8")
    assert len({identity(folder, precision=precision) for precision in formats}) == len(formats)
    assert identity(folder, precision="auto") == identity(folder, precision="float32")


@pytest.mark.parametrize(
    ("precision", "device", "resolved"),
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
def test_auto_is_bfloat16_on_a_gpu_that_supports_it_and_float32_elsewhere(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, device: str, resolved: str
) -> None:
    monkeypatch.setattr(fingerprint, "_cuda_has_bfloat16", lambda: True)
    assert number_format(precision, device) == resolved
    monkeypatch.setattr(fingerprint, "_cuda_has_bfloat16", lambda: False)
    assert number_format(precision, device) == ("float32" if precision == "auto" else precision)


def test_without_a_gpu_driver_torch_is_not_imported_to_look_for_a_gpu(tmp_path: Path) -> None:
    if fingerprint._has_cuda_driver():
        pytest.skip("NVIDIA's driver is installed here")
    metadata = tmp_path / "torch-2.13.0.dist-info" / "METADATA"  # as for a build of torch with CUDA
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n", encoding="utf-8")
    script = "import sys; from embeddings_mcp.embedders.local.fingerprint import number_format"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}; print(number_format('auto', 'auto'), 'torch' in sys.modules)"],
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


def test_without_digests_a_touched_file_is_a_different_model(folder: Path) -> None:
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


def test_an_unreadable_file_is_named_in_the_error(folder: Path) -> None:
    (folder / "merges.txt").symlink_to("nowhere")
    with pytest.raises(CheckpointInvalid, match=r"merges\.txt cannot be read: No such file"):
        identity(folder)


def test_running_out_of_file_descriptors_makes_a_model_temporarily_unavailable(folder: Path) -> None:
    files = files_in(folder)
    before = files.identify()
    for method in (files.identify, files.load):
        with no_file_descriptors_left(), pytest.raises(ModelUnavailable, match="Too many open files"):
            method()
    assert files.identify() == before


# --- From settings to vectors ----------------------------------------------------------------------------------------


async def embedded(folder: Path, cache: Path, text: str = "a cat") -> FloatMatrix:
    """Embed the text with a new service."""
    service = build_service(Settings(models=(f"mine={folder}",), cache=str(cache)))
    answer = await service.create_embedding(EmbeddingRequest(model="mine", input=text))
    await service.aclose()
    vector = answer["data"][0]["embedding"]
    assert isinstance(vector, np.ndarray)
    return vector


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records model loads, and the names of files whose digest is computed."""
    seen: list[str] = []
    load = ModelFiles.load

    def recording_load(files: ModelFiles) -> Any:
        seen.append("loaded")
        return load(files)

    def recording_digest(path: Path) -> str:
        seen.append(path.name)
        return file_digest(path)

    monkeypatch.setattr(ModelFiles, "load", recording_load)
    monkeypatch.setattr(assemble, "file_digest", recording_digest)
    monkeypatch.setattr(assemble, "_TIMESTAMP_RESOLUTION_SECONDS", 0.0)
    return seen


async def test_a_text_in_the_file_requires_neither_loading_the_model_nor_digesting_its_files(
    folder: Path, tmp_path: Path, loads: list[str]
) -> None:
    first = await embedded(folder, tmp_path / "cache")
    assert {"loaded", "model.safetensors"} <= set(loads)
    del loads[:]
    assert (await embedded(folder, tmp_path / "cache")).tobytes() == first.tobytes()
    assert loads == []


async def test_replaced_weights_never_get_the_vectors_of_the_previous_ones(folder: Path, tmp_path: Path) -> None:
    before = await embedded(folder, tmp_path / "cache")
    in_place(lambda content: content[:-20_000] + bytes(4000) + content[-16_000:])(folder / "model.safetensors")
    after = await embedded(folder, tmp_path / "cache")
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, await embedded(folder, tmp_path / "other cache"))


async def test_a_recently_changed_file_is_digested_again(
    folder: Path, tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble, "_TIMESTAMP_RESOLUTION_SECONDS", time.time())
    for _ in range(2):
        del loads[:]
        await embedded(folder, tmp_path / "cache")
        assert "model.safetensors" in loads


def test_cached_texts_are_answered_without_torch(folder: Path, tmp_path: Path) -> None:
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
async def test_texts_are_cached_in_memory_unless_the_cache_is_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cache: str, batches: int
) -> None:
    forward, seen = Encoder.forward, []

    def recording_forward(encoder: Encoder, *arguments: Any) -> Any:
        seen.append(arguments)
        return forward(encoder, *arguments)

    monkeypatch.setattr(Encoder, "forward", recording_forward)
    service = build_service(Settings(models=(f"mine={folder}",), cache=cache))
    await service.check()  # which embeds a text
    del seen[:]
    for _ in range(2):
        await service.create_embedding(EmbeddingRequest(model="mine", input="a cat"))
    await service.aclose()
    assert len(seen) == batches
    assert Settings().cache == "memory"

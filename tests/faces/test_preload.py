"""When the default model is loaded: before the server starts, in the background, or on first use."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest

from embeddings_mcp.errors import CheckpointInvalid, ModelUnavailable
from embeddings_mcp.faces.preload import preloaded
from embeddings_mcp.settings import Load
from tests.local.golden import GOLDEN
from tests.support import (
    LIST_TOOLS,
    ROOT,
    START_SECONDS,
    HashEmbedder,
    ask,
    killed_late,
    server_process,
    service_of,
    stdio_process,
)

SERVE = [sys.executable, "-m", "embeddings_mcp", "serve"]


@dataclass
class Loadable(HashEmbedder):
    """An embedder that records when loading begins, and may fail to load."""

    failure: ModelUnavailable | None = None
    loading: anyio.Event = field(default_factory=anyio.Event)

    async def check(self) -> None:
        self.loading.set()
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def damaged(tmp_path: Path) -> str:
    """A model whose damage is noticed only when its weights are loaded."""
    folder = shutil.copytree(GOLDEN / "e5" / "model", tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return f"mine={folder}"


@pytest.mark.anyio
async def test_eager_loads_and_fails_before_the_block_is_entered() -> None:
    embedder = Loadable()
    async with preloaded(service_of(embedder), "eager"):
        assert embedder.loading.is_set()
    with pytest.raises(CheckpointInvalid):
        async with preloaded(service_of(Loadable(failure=CheckpointInvalid("damaged"))), "eager"):
            pytest.fail("the block was entered")


@pytest.mark.anyio
async def test_background_loads_during_the_block_after_what_it_waits_for(caplog: pytest.LogCaptureFixture) -> None:
    embedder, may_load = Loadable(failure=CheckpointInvalid("damaged")), anyio.Event()
    with anyio.fail_after(10):
        async with preloaded(service_of(embedder), "background", after=may_load.wait):
            await anyio.wait_all_tasks_blocked()
            assert not embedder.loading.is_set()
            may_load.set()
            await embedder.loading.wait()
            await anyio.wait_all_tasks_blocked()
    assert "The default model is not loaded: damaged" in caplog.text


@pytest.mark.anyio
@pytest.mark.parametrize(("load", "origin"), [("lazy", "local"), ("eager", "https://a"), ("background", "https://a")])
async def test_neither_a_lazy_model_nor_an_endpoint_is_loaded(load: Load, origin: str) -> None:
    embedder = Loadable(origin=origin)
    async with preloaded(service_of(embedder), load):
        await anyio.wait_all_tasks_blocked()
    assert not embedder.loading.is_set()


@pytest.mark.parametrize("flags", [["--transport", "stdio"], ["--transport", "http", "--port", "0"]])
def test_an_eager_server_does_not_start_with_a_model_that_cannot_be_loaded(flags: list[str], damaged: str) -> None:
    command = [*SERVE, "--load", "eager", "--model", damaged, *flags]
    result = subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=START_SECONDS, check=False
    )
    assert result.returncode == 1
    assert "model.safetensors" in result.stderr
    assert "Traceback" not in result.stderr
    assert "serving" not in result.stderr


def test_a_server_over_http_loads_in_the_background(damaged: str) -> None:
    with server_process(*SERVE, "--model", damaged, "--transport", "http", "--port", "0") as (process, _):
        assert "model.safetensors" in _line_with("The default model is not loaded", process)


def test_a_server_over_stdio_loads_once_the_host_has_its_list_of_tools(damaged: str) -> None:
    with stdio_process(*SERVE, "--model", damaged, stderr=subprocess.PIPE) as process:
        assert '"tools"' in ask(process, LIST_TOOLS)
        assert "model.safetensors" in _line_with("The default model is not loaded", process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(START_SECONDS) == 0


def _line_with(words: str, process: subprocess.Popen[str]) -> str:
    """The next line on stderr that contains these words; the process is killed if there is none in time."""
    assert process.stderr is not None
    with killed_late(process):
        return next((line for line in process.stderr if words in line), "")

"""When the default model is loaded: before the first answer, beside it, or when it is first needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest

from embeddings_mcp.errors import CheckpointInvalid, ModelUnavailable
from embeddings_mcp.faces.preload import preloaded
from embeddings_mcp.settings import Load
from tests.local.golden import GOLDEN
from tests.support import LIST_TOOLS, ROOT, START_SECONDS, HashEmbedder, ask, over_stdio, running, service_of

SERVE = [sys.executable, "-m", "embeddings_mcp", "serve"]


@dataclass
class Loadable(HashEmbedder):
    """Has to be loaded, which may fail."""

    failure: ModelUnavailable | None = None
    asked: anyio.Event = field(default_factory=anyio.Event)

    async def check(self) -> None:
        self.asked.set()
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def damaged(tmp_path: Path) -> str:
    """A model whose files look well until they are loaded."""
    folder = shutil.copytree(GOLDEN / "e5" / "model", tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return f"mine={folder}"


@pytest.mark.anyio
async def test_eager_loads_before_anything_else_and_fails_before_it_too() -> None:
    embedder = Loadable()
    async with preloaded(service_of(embedder), "eager"):
        assert embedder.asked.is_set()
    with pytest.raises(CheckpointInvalid):
        async with preloaded(service_of(Loadable(failure=CheckpointInvalid("damaged"))), "eager"):
            pytest.fail("the block was begun")


@pytest.mark.anyio
async def test_background_loads_beside_the_block_once_it_may(caplog: pytest.LogCaptureFixture) -> None:
    embedder, may = Loadable(failure=CheckpointInvalid("damaged")), anyio.Event()
    with anyio.fail_after(10):
        async with preloaded(service_of(embedder), "background", after=may.wait):
            await anyio.wait_all_tasks_blocked()
            assert not embedder.asked.is_set()
            may.set()
            await embedder.asked.wait()
            await anyio.wait_all_tasks_blocked()
    assert "The default model is not loaded: damaged" in caplog.text


@pytest.mark.anyio
@pytest.mark.parametrize(("load", "origin"), [("lazy", "local"), ("eager", "https://a"), ("background", "https://a")])
async def test_nothing_is_asked_of_a_lazy_model_or_of_an_endpoint(load: Load, origin: str) -> None:
    embedder = Loadable(origin=origin)
    async with preloaded(service_of(embedder), load):
        await anyio.wait_all_tasks_blocked()
    assert not embedder.asked.is_set()


@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_an_eager_server_does_not_start_with_a_model_that_cannot_be_loaded(transport: str, damaged: str) -> None:
    command = [*SERVE, "--load", "eager", "--model", damaged, "--transport", transport, "--port", "0"]
    ended = subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=START_SECONDS, check=False
    )
    assert ended.returncode == 1
    assert "model.safetensors" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "serving" not in ended.stderr


def test_a_server_over_http_loads_beside_its_first_answers(damaged: str) -> None:
    with running(*SERVE, "--model", damaged, "--transport", "http", "--port", "0") as (process, _):
        assert "model.safetensors" in _line_with("The default model is not loaded", process)


def test_a_server_over_stdio_loads_once_the_host_has_its_list_of_tools(damaged: str) -> None:
    with over_stdio(*SERVE, "--model", damaged, stderr=subprocess.PIPE) as process:
        assert '"tools"' in ask(process, LIST_TOOLS)
        assert "model.safetensors" in _line_with("The default model is not loaded", process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(START_SECONDS) == 0


def _line_with(words: str, process: subprocess.Popen[str]) -> str:
    """The next line on stderr that holds these words; the process is ended where none comes."""
    assert process.stderr is not None
    watchdog = threading.Timer(START_SECONDS, process.kill)
    watchdog.start()
    line = next((line for line in process.stderr if words in line), "")
    watchdog.cancel()
    return line

"""A model in a subprocess makes the same vectors, and the server survives its crash."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np
import pytest
from benchmarks.process import process_tree

from embeddings_mcp.assemble import build_service
from embeddings_mcp.embedders.local.runtime import model_process
from embeddings_mcp.embedders.local.runtime.model_process import ModelProcess
from embeddings_mcp.embedders.local_embedder import LocalEmbedder
from embeddings_mcp.errors import CheckpointInvalid, EmbeddingsError, ModelUnavailable
from embeddings_mcp.settings import Settings
from tests.local.golden import MODELS, FamilyName, family
from tests.support import COMMAND, no_file_descriptors_left, server_process

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.name != "posix", reason="models run in subprocesses on POSIX systems only"),
]

SECONDS = 60
TEXTS = ["water under the bridge", "a committee", "the opinion of a committee on bridges " * 3]


@asynccontextmanager
async def local_embedder(name: FamilyName, **settings: Any) -> AsyncIterator[LocalEmbedder]:
    """A family's model, built as the server builds it."""
    spec = f"{MODELS[name]}={family(name).folder}"
    embedder: Any = build_service(
        Settings(models=(spec,), cache="off", precision="float32", **settings)
    ).catalog.default
    try:
        with anyio.fail_after(SECONDS):
            yield embedder
    finally:
        await embedder.aclose()


def model_of(embedder: LocalEmbedder) -> ModelProcess:
    assert embedder._loaded._future is not None
    model = embedder._loaded._future.result()
    assert isinstance(model, ModelProcess)
    return model


def process_of(embedder: LocalEmbedder) -> subprocess.Popen[bytes]:
    return model_of(embedder)._process


def open_files() -> int:
    """Number of open file descriptors of this process."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def limit_that_leaves(count: int) -> int:
    """The limit of file descriptors under which `count` are free."""
    used = {int(file.name) for file in Path("/proc/self/fd").iterdir()}
    return next(itertools.islice((number for number in itertools.count() if number not in used), count, None))


def environment_of(process: int) -> set[str]:
    """Names of the environment variables that a process was started with."""
    environment = Path(f"/proc/{process}/environ").read_bytes()
    return {variable.partition(b"=")[0].decode() for variable in environment.split(b"\0")}


def wait_until_gone(process: int) -> None:
    """Wait until a process that is not a child of this one has exited."""
    deadline = time.monotonic() + SECONDS
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while " Z " not in Path(f"/proc/{process}/stat").read_text():
            assert time.monotonic() < deadline, f"process {process} is still running"
            time.sleep(0.01)  # there is no event to wait on: only its parent is notified, and that is dead


@pytest.mark.parametrize("name", ["e5", "llama-nemotron-embed"])
async def test_the_vectors_are_those_that_this_process_makes(name: FamilyName) -> None:
    async with local_embedder(name, model_process=True) as remote, local_embedder(name) as local:
        embedded, expected = [
            await embedder.embed(TEXTS, input_type="query", truncate="END") for embedder in (remote, local)
        ]
    assert np.array_equal(embedded.vectors, expected.vectors)
    assert embedded.tokens == expected.tokens
    assert remote.card == local.card


async def test_dense_sparse_and_token_vectors_are_those_that_this_process_makes() -> None:
    async with local_embedder("bge-m3", model_process=True) as remote, local_embedder("bge-m3") as local:
        represented, expected = [
            await embedder.represent(TEXTS, input_type=None, truncate="END") for embedder in (remote, local)
        ]
    assert np.array_equal(represented.vectors, expected.vectors)
    for sparse, expected_sparse in zip(represented.sparse, expected.sparse, strict=True):
        assert np.array_equal(sparse.ids, expected_sparse.ids)
        assert np.array_equal(sparse.weights, expected_sparse.weights)
    assert all(np.array_equal(*pair) for pair in zip(represented.colbert, expected.colbert, strict=True))


async def test_concurrent_callers_get_the_vectors_of_their_own_texts() -> None:
    async with local_embedder("e5", model_process=True, workers=3) as remote, local_embedder("e5") as local:
        expected = (await local.embed(TEXTS, input_type="query", truncate="END")).vectors
        errors: list[float] = []

        async def ask(first: int) -> None:
            order = [(first + place) % len(TEXTS) for place in range(len(TEXTS))]
            embedded = await remote.embed([TEXTS[index] for index in order], input_type="query", truncate="END")
            errors.append(float(np.abs(embedded.vectors - expected[order]).max()))

        async with anyio.create_task_group() as callers:
            for first in range(30):
                callers.start_soon(ask, first)
    assert len(errors) == 30
    assert max(errors) < 1e-6


async def test_when_it_is_killed_requests_in_flight_fail_and_the_next_one_restarts_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with local_embedder("e5", model_process=True, workers=1) as embedder:
        before = await embedder.embed(TEXTS, input_type="query", truncate="END")
        process = process_of(embedder)
        os.kill(process.pid, signal.SIGSTOP)  # so that no request is answered before it is killed
        messages: list[str] = []

        async def ask() -> None:
            with pytest.raises(ModelUnavailable) as refused:
                await embedder.embed(TEXTS, input_type="query", truncate="END")
            messages.append(refused.value.message)

        async with anyio.create_task_group() as callers:
            for _ in range(3):
                callers.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
            os.kill(process.pid, signal.SIGKILL)
        after = await embedder.embed(TEXTS, input_type="query", truncate="END")

        process_name = f"the process that runs {MODELS['e5']}"
        assert len(messages) == 3
        assert set(messages) == {
            f"{process_name} was ended by SIGKILL during this request; the next request starts it again"
        }
        assert process_of(embedder).pid != process.pid
        assert np.array_equal(before.vectors, after.vectors)
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [
        f"The process that runs {MODELS['e5']} was ended by SIGKILL."
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="open files are read from /proc")
async def test_however_often_it_is_killed_no_thread_file_or_object_leaks() -> None:
    async with local_embedder("e5", model_process=True, workers=2) as embedder:
        seen: list[tuple[int, int]] = []
        models: list[weakref.ref[ModelProcess]] = []
        for _ in range(4):
            await embedder.embed(TEXTS, input_type="query", truncate="END")
            gc.disable()  # until the next model is loaded: objects frozen while they are garbage are never collected
            seen.append((threading.active_count(), open_files()))
            process = process_of(embedder)
            models.append(weakref.ref(model_of(embedder)))
            os.kill(process.pid, signal.SIGSTOP)  # so that no request is answered before it is killed

            refused: list[str] = []

            async def ask(refused: list[str] = refused) -> None:
                try:  # pytest.raises would keep the error, and all that its traceback refers to
                    await embedder.embed(TEXTS, input_type="query", truncate="END")
                except ModelUnavailable as error:
                    refused.append(str(error))

            async with anyio.create_task_group() as callers:
                for _ in range(3):
                    callers.start_soon(ask)
                await anyio.wait_all_tasks_blocked()
                os.kill(process.pid, signal.SIGKILL)
            assert len(refused) == 3
            await anyio.to_thread.run_sync(process.wait)
        await embedder.embed(TEXTS, input_type="query", truncate="END")
    assert max(seen[1:]) <= seen[1]
    assert models[0]() is None
    assert models[1]() is None


@pytest.mark.skipif(sys.platform != "linux", reason="open files are read from /proc")
async def test_a_process_that_is_killed_while_it_loads_leaves_no_file_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the OOM killer does at every request when the model does not fit into memory."""
    start = model_process._start_process

    def start_and_kill(parameters: model_process.StartParameters) -> subprocess.Popen[bytes]:
        process = start(parameters)
        process.kill()
        return process

    monkeypatch.setattr(model_process, "_start_process", start_and_kill)
    async with local_embedder("e5", model_process=True, workers=8) as embedder:

        async def ask() -> None:
            with contextlib.suppress(ModelUnavailable):
                await embedder.embed(TEXTS, input_type="query", truncate="END")

        seen: list[int] = []
        for _ in range(4):
            async with anyio.create_task_group() as callers:
                for _ in range(3):
                    callers.start_soon(ask)
            seen.append(open_files())
    assert max(seen) <= seen[0]


@pytest.mark.skipif(sys.platform != "linux", reason="open files are read from /proc")
async def test_a_process_that_cannot_be_started_for_lack_of_file_descriptors_leaves_no_file_open() -> None:
    async with local_embedder("e5", model_process=True, workers=8) as embedder:
        seen, refused = [open_files()], list[str]()
        for _ in range(2):
            # Enough for the eight connections and that of the log, but not for the process.
            with no_file_descriptors_left(limit_that_leaves(2 * 9 + 2)):
                try:  # pytest.raises would keep the error, and all that its traceback refers to
                    await embedder.embed(TEXTS, input_type="query", truncate="END")
                except ModelUnavailable as error:
                    refused.append(error.message)
            seen.append(open_files())
    assert ["Too many open files" in message for message in refused] == [True, True]
    assert max(seen) <= seen[0]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("load_parameters.LoadParameters.load = fail", "ended with exit code 1 during this request"),
        ("process_main._start_workers = fail", "ended with exit code 1 during this request"),
        ("in_process.InProcessModel.forward = fail", "ended with exit code 1 during this request"),
        ("in_process.InProcessModel.forward = lambda *_: threading.Lock()", "cannot pickle '_thread.lock' object"),
    ],
    ids=["loading", "starting", "computing", "answering"],
)
async def test_whatever_fails_in_the_process_no_request_waits_forever(
    fault: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = (
        "import threading\n"
        "from embeddings_mcp.embedders.local.runtime import in_process, load_parameters, process_main\n"
        "def fail(*_): raise SystemExit('a fault')\n"
        f"{fault}\n"
        "process_main.main()\n"
    )
    monkeypatch.setattr(model_process, "_PROGRAM", faulty)
    async with local_embedder("e5", model_process=True) as embedder:
        for _ in range(2):
            with pytest.raises((ModelUnavailable, RuntimeError), match=message):
                await embedder.embed(TEXTS, input_type="query", truncate="END")


async def test_a_third_party_s_faulty_logging_call_does_not_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = (
        "import logging\n"
        "from embeddings_mcp.embedders.local.runtime import load_parameters, process_main\n"
        "load = load_parameters.LoadParameters.load\n"
        "def loud(self):\n"
        "    logging.getLogger('transformers').warning('%d files', 'three')\n"
        "    return load(self)\n"
        "load_parameters.LoadParameters.load = loud\n"
        "process_main.main()\n"
    )
    monkeypatch.setattr(model_process, "_PROGRAM", faulty)
    async with local_embedder("e5", model_process=True) as embedder:
        await embedder.embed(TEXTS, input_type="query", truncate="END")


async def test_signals_that_stop_the_server_do_not_stop_the_process_before_it_has_answered() -> None:
    async with local_embedder("e5", model_process=True) as embedder:
        await embedder.check()
        process = process_of(embedder)
        for stop in (signal.SIGINT, signal.SIGTERM):
            os.kill(process.pid, stop)
        await embedder.embed(TEXTS, input_type="query", truncate="END")
        assert process.poll() is None
    assert process.poll() == -signal.SIGKILL


async def test_a_checkpoint_error_has_the_same_message_as_in_this_process(tmp_path: Path) -> None:
    folder = family("e5").folder
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            (tmp_path / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.relative_to(folder)).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    raised: list[EmbeddingsError] = []
    for in_subprocess in (True, False):
        settings = Settings(models=(f"mine={tmp_path}",), model_process=in_subprocess, cache="off")
        embedder: Any = build_service(settings).catalog.default
        with pytest.raises(CheckpointInvalid) as refused, anyio.fail_after(SECONDS):
            await embedder.check()
        raised.append(refused.value)
    assert raised[0].message == raised[1].message


async def test_its_log_records_are_logged_by_the_server(caplog: pytest.LogCaptureFixture) -> None:
    async with local_embedder("nv-embed-v2", model_process=True) as embedder:
        await embedder.check()
        await embedder.embed(TEXTS, input_type="passage", truncate="END")
    assert "nvidia/nv-embed-v2 may not be used commercially: its license is CC-BY-NC-4.0" in caplog.messages


@pytest.mark.skipif(sys.platform != "linux", reason="a process's environment is read from /proc")
async def test_its_environment_holds_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["EMBEDDINGS_MCP_OAUTH_ISSUER", "NVIDIA_API_KEY", "HF_TOKEN", "MY_SECRET", "DB_PASSWORD", "secret_keys"]
    for name in [*names, "TOKENIZERS_PARALLELISM", "KEYBOARD"]:
        monkeypatch.setenv(name, "true")
    async with local_embedder("e5", model_process=True) as embedder:
        await embedder.check()
        inherited = environment_of(process_of(embedder).pid)
    assert not inherited & set(names)
    assert inherited >= {"TOKENIZERS_PARALLELISM", "KEYBOARD", "PATH"}


@pytest.mark.skipif(sys.platform != "linux", reason="the libraries of a process are read from /proc")
def test_the_server_s_process_loads_no_torch_and_the_model_s_process_ends_with_it() -> None:
    model = f"mine={family('e5').folder}"
    body = {"input": "water", "model": "mine", "input_type": "query"}
    with server_process(COMMAND, "serve", "--transport", "http", "--port", "0", "--model", model) as (server, url):
        httpx.post(f"{url}/v1/embeddings", json=body, timeout=SECONDS).raise_for_status()
        _, child = process_tree(server.pid)
        assert "libtorch" not in Path(f"/proc/{server.pid}/maps").read_text()
        assert "libtorch" in Path(f"/proc/{child}/maps").read_text()
        server.kill()
        wait_until_gone(child)


def test_on_windows_it_cannot_be_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "name", "nt")
    with pytest.raises(ValueError, match="is not possible on Windows: leave it out"):
        Settings(model_process=True)
    assert Settings(model_process=False).model_process is False

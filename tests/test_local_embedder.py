"""The embedder of a local model: loaded once, never on the event loop, fair to requests, cancelled between batches.

A fake encoder lets the tests decide when loading and each batch end.
"""

from __future__ import annotations

import asyncio
import functools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import anyio
import anyio.lowlevel
import anyio.to_thread
import numpy as np
import pytest

from embeddings_mcp.embedders.local.inputs import TokenizedBatch
from embeddings_mcp.embedders.local.runtime.loaded_model import ModelInfo
from embeddings_mcp.embedders.local_embedder import LocalEmbedder
from embeddings_mcp.errors import CheckpointInvalid, InputTooLong, Overloaded, ServerStopped
from embeddings_mcp.models import InputType, ModelCard, Truncate
from tests.support import SECONDS, wait_until

pytestmark = pytest.mark.anyio

ROUGH = ModelCard(id="test/rough")
EXACT = ModelCard(id="test/rough", dimensions=1, max_tokens=8)

SIX = ModelInfo(card=EXACT, dimensions=1, vocabulary_size=1, packed=True, tokens_per_batch=6, min_tokens_per_batch=1)


@dataclass
class SteppedEncoder:
    """Six tokens a batch; each batch waits until the test lets it end. The vector of a text is its length: one token
    for each character, plus `special` tokens.

    Texts are tokenized a hundred at a time: the first hundred of a request at once, the others when the test allows it.
    """

    info: ModelInfo = SIX
    special: int = 0
    alive: bool = True
    closed: int = 0
    begun: queue.SimpleQueue[list[int]] = field(default_factory=queue.SimpleQueue)
    steps: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    may_tokenize: threading.Event = field(default_factory=threading.Event)

    def tokenize(
        self, texts: Sequence[str], *, input_type: InputType | None, truncate: Truncate
    ) -> Iterator[TokenizedBatch]:
        lengths = [len(text) + self.special for text in texts]
        for start in range(0, len(texts), 100):
            assert not start or self.may_tokenize.wait(SECONDS), "the test did not let the tokenizing go on"
            batch = lengths[start : start + 100]
            if truncate == "NONE" and max(batch) > 8:
                raise InputTooLong(index=start + int(np.argmax(batch)), tokens=max(batch), max_tokens=8)
            yield TokenizedBatch([[0] * length for length in batch], skip=0)

    def workers(self, cores: int) -> int:
        return 1

    def set_thread_cores(self, cores: int) -> None:
        """Nothing to do: it needs no cores."""

    def close(self) -> None:
        self.closed += 1

    def forward(self, rows: Sequence[Sequence[int]], skip: int) -> Any:
        lengths = [len(row) for row in rows]
        self.begun.put(lengths)
        assert self.steps.acquire(timeout=SECONDS), "the test did not let the batch end"
        return np.array(lengths, np.float32)[:, None]

    async def next_batch(self) -> list[int]:
        """Return the lengths of the texts in the next batch that starts."""
        return await anyio.to_thread.run_sync(lambda: self.begun.get(timeout=SECONDS))


@dataclass
class Loader:
    """Loads `encoder` once the test allows it, and counts the calls."""

    encoder: SteppedEncoder = field(default_factory=SteppedEncoder)
    calls: int = 0
    may_end: threading.Event = field(default_factory=threading.Event)
    failure: Exception | None = None
    threads: list[threading.Thread] = field(default_factory=list)

    def __call__(self) -> Any:
        self.calls += 1
        self.threads.append(threading.current_thread())
        assert self.may_end.wait(SECONDS), "the test did not let the loading end"
        if self.failure is not None:
            raise self.failure
        return self.encoder


def embedder_of(loader: Loader, *, loaded: bool = True, workers: int | None = None) -> LocalEmbedder:
    if loaded:
        loader.may_end.set()
    return LocalEmbedder(ROUGH, cast("Callable[[], Any]", loader), lambda: ("rough", EXACT), workers=workers)


async def embed(embedder: LocalEmbedder, texts: list[str], **options: Any) -> list[float]:
    with anyio.fail_after(SECONDS):
        embeddings = await embedder.embed(texts, input_type=None, truncate="NONE", **options)
    assert embeddings.prompt_tokens == sum(map(len, texts))
    return [float(number) for number in embeddings.vectors[:, 0]]


def queued_tokens(embedder: LocalEmbedder) -> int:
    """Return the number of queued tokens."""
    assert embedder._batcher is not None
    return embedder._batcher.queued_tokens


# --- Loading ---------------------------------------------------------------------------------------------------------


async def test_the_model_is_loaded_once_for_concurrent_first_requests() -> None:
    loader = Loader()
    loader.encoder.steps.release(100)
    embedder = embedder_of(loader, loaded=False)
    answers: dict[int, list[float]] = {}

    async def ask(caller: int) -> None:
        answers[caller] = await embed(embedder, ["x" * caller])

    async with anyio.create_task_group() as callers:
        for caller in range(1, 6):
            callers.start_soon(ask, caller)
        await wait_until(lambda: loader.calls)
        loader.may_end.set()
    assert answers == {caller: [caller] for caller in range(1, 6)}
    assert await embed(embedder, ["x"]) == [1]
    assert loader.calls == 1


async def test_a_model_that_is_not_used_is_not_loaded() -> None:
    loader = Loader()
    await embedder_of(loader).aclose()
    assert loader.calls == 0


async def test_the_card_becomes_exact_once_the_model_is_loaded() -> None:
    embedder = embedder_of(Loader())
    assert embedder.card == ROUGH
    await embedder.check()
    assert embedder.card == EXACT


async def test_the_event_loop_is_not_blocked_while_the_model_is_loaded_or_computes() -> None:
    loader = Loader()
    embedder = embedder_of(loader, loaded=False)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(embed, embedder, ["a"])
        # Neither can have ended, since only this task, which runs on the event loop, allows it.
        await wait_until(lambda: loader.calls)
        loader.may_end.set()
        assert await loader.encoder.next_batch() == [1]
        loader.encoder.steps.release()
    assert [thread.name for thread in loader.threads] == ["load test/rough"]


async def test_cancelling_one_request_while_the_model_is_loaded_does_not_affect_the_others() -> None:
    loader = Loader()
    loader.encoder.steps.release(100)
    embedder = embedder_of(loader, loaded=False)
    answers: list[list[float]] = []

    async def ask() -> None:
        answers.append(await embed(embedder, ["abc"]))

    async with anyio.create_task_group() as staying:
        async with anyio.create_task_group() as leaving:
            leaving.start_soon(embed, embedder, ["a"])
            await wait_until(lambda: loader.calls)
            staying.start_soon(ask)
            leaving.cancel_scope.cancel()
        assert not answers
        loader.may_end.set()
    assert answers == [[3]]
    assert loader.calls == 1


async def test_loading_continues_when_all_waiting_requests_are_cancelled() -> None:
    loader = Loader()
    loader.encoder.steps.release(100)
    embedder = embedder_of(loader, loaded=False)
    async with anyio.create_task_group() as leaving:
        leaving.start_soon(embed, embedder, ["a"])
        await wait_until(lambda: loader.calls)
        leaving.cancel_scope.cancel()
    loader.may_end.set()
    assert await embed(embedder, ["abc"]) == [3]
    assert loader.calls == 1


async def test_a_failed_load_fails_all_waiting_requests_and_is_tried_again_for_the_next() -> None:
    loader = Loader(failure=CheckpointInvalid("config.json is missing"))
    loader.encoder.steps.release(100)
    embedder = embedder_of(loader, loaded=False)
    messages: list[str] = []

    async def ask() -> None:
        with pytest.raises(CheckpointInvalid) as caught:
            await embed(embedder, ["a"])
        messages.append(caught.value.message)

    async with anyio.create_task_group() as callers:
        for _ in range(3):
            callers.start_soon(ask)
        await wait_until(lambda: loader.calls)
        loader.may_end.set()
    assert messages == ["config.json is missing"] * 3
    assert loader.calls == 1

    loader.failure = None
    assert await embed(embedder, ["abc"]) == [3]
    assert loader.calls == 2


async def test_a_failed_load_that_no_request_waited_for_does_not_fail_the_next() -> None:
    loader = Loader(failure=CheckpointInvalid("config.json is missing"))
    loader.encoder.steps.release(100)
    embedder = embedder_of(loader, loaded=False)
    async with anyio.create_task_group() as leaving:
        leaving.start_soon(embed, embedder, ["a"])
        await wait_until(lambda: loader.calls)
        leaving.cancel_scope.cancel()
    loader.may_end.set()
    await wait_until(lambda: embedder._loaded._future is None)
    loader.failure = None
    assert await embed(embedder, ["abc"]) == [3]


async def test_a_model_that_has_died_is_loaded_again_for_the_next_request() -> None:
    loader = Loader()
    first = loader.encoder
    first.steps.release(100)
    embedder = embedder_of(loader)
    assert await embed(embedder, ["abc"]) == [3]

    first.alive = False
    loader.encoder = SteppedEncoder(steps=threading.Semaphore(100))
    answers: list[list[float]] = []

    async def ask(text: str) -> None:
        answers.append(await embed(embedder, [text]))

    async with anyio.create_task_group() as callers:
        for text in ("a", "ab", "abc"):
            callers.start_soon(ask, text)
    assert sorted(answers) == [[1], [2], [3]]
    assert (loader.calls, first.closed, loader.encoder.closed) == (2, 1, 0)


# --- Batches ---------------------------------------------------------------------------------------------------------


async def test_vectors_come_back_in_the_order_of_the_texts_with_progress_after_each_batch() -> None:
    loader = Loader()
    loader.encoder.steps.release()
    done: list[int] = []

    async def on_progress(count: int) -> None:
        done.append(count)
        loader.encoder.steps.release()

    texts = ["abc", "a", "abcde", "ab", "abcd"]
    assert await embed(embedder_of(loader), texts, on_progress=on_progress) == [3, 1, 5, 2, 4]
    assert done == [1, 2, 5]


async def test_a_text_that_is_too_long_is_refused_before_anything_is_computed() -> None:
    loader = Loader()
    with pytest.raises(InputTooLong) as caught:
        await embed(embedder_of(loader), ["a", "x" * 9])
    assert (caught.value.index, caught.value.tokens, caught.value.max_tokens) == (1, 9, 8)
    assert loader.encoder.begun.empty()


MANY = ["x" * (1 + index % 8) for index in range(600)]
"""Enough to be tokenized off the event loop."""


async def test_the_first_texts_are_computed_while_the_others_are_tokenized() -> None:
    loader = Loader()
    encoder, answers = loader.encoder, []

    async def ask() -> None:
        answers.extend(await embed(embedder_of(loader), MANY))

    async with anyio.create_task_group() as callers:
        callers.start_soon(ask)
        assert await encoder.next_batch() == [8]
        assert not encoder.may_tokenize.is_set()
        encoder.may_tokenize.set()
        encoder.steps.release(len(MANY))
    assert answers == [len(text) for text in MANY]


async def test_a_text_found_too_long_later_removes_the_rest_of_its_request_from_the_queue() -> None:
    loader = Loader()
    loader.encoder.may_tokenize.set()
    embedder = embedder_of(loader)
    with pytest.raises(InputTooLong) as caught:
        await embed(embedder, [*MANY, "x" * 9])
    assert caught.value.index == len(MANY)
    assert queued_tokens(embedder) == 0
    loader.encoder.steps.release(2)
    assert await embed(embedder, ["ab"]) == [2]


async def test_a_short_request_waits_for_one_batch_of_a_long_one_not_for_all() -> None:
    loader = Loader()
    encoder, embedder = loader.encoder, embedder_of(loader)
    async with anyio.create_task_group() as callers:
        callers.start_soon(embed, embedder, ["aaa"] * 6)
        assert await encoder.next_batch() == [3, 3]
        callers.start_soon(embed, embedder, ["b"])
        await wait_until(lambda: queued_tokens(embedder) == 13)
        encoder.steps.release()
        assert await encoder.next_batch() == [3, 1]
        encoder.steps.release(100)
    assert [encoder.begun.get_nowait() for _ in range(2)] == [[3, 3], [3]]


async def test_requests_that_wait_for_a_worker_share_the_next_batch() -> None:
    loader = Loader()
    encoder, embedder = loader.encoder, embedder_of(loader)
    async with anyio.create_task_group() as callers:
        callers.start_soon(embed, embedder, ["a"])
        assert await encoder.next_batch() == [1]
        for text in ("bb", "ccc"):
            callers.start_soon(embed, embedder, [text])
        await wait_until(lambda: queued_tokens(embedder) == 5)
        assert encoder.begun.empty()
        encoder.steps.release(2)
        assert await encoder.next_batch() == [3, 2]


@pytest.mark.parametrize(
    ("earlier", "special", "estimate"),
    [
        pytest.param([], 0, "2,000", id="nothing seen yet"),
        pytest.param([["x" * 6] * 6000], 0, "6,000", id="many texts"),
        pytest.param([["x"]] * 100, 2, "2,000", id="queries, which are mostly special tokens"),
    ],
)
async def test_the_tokens_of_a_request_are_estimated_from_earlier_requests(
    earlier: list[list[str]], special: int, estimate: str
) -> None:
    encoder = SteppedEncoder(replace(SIX, tokens_per_batch=100_000), special=special)
    encoder.may_tokenize.set()
    loader = Loader(encoder)
    loader.may_end.set()
    load = cast("Callable[[], Any]", loader)
    embedder = LocalEmbedder(ROUGH, load, lambda: ("rough", EXACT), max_queued_tokens=100, workers=1)
    ask = functools.partial(embedder.embed, input_type=None, truncate="NONE")
    with anyio.fail_after(SECONDS):
        encoder.steps.release(1000)
        for texts in earlier:
            await ask(texts)
        encoder.steps, encoder.begun = threading.Semaphore(0), queue.SimpleQueue()
        async with anyio.create_task_group() as callers:
            callers.start_soon(ask, ["a"])
            await encoder.next_batch()
            callers.start_soon(ask, ["b"] * 30)
            await wait_until(lambda: queued_tokens(embedder))
            with pytest.raises(Overloaded, match=f"there is no room for {estimate} more"):
                await ask(["x" * 6] * 1000)
            encoder.steps.release(2)


async def test_as_many_batches_run_at_once_as_workers_are_configured() -> None:
    loader = Loader()
    embedder = embedder_of(loader, workers=3)
    async with anyio.create_task_group() as callers:
        callers.start_soon(embed, embedder, ["abcde"] * 4)
        with anyio.fail_after(SECONDS):
            assert [await loader.encoder.next_batch() for _ in range(3)] == [[5], [5], [5]]
        assert queued_tokens(embedder) == 5
        loader.encoder.steps.release(4)


async def test_cancelling_between_batches_drops_the_rest() -> None:
    loader = Loader()
    encoder, embedder = loader.encoder, embedder_of(loader)
    async with anyio.create_task_group() as leaving:
        leaving.start_soon(embed, embedder, ["aaa"] * 6)
        assert await encoder.next_batch() == [3, 3]
        leaving.cancel_scope.cancel()
    encoder.steps.release(2)
    assert await embed(embedder, ["b"]) == [1]
    assert encoder.begun.get_nowait() == [1]
    assert encoder.begun.empty()


async def test_cancelling_a_waiting_request_lets_the_next_one_run() -> None:
    loader = Loader()
    encoder, embedder = loader.encoder, embedder_of(loader)
    async with anyio.create_task_group() as staying:
        staying.start_soon(embed, embedder, ["a"])
        assert await encoder.next_batch() == [1]
        async with anyio.create_task_group() as leaving:
            leaving.start_soon(embed, embedder, ["bb"])
            await wait_until(lambda: queued_tokens(embedder) == 2)
            staying.start_soon(embed, embedder, ["ccc"])
            await wait_until(lambda: queued_tokens(embedder) == 5)
            leaving.cancel_scope.cancel()
        encoder.steps.release(2)
        assert await encoder.next_batch() == [3]


# --- The end ---------------------------------------------------------------------------------------------------------


async def test_closing_fails_requests_that_wait_for_the_model() -> None:
    loader = Loader()
    embedder = embedder_of(loader, loaded=False)

    async def ask() -> None:
        with pytest.raises(ServerStopped):
            await embed(embedder, ["a"])

    async with anyio.create_task_group() as callers:
        callers.start_soon(ask)
        await wait_until(lambda: loader.calls)
        await embedder.aclose()

    # The model that finishes loading afterwards is disposed of without an error.
    loop = asyncio.get_running_loop()
    errors: list[Any] = []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    loader.may_end.set()
    await anyio.to_thread.run_sync(loader.threads[0].join, SECONDS)
    await anyio.lowlevel.checkpoint()
    assert not errors
    assert loader.encoder.closed == 1


async def test_closing_fails_a_request_after_its_running_batch() -> None:
    loader = Loader()
    encoder, embedder = loader.encoder, embedder_of(loader)

    async def ask() -> None:
        with pytest.raises(ServerStopped):
            await embed(embedder, ["a"] * 6)

    async with anyio.create_task_group() as callers:
        callers.start_soon(ask)
        callers.start_soon(ask)
        assert await encoder.next_batch() == [1] * 6
        await embedder.aclose()
        encoder.steps.release(100)
    assert encoder.begun.empty()


async def test_a_closed_embedder_refuses_work() -> None:
    loader = Loader()
    loader.encoder.steps.release(100)
    embedder = embedder_of(loader)
    await embed(embedder, ["a"])
    await embedder.aclose()
    assert loader.encoder.closed == 1
    for ask in (embedder.check(), embed(embedder, ["a"])):
        with pytest.raises(ServerStopped, match="shutting down"):
            await ask


def test_a_load_that_outlives_the_event_loop_ends_without_an_error() -> None:
    loader = Loader()

    async def leave_while_loading() -> None:
        embedder = embedder_of(loader, loaded=False)
        with anyio.move_on_after(0):
            await embedder.check()
        await wait_until(lambda: loader.calls)
        await embedder.aclose()

    anyio.run(leave_while_loading)
    loader.may_end.set()
    (thread,) = loader.threads
    thread.join(SECONDS)
    assert not thread.is_alive()

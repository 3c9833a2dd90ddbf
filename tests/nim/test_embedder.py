"""Embedding at an endpoint: requests, validation of responses, failures and rate limits."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
import numpy as np
import pytest
import stamina
from pydantic import SecretStr

from embeddings_mcp.embedders.nim import Endpoint, EndpointClient, NimEmbedder
from embeddings_mcp.embedders.nim.throttle import Throttle
from embeddings_mcp.errors import (
    EmbeddingsError,
    InputTooLong,
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
    ServerStopped,
    UpstreamFailed,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from embeddings_mcp.models import InputType, ModelCard, Truncate
from tests.nim.standin import (
    ASYMMETRIC,
    SYMMETRIC,
    Fault,
    StandIn,
    answering,
    changing,
    cut,
    held,
    overstated,
    stand_in,
    truncated,
    understated,
    zipped,
)

pytestmark = pytest.mark.anyio

TEXTS = [f"text number {number}" for number in range(7)]


@asynccontextmanager
async def embedding_at(
    nim: StandIn,
    card: ModelCard = SYMMETRIC,
    *,
    model: str | None = None,
    window: float = 60.0,
    **endpoint: Any,
) -> AsyncIterator[NimEmbedder]:
    """Open an embedder at the stand-in."""
    configured = Endpoint(url=nim.url, **endpoint)
    throttle = Throttle("the stand-in", concurrency=configured.concurrency, max_requests=configured.rate, window=window)
    embedder = NimEmbedder(EndpointClient(configured, throttle=throttle), card, model=model)
    try:
        with anyio.fail_after(60):
            yield embedder
    finally:
        await embedder.aclose()


async def embed(
    embedder: NimEmbedder,
    texts: list[str] = TEXTS,
    *,
    input_type: InputType | None = None,
    truncate: Truncate = "NONE",
) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    made = await embedder.embed(texts, input_type=input_type, truncate=truncate)
    return made.vectors


def expected(
    nim: StandIn, card: ModelCard = SYMMETRIC, input_type: InputType | None = None, texts: list[str] = TEXTS
) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.stack([nim.vector(text, card.id, input_type) for text in texts])


# --- Requests --------------------------------------------------------------------------------------------------------


async def test_every_text_gets_its_own_vector_and_usage_is_summed() -> None:
    async with stand_in() as nim, embedding_at(nim, batch_size=2) as embedder:
        made = await embedder.embed(TEXTS, input_type=None, truncate="NONE")
        np.testing.assert_array_equal(made.vectors, expected(nim))
        assert made.prompt_tokens == 3 * len(TEXTS)
        assert made.served_model == SYMMETRIC.id
        assert sorted(len(seen.json["input"]) for seen in nim.seen) == [1, 2, 2, 2]


async def test_a_request_has_the_fields_that_the_model_needs_and_no_others() -> None:
    async with stand_in() as nim, embedding_at(nim, ASYMMETRIC) as embedder:
        await embed(embedder, ["one"], input_type="query", truncate="END")
        assert nim.seen[-1].json == {
            "model": "test/asymmetric",
            "input": ["one"],
            "encoding_format": "base64",
            "truncate": "END",
            "input_type": "query",
        }
    async with stand_in() as nim, embedding_at(nim, SYMMETRIC) as embedder:
        await embed(embedder, ["one"], input_type="query")
        assert nim.seen[-1].json == {
            "model": "test/symmetric",
            "input": ["one"],
            "encoding_format": "base64",
            "truncate": "NONE",
        }


async def test_a_request_without_input_type_has_no_such_field() -> None:
    optional = replace(ASYMMETRIC, input_type="optional")
    async with stand_in(models={optional.id: optional}) as nim, embedding_at(nim, optional) as embedder:
        await embed(embedder, ["one"])
        assert nim.seen[-1].json.keys() == {"model", "input", "encoding_format", "truncate"}


async def test_a_model_is_requested_by_its_name_at_the_endpoint() -> None:
    served = replace(SYMMETRIC, id="symmetric:latest")
    async with stand_in(models={served.id: served}) as nim:
        async with embedding_at(nim, SYMMETRIC, model=served.id) as embedder:
            made = await embedder.embed(["one"], input_type=None, truncate="NONE")
        assert made.served_model == "symmetric:latest"
        assert embedder.card.id == SYMMETRIC.id


async def test_a_server_without_input_type_gets_the_prompt_prepended_to_the_text() -> None:
    async with stand_in(prompts=False) as nim:
        async with embedding_at(nim, ASYMMETRIC, dialect="openai") as embedder:
            vectors = await embed(embedder, input_type="query")
            assert set(nim.seen[0].json) == {"model", "input", "encoding_format"}
            with pytest.raises(InvalidRequest, match="`truncate` must be 'NONE' with test/asymmetric"):
                await embed(embedder, input_type="query", truncate="END")
        np.testing.assert_array_equal(vectors, expected(nim, ASYMMETRIC, "query"))


async def test_a_nim_declared_as_another_server_is_an_error_that_names_the_dialect() -> None:
    async with stand_in() as nim, embedding_at(nim, ASYMMETRIC, dialect="openai") as embedder:
        with pytest.raises(UpstreamFailed, match=r"`input_type`, which .* set the endpoint's `dialect` to 'nim'"):
            await embed(embedder, input_type="query")
        assert len(nim.seen) == 1


async def test_numbers_are_accepted_from_a_server_that_ignores_base64() -> None:
    async with stand_in(base64=False) as nim, embedding_at(nim) as embedder:
        np.testing.assert_array_equal(await embed(embedder), expected(nim))


async def test_unknown_dimensions_are_taken_from_the_first_response() -> None:
    async with stand_in() as nim, embedding_at(nim, replace(SYMMETRIC, dimensions=None)) as embedder:
        await embedder.check()
        assert embedder.card.dimensions == 8


async def test_progress_counts_the_texts_that_are_done() -> None:
    reported: list[int] = []

    async def on_progress(done: int) -> None:
        reported.append(done)

    async with stand_in() as nim, embedding_at(nim, batch_size=3, concurrency=1) as embedder:
        await embedder.embed(TEXTS, input_type=None, truncate="NONE", on_progress=on_progress)
    assert reported == [3, 6, 7]


# --- Responses -------------------------------------------------------------------------------------------------------


def _shuffle(payload: dict[str, Any]) -> None:
    payload["data"].reverse()


def _no_index(payload: dict[str, Any]) -> None:
    del payload["data"][1]["index"]


def _second(**fields: object) -> Fault:
    """Change fields of the second vector."""
    return changing(lambda payload: payload["data"][1].update(fields))


def _index(value: object) -> Fault:
    return _second(index=value)


def _one_less(payload: dict[str, Any]) -> None:
    del payload["data"][1]


def _all_shorter(payload: dict[str, Any]) -> None:
    for item in payload["data"]:
        item["embedding"] = [0.5] * 4


def _embedding(value: object) -> Fault:
    return _second(embedding=value)


def _served_by(place: str) -> Fault:
    return lambda reply: replace(reply, headers={**reply.headers, "X-Served-By": place})


def _no_data(payload: dict[str, Any]) -> None:
    del payload["data"]


@pytest.mark.parametrize(
    ("fault", "requests"),
    [
        pytest.param(changing(_shuffle), 1, id="shuffled"),
        pytest.param(zipped, 1, id="gzip"),
        pytest.param(_served_by("Zürich"), 1, id="a header in UTF-8"),
        pytest.param(_served_by("Z\udcfcrich"), 1, id="a header in latin-1"),
        pytest.param(cut, 2, id="cut off in the middle of the body"),
        pytest.param(truncated, 2, id="JSON truncated"),
        pytest.param(overstated, 2, id="Content-Length too large"),
        pytest.param(understated, 2, id="Content-Length too small"),
        pytest.param(lambda reply: replace(zipped(reply), body=reply.body), 2, id="not the gzip that it says"),
        pytest.param(answering(200, b""), 2, id="empty body"),
    ],
)
async def test_a_response_that_can_be_reordered_or_retried_succeeds(fault: Fault, requests: int) -> None:
    async with stand_in(faults=iter([fault])) as nim, embedding_at(nim) as embedder:
        np.testing.assert_array_equal(await embed(embedder), expected(nim))
        assert len(nim.seen) == requests


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (_index(0), "two vectors claim to belong to text 0"),
        (changing(_no_index), "a vector does not say which text it belongs to"),
        (_index(len(TEXTS)), "a vector does not say which text it belongs to"),
        (_index(-1), "a vector does not say which text it belongs to"),
        (_index(True), "a vector does not say which text it belongs to"),
        (changing(_one_less), "7 texts were sent and 6 vectors came back"),
        (_embedding([0.5] * 4), "the vector of text 1 has 4 dimensions instead of 8"),
        (changing(_all_shorter), "the vector of text 0 has 4 dimensions instead of 8"),
        (_embedding([float("nan")] * 8), "the vector of text 1 holds values that are not finite numbers"),
        (_embedding([float("inf")] * 8), "the vector of text 1 holds values that are not finite numbers"),
        (_embedding([1e300] * 8), "the vector of text 1 holds values that are not finite numbers"),
        (_embedding([None] * 8), "the vector of text 1 holds values that are not finite numbers"),
        (_embedding("AAAAAAAA+H8AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="), "the vector of text 1 holds values"),
        (_embedding("not base64!"), "the vector of text 1 cannot be read"),
        (_embedding("AAAA"), "the vector of text 1 cannot be read"),
        (_embedding("AAAA AAAA+H8AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="), "the vector of text 1 cannot be read"),
        (_embedding(["a"] * 8), "the vector of text 1 cannot be read"),
        (_embedding([10**400] * 8), "the vector of text 1 cannot be read"),
        (_embedding([[0.5] * 8]), "the vector of text 1 is empty or not one-dimensional"),
        (_embedding([]), "the vector of text 1 is empty or not one-dimensional"),
        (_embedding(None), "the vector of text 1 is neither numbers nor base64"),
        (changing(_no_data), "it has no `data` list"),
        (changing(lambda payload: payload.update(model="test/\ud83d")), "it contains half of a surrogate pair"),
        (answering(200, [1, 2]), "it has no `data` list"),
    ],
)
async def test_an_invalid_response_is_refused_without_a_retry(fault: Fault, reason: str) -> None:
    async with stand_in(faults=iter([fault])) as nim, embedding_at(nim) as embedder:
        with pytest.raises(UpstreamFailed) as caught:
            await embed(embedder)
        assert reason in caught.value.message
        assert nim.url in caught.value.message
        assert len(nim.seen) == 1


async def test_a_deeply_nested_response_is_refused() -> None:
    deep = answering(200, b'{"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    async with stand_in(faults=itertools.repeat(deep)) as nim, embedding_at(nim) as embedder:
        with pytest.raises(UpstreamFailed, match=r"its [\d,]+ bytes are not JSON"):
            await embed(embedder)


@pytest.mark.parametrize("tokens", [-1, 2**31, 2**63, 10**30, 1.5, "7", None])
async def test_implausible_token_counts_are_ignored(tokens: object) -> None:
    def counted(payload: dict[str, Any]) -> None:
        payload["usage"] = {"prompt_tokens": tokens}

    async with stand_in(faults=iter([changing(counted)])) as nim, embedding_at(nim) as embedder:
        made = await embedder.embed(["a text"], input_type=None, truncate="NONE")
    assert sum(made.tokens) == 0


@pytest.mark.parametrize("model", [None, "", 7, ["test/symmetric"]])
async def test_a_response_without_a_valid_model_id_is_of_an_unknown_model(model: object) -> None:
    fault = changing(lambda payload: payload.update(model=model))
    async with stand_in(faults=iter([fault])) as nim, embedding_at(nim) as embedder:
        made = await embedder.embed(["a text"], input_type=None, truncate="NONE")
        np.testing.assert_array_equal(made.vectors, expected(nim, texts=["a text"]))
    assert made.served_model is None


async def test_two_models_in_one_call_are_refused() -> None:
    def renamed(payload: dict[str, Any]) -> None:
        payload["model"] = "test/other"

    async with (
        stand_in(faults=iter([changing(renamed)])) as nim,
        embedding_at(nim, batch_size=4) as embedder,
    ):
        with pytest.raises(UpstreamFailed, match=r"different models \(test/other .* and test/symmetric"):
            await embed(embedder)


async def test_an_unexpected_model_id_is_passed_on_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with stand_in(served_as="test/renamed") as nim, embedding_at(nim) as embedder:
        for _ in range(2):
            made = await embedder.embed(["one"], input_type=None, truncate="NONE")
            assert made.served_model == "test/renamed"
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        f"{nim.url}/v1 was asked for test/symmetric and says that it serves test/renamed"
    ]


async def test_an_announced_end_of_life_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def deprecated(reply: Any) -> Any:
        return replace(reply, headers={**reply.headers, "Deprecation": "2027-01-31T09:00:00Z"})

    async with stand_in(faults=itertools.repeat(deprecated)) as nim, embedding_at(nim) as embedder:
        await embed(embedder)
    assert "reaches its end of life" in caplog.text
    assert "2027-01-31" in caplog.text


async def test_the_number_of_distinct_warnings_is_limited(
    caplog: pytest.LogCaptureFixture,
) -> None:
    numbers = itertools.count()

    def deprecated(reply: Any) -> Any:
        return replace(reply, headers={**reply.headers, "Deprecation": f"@{next(numbers)}"})

    async with stand_in(faults=itertools.repeat(deprecated)) as nim, embedding_at(nim) as embedder:
        for _ in range(150):
            await embed(embedder, ["one"])
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 100


async def test_a_response_that_is_not_ready_is_polled_for() -> None:
    async with stand_in() as nim:
        nim.faults = iter([nim.accepting(polls=2)])
        key = SecretStr("nvapi-secret")
        async with embedding_at(nim, status_url=f"{nim.url}/status", api_key=key) as embedder:
            np.testing.assert_array_equal(await embed(embedder), expected(nim))
        assert [seen.path for seen in nim.seen] == ["/v1/embeddings", "/status/ticket-1", "/status/ticket-2"]
        assert {seen.headers["authorization"] for seen in nim.seen} == {"Bearer nvapi-secret"}


@pytest.mark.parametrize("request_id", ["", "tab\tbed", "../models", "1" * 1000])
async def test_a_pending_response_without_a_valid_id_is_refused(request_id: str) -> None:
    fault = answering(202, **{"NVCF-REQID": request_id})
    async with (
        stand_in(faults=itertools.repeat(fault)) as nim,
        embedding_at(nim, status_url=f"{nim.url}/status") as embedder,
    ):
        with pytest.raises(UpstreamFailed, match="202"):
            await embed(embedder)
        assert [seen.path for seen in nim.seen] == ["/v1/embeddings"]


# --- Failures --------------------------------------------------------------------------------------------------------


async def test_a_text_that_is_too_long_is_reported_by_its_position_in_the_call() -> None:
    texts = [*TEXTS, "word " * 70]
    async with stand_in() as nim:
        async with embedding_at(nim, batch_size=1) as embedder:
            with pytest.raises(InputTooLong) as caught:
                await embed(embedder, texts)
            assert (caught.value.index, caught.value.tokens, caught.value.max_tokens) == (7, 70, 64)
            assert caught.value.certain
        async with embedding_at(nim, batch_size=5) as embedder:
            with pytest.raises(InputTooLong) as caught:
                await embed(embedder, texts)
            assert caught.value.index == 7
            named = caught.value.reindexed(name="input[{}]".format)
            assert "probably `input[7]`, the longest of those sent together" in named.message


async def test_the_text_that_an_endpoint_names_as_too_long_is_reported_even_if_another_has_more_characters() -> None:
    message = "`input[1]` has 70 tokens, and the model takes 64: shorten it"
    fault = answering(400, {"error": {"message": message, "code": "input_too_long"}})
    async with stand_in(faults=iter([fault])) as nim, embedding_at(nim) as embedder:
        with pytest.raises(InputTooLong) as caught:
            await embed(embedder, ["incomprehensibilities", "a b c"])
        assert (caught.value.index, caught.value.certain) == (1, True)


@pytest.mark.parametrize("key", ["x", "token", "64"])
async def test_a_message_that_contains_a_short_key_by_chance_is_still_recognized(key: str) -> None:
    async with stand_in() as nim, embedding_at(nim, api_key=SecretStr(key)) as embedder:
        with pytest.raises(InputTooLong) as caught:
            await embed(embedder, ["word " * 70])
        assert (caught.value.tokens, caught.value.max_tokens) == (70, 64)


async def test_a_request_that_is_too_large_is_split() -> None:
    def at_most_two(reply: Any) -> Any:
        too_many = "batch size 50 > maximum allowed batch size 2"
        return answering(413, {"error": too_many})(reply) if len(nim.seen[-1].json["input"]) > 2 else reply

    async with stand_in(faults=itertools.repeat(at_most_two)) as nim, embedding_at(nim) as embedder:
        np.testing.assert_array_equal(await embed(embedder), expected(nim))
        assert [len(seen.json["input"]) for seen in nim.seen] == [7, 3, 1, 2, 4, 2, 2]
        with pytest.raises(InputTooLong) as caught:
            await embed(embedder, [*TEXTS, "word " * 70])
        assert caught.value.index == 7
    async with stand_in(faults=itertools.repeat(answering(413))) as nim, embedding_at(nim) as embedder:
        with pytest.raises(PayloadTooLarge, match="the text is too much for one request"):
            await embed(embedder)


async def test_a_failing_batch_fails_the_call_with_its_error_and_cancels_the_others() -> None:
    never = anyio.Event()
    async with (
        stand_in(faults=iter([held(never), answering(400, {"error": "no such thing"})])) as nim,
        embedding_at(nim, batch_size=4) as embedder,
    ):
        with pytest.raises(InvalidRequest, match="no such thing"):
            await embed(embedder)
        await nim.client_disconnected.wait()


async def test_cancelling_a_call_closes_its_connection_to_the_endpoint() -> None:
    never = anyio.Event()
    async with stand_in(faults=itertools.repeat(held(never))) as nim, embedding_at(nim) as embedder:
        async with anyio.create_task_group() as group:
            group.start_soon(embed, embedder)
            await nim.received(1)
            group.cancel_scope.cancel()
        await nim.client_disconnected.wait()


async def test_closing_the_embedder_fails_calls_in_flight_and_later_ones() -> None:
    never = anyio.Event()
    errors: list[EmbeddingsError] = []

    async def call(embedder: NimEmbedder) -> None:
        try:
            await embed(embedder)
        except EmbeddingsError as error:
            errors.append(error)

    async with stand_in(faults=itertools.repeat(held(never))) as nim, embedding_at(nim) as embedder:
        async with anyio.create_task_group() as group:
            group.start_soon(call, embedder)
            await nim.received(1)
            await embedder.aclose()
        await nim.client_disconnected.wait()
        await call(embedder)
    assert [type(error) for error in errors] == [ServerStopped, ServerStopped]


async def test_an_endpoint_that_sends_nothing_times_out() -> None:
    never = anyio.Event()
    async with stand_in(faults=itertools.repeat(held(never))) as nim:
        async with embedding_at(nim, timeout=0.02) as embedder:
            with pytest.raises(UpstreamTimeout, match=r"sent nothing for 0\.02 s"):
                await embed(embedder)
            assert len(nim.seen) == 6
        async with embedding_at(nim, deadline=0.05) as embedder:
            with pytest.raises(UpstreamTimeout, match=r"had embedded 0 of 7 texts after 0\.05 s"):
                await embed(embedder)


async def test_an_unreachable_endpoint_is_named_in_the_error_with_the_reason_and_what_to_check() -> None:
    async with stand_in() as nim:
        pass
    problem = rf"cannot connect to the endpoint {nim.url}/v1 \(.* failed\): is it running, is the URL right"
    async with embedding_at(nim) as embedder:
        for ask in (embedder.check, lambda: embed(embedder)):
            with pytest.raises(UpstreamUnavailable, match=problem):
                await ask()


@pytest.mark.parametrize(("status", "header"), [(429, "0"), (503, "Wed, 21 Oct 2015 07:28:00 GMT")])
async def test_a_retry_after_that_is_over_already_does_not_replace_the_backoff(status: int, header: str) -> None:
    refused = answering(status, b"", Retry_After=header)
    async with stand_in(faults=iter([refused])) as nim, embedding_at(nim) as embedder:
        with stamina.set_testing(False):
            await embed(embedder)
        first, second = nim.seen
        assert second.at - first.at >= 0.49


async def test_a_short_retry_after_pauses_all_requests_to_the_endpoint() -> None:
    unavailable = answering(503, b"", Retry_After="0.2")
    async with stand_in(faults=iter([unavailable])) as nim, embedding_at(nim, concurrency=1) as embedder:
        await embed(embedder)
        first, second = nim.seen
        assert second.at - first.at >= 0.19


async def test_a_long_retry_after_is_passed_on_to_the_caller() -> None:
    offline = answering(503, {"detail": "The model is offline."}, Retry_After="10800")
    async with stand_in(faults=itertools.repeat(offline)) as nim, embedding_at(nim) as embedder:
        with pytest.raises(UpstreamUnavailable, match="The model is offline") as caught:
            await embed(embedder)
        assert caught.value.retry_after == 10800
        assert len(nim.seen) == 1


# --- Limits ----------------------------------------------------------------------------------------------------------


async def test_requests_in_flight_stay_within_the_concurrency() -> None:
    gate = anyio.Event()
    async with (
        stand_in(faults=itertools.repeat(held(gate))) as nim,
        embedding_at(nim, batch_size=1, concurrency=3) as embedder,
    ):
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(embed, embedder)
            await nim.received(3)
            gate.set()
        assert nim.max_in_flight == 3
        assert len(nim.seen) == 4 * len(TEXTS)


async def test_a_call_that_could_never_finish_in_time_is_refused_at_once() -> None:
    async with (
        stand_in() as nim,
        embedding_at(nim, batch_size=1, requests_per_minute=2, deadline=100) as embedder,
    ):
        with pytest.raises(InvalidRequest, match="send at most 4 texts at once"):
            await embed(embedder)
        assert not nim.seen


async def test_a_call_that_would_start_too_late_is_refused_with_retry_after() -> None:
    async with (
        stand_in() as nim,
        embedding_at(nim, batch_size=4, requests_per_minute=2, deadline=50) as embedder,
    ):
        await embed(embedder)
        with pytest.raises(Overloaded) as caught:
            await embed(embedder)
        assert 1 <= caught.value.retry_after <= 10
        assert len(nim.seen) == 2


async def test_a_thousand_texts_of_five_callers_get_their_vectors_despite_a_failure_rate_of_one_in_five() -> None:
    rate, window = 40, 0.4
    rng = random.Random(5)
    failing = [
        answering(429, {"status": 429, "title": "Too Many Requests"}),
        answering(500, b"failed"),
        answering(504),
        cut,
        truncated,
    ]
    one_in_five = iter(lambda: rng.choice([rng.choice(failing), None, None, None, None]), ...)
    async with stand_in(faults=one_in_five) as nim:
        async with embedding_at(
            nim, ASYMMETRIC, batch_size=10, requests_per_minute=rate, window=window, concurrency=8
        ) as embedder:
            vectors: dict[int, np.ndarray[Any, Any]] = {}

            async def call(caller: int) -> None:
                texts = [f"caller {caller} text {number}" for number in range(200)]
                vectors[caller] = await embed(embedder, texts, input_type="passage")

            async with anyio.create_task_group() as group:
                for caller in range(5):
                    group.start_soon(call, caller)
        for caller in range(5):
            texts = [f"caller {caller} text {number}" for number in range(200)]
            np.testing.assert_array_equal(vectors[caller], expected(nim, ASYMMETRIC, "passage", texts))
        arrivals = [seen.at for seen in nim.seen]
        assert len(arrivals) > 110
        # The limit holds when requests are sent; delays in transit may shorten a window of arrivals.
        assert all(later - earlier > 0.5 * window for earlier, later in zip(arrivals, arrivals[rate:], strict=False))
        assert nim.max_in_flight <= 8

"""Validation of endpoints, and protection of their keys."""

from __future__ import annotations

import itertools
import logging
import math
import pickle
import traceback

import anyio
import pytest
from pydantic import SecretStr

from embeddings_mcp.embedders.nim import HOSTED_URL, Endpoint, EndpointClient, NimEmbedder, discover
from embeddings_mcp.errors import EmbeddingsError, InvalidSetting
from tests.nim.standin import SYMMETRIC, answering, cut, stand_in

KEY = "nvapi-0123456789secret"


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("https://integrate.api.nvidia.com", "https://integrate.api.nvidia.com/v1"),
        ("https://nim.example/v1/", "https://nim.example/v1"),
        (" https://gateway.example/team/nim ", "https://gateway.example/team/nim/v1"),
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://127.0.0.2:8000", "http://127.0.0.2:8000/v1"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
        ("http://nim.localhost", "http://nim.localhost/v1"),
    ],
)
def test_an_address_is_completed_to_the_apis_base_url(given: str, url: str) -> None:
    assert Endpoint(url=given).url == url


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("http://nim.example", "must be reached over https"),
        ("http://10.0.0.1:8000", "must be reached over https"),
        ("http://localhost.example", "must be reached over https"),
        ("ftp://localhost", "must look like https://host"),
        ("localhost:8000", "must look like https://host"),
        ("/v1", "must look like https://host"),
        ("", "must look like https://host"),
        ("https://[::1", "must look like https://host"),
        ("https://nim.example/\udcfc", "must look like https://host"),
        (f"https://user:{KEY}@nim.example", "hold neither user name nor password"),
        (f"https://nim.example/v1?api_key={KEY}", "must end with its path"),
    ],
)
def test_an_invalid_address_is_refused(given: str, reason: str) -> None:
    with pytest.raises(InvalidSetting, match=reason) as caught:
        Endpoint(url=given)
    assert KEY not in str(caught.value)


def test_http_to_another_machine_must_be_allowed() -> None:
    assert Endpoint(url="http://nim.example", allow_http=True).url == "http://nim.example/v1"


@pytest.mark.parametrize("limit", ["batch_size", "concurrency", "requests_per_minute", "timeout", "deadline"])
def test_a_limit_of_zero_is_refused(limit: str) -> None:
    with pytest.raises(InvalidSetting, match=rf"`{limit}` of the endpoint .* must be greater than 0"):
        Endpoint(url=HOSTED_URL, **{limit: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["two words", "with\nnewline", "schlüssel"])
def test_an_invalid_key_is_refused_without_being_repeated(key: str) -> None:
    with pytest.raises(InvalidSetting, match="the key in NVIDIA_API_KEY contains characters that no key has") as caught:
        Endpoint(url=HOSTED_URL, api_key=SecretStr(key))
    assert key not in str(caught.value)


def test_an_empty_key_counts_as_none_and_surrounding_whitespace_is_stripped() -> None:
    assert Endpoint(url=HOSTED_URL, api_key=SecretStr(" ")).api_key is None
    assert Endpoint(url=HOSTED_URL, api_key=SecretStr(f"{KEY}\n")).headers == {"Authorization": f"Bearer {KEY}"}


def test_only_the_hosted_api_has_a_default_rate_limit() -> None:
    assert Endpoint(url=HOSTED_URL).rate == 40
    assert Endpoint(url=HOSTED_URL, requests_per_minute=math.inf).rate == math.inf
    assert Endpoint(url="http://localhost:8000").rate == math.inf
    assert Endpoint(url="http://localhost:8000", requests_per_minute=7).rate == 7


def test_keys_are_masked_in_an_endpoints_messages() -> None:
    message = f"{KEY}, nvapi-Another_1-2.x and own"
    assert Endpoint(url=HOSTED_URL, api_key=SecretStr(KEY)).redact(message) == "***, ***.x and own"
    assert Endpoint(url=HOSTED_URL, api_key=SecretStr("own")).redact(message) == "***, ***.x and ***"
    assert Endpoint(url=HOSTED_URL).redact(message) == "***, ***.x and own"


@pytest.mark.anyio
async def test_the_key_goes_to_the_endpoint_and_nowhere_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    printed: list[str] = []
    async with stand_in() as other, stand_in() as nim:
        redirect = answering(307, b"", Location=f"{other.url}/v1/embeddings")
        echoing_key = answering(400, {"error": f"what is Bearer {KEY}?"})
        nim.faults = itertools.cycle([redirect, echoing_key, cut, answering(401), None])
        endpoint = Endpoint(url=nim.url, api_key=SecretStr(KEY))
        client = EndpointClient(endpoint)
        embedder = NimEmbedder(client, SYMMETRIC)
        with anyio.fail_after(10):
            await discover(client)
            for _ in range(5):
                try:
                    await embedder.embed(["a text"], input_type=None, truncate="NONE")
                except EmbeddingsError as error:
                    printed += [
                        "".join(traceback.format_exception(error)),
                        repr(error.args),
                        repr(pickle.dumps(error.args)),
                    ]
                    chained: BaseException | None = error
                    while chained is not None:
                        printed.append(repr(vars(chained)))
                        chained = chained.__cause__ or chained.__context__
            await client.aclose()
        assert {seen.headers["authorization"] for seen in nim.seen} == {f"Bearer {KEY}"}
        assert not other.seen
    printed += [repr(endpoint), str(endpoint), repr(vars(client)), repr(vars(embedder))]
    printed += [f"{record.getMessage()} {vars(record)}" for record in caplog.records]
    assert len(printed) > 20
    assert not [line for line in printed if KEY in line]

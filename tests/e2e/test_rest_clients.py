"""REST clients with the installed server: a real process with the real model, and third-party clients."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import httpx2
import numpy as np
import openai
import pytest
import tiktoken
from langchain_openai import OpenAIEmbeddings
from langchain_tests.integration_tests import EmbeddingsIntegrationTests

from embeddings_mcp.models import DEFAULT_MODEL
from tests.support import COMMAND, START_SECONDS, server_process

TEXTS = ["A cat is asleep.", '["a","b"]', "null", "A cat is asleep.", "Les actions ont chuté."]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with server_process(COMMAND, "serve", "--transport", "http", "--port", "0") as (_process, url):
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="not needed", max_retries=0, timeout=60) as client:
        yield client


def test_a_server_on_a_public_address_does_not_start_without_a_key() -> None:
    completed = subprocess.run(
        [COMMAND, "serve", "--transport", "http", "--host", "0.0.0.0", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )

    assert (completed.returncode, completed.stdout) == (1, "")
    assert "EMBEDDINGS_MCP_API_KEY" in completed.stderr
    assert "Traceback" not in completed.stderr


# --- openai ----------------------------------------------------------------------------------------------------------


def vectors(answer: openai.types.CreateEmbeddingResponse) -> np.ndarray[Any, np.dtype[np.float32]]:
    assert [row.index for row in answer.data] == list(range(len(answer.data)))
    return np.array([row.embedding for row in answer.data], dtype=np.float32)


def test_openai_gets_the_same_vectors_as_base64_and_as_floats(client: openai.OpenAI) -> None:
    packed = client.embeddings.create(model="default", input=TEXTS)
    floats = client.embeddings.create(model=DEFAULT_MODEL, input=TEXTS, encoding_format="float")

    assert packed.model == floats.model == DEFAULT_MODEL
    assert packed.usage == floats.usage
    assert vectors(packed).shape == (len(TEXTS), 384)
    assert np.array_equal(vectors(packed), vectors(floats))


def test_each_text_is_embedded_literally(client: openai.OpenAI) -> None:
    together = vectors(client.embeddings.create(model="default", input=TEXTS))
    separately = np.concatenate([vectors(client.embeddings.create(model="default", input=text)) for text in TEXTS])

    np.testing.assert_allclose(together, separately, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    alike = together @ together.T > 0.99
    assert (alike == np.equal.outer(TEXTS, TEXTS)).all()


def test_openai_finds_the_models(client: openai.OpenAI) -> None:
    listed = client.models.list().data

    assert [model.id for model in listed] == [DEFAULT_MODEL]
    assert client.models.retrieve(DEFAULT_MODEL) == listed[0]
    assert listed[0].owned_by == "sentence-transformers"


@pytest.mark.parametrize(
    ("arguments", "error_type", "code", "param", "expected"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found", "model", [DEFAULT_MODEL]),
        ({"input": ""}, openai.BadRequestError, "invalid_request", "input", ["empty string"]),
        ({"dimensions": 128}, openai.BadRequestError, "invalid_request", "dimensions", ["384", "Matryoshka"]),
        ({"input": ["one", "word " * 300]}, openai.BadRequestError, "input_too_long", "input[1]", ["302", "256"]),
    ],
    ids=["unknown model", "empty string", "dimensions on MiniLM", "too long with NONE"],
)
def test_openai_raises_the_matching_error(
    client: openai.OpenAI,
    arguments: dict[str, Any],
    error_type: type[openai.APIStatusError],
    code: str,
    param: str,
    expected: list[str],
) -> None:
    with pytest.raises(error_type) as raised:
        client.embeddings.create(**({"model": "default", "input": "one"} | arguments))

    assert (raised.value.code, raised.value.param) == (code, param)
    for part in expected:
        assert part in raised.value.message


def test_texts_that_are_too_long_are_truncated_if_the_request_allows_it(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="default", input="word " * 300, extra_body={"truncate": "END"})

    assert answer.usage.prompt_tokens == 256


def test_the_server_is_ready(url: str) -> None:
    # The first probe may time out while the model loads; by the second one it is loaded.
    answers = [httpx.get(f"{url}/v1/health/ready", timeout=30) for _ in range(2)]

    assert answers[-1].json() == {"object": "health.response", "message": "ready", "ready": True}


# --- langchain -------------------------------------------------------------------------------------------------------


def langchain(url: str, **options: Any) -> dict[str, Any]:
    """Arguments of LangChain's client for this server.

    LangChain never closes its default HTTP clients, so pass clients that keep no connections open.
    """
    limits = httpx2.Limits(max_keepalive_connections=0)
    return {
        "base_url": f"{url}/v1",
        "api_key": "not needed",
        "model": "default",
        "max_retries": 0,
        "http_client": httpx2.Client(limits=limits),
        "http_async_client": httpx2.AsyncClient(limits=limits),
        **options,
    }


@pytest.mark.anyio
class TestLangChain(EmbeddingsIntegrationTests):
    """LangChain's standard tests for embeddings integrations."""

    @pytest.fixture(autouse=True)
    def _server(self, url: str) -> None:
        self.url = url

    @property
    def embeddings_class(self) -> type[OpenAIEmbeddings]:
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return langchain(self.url, check_embedding_ctx_length=False)


def test_the_error_for_token_ids_names_the_langchain_option(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The original vocabulary would have to be downloaded; one token per byte is good enough here.
    by_byte = tiktoken.Encoding(
        "bytes", pat_str=".", mergeable_ranks={bytes([byte]): byte for byte in range(256)}, special_tokens={}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _name: by_byte)

    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        OpenAIEmbeddings(**langchain(url)).embed_query("one")

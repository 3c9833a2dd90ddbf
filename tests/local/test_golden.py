"""Each family compared with the vectors of its authors' own code: in the encoder, and over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from benchmarks.bulk import encode

from embeddings_mcp.embedders.base import Embeddings
from embeddings_mcp.embedders.local.encoder import Encoder
from embeddings_mcp.errors import InputTooLong
from embeddings_mcp.models import Truncate
from embeddings_mcp.vectors import FloatMatrix, shorten
from tests.local.golden import MODELS, Case, FamilyName, encoder, family
from tests.support import COMMAND, server_process

CASES = [pytest.param(name, case, id=f"{name}-{case.name}") for name in MODELS for case in family(name).cases]
BATCHES = [
    pytest.param(name, batch, id=f"{name}-{index}")
    for name in MODELS
    for index, batch in enumerate(family(name).batches)
]


def embed(model: Encoder, cases: tuple[Case, ...]) -> Embeddings:
    """Embed cases that can share a call."""
    (input_type,) = {case.input_type for case in cases}
    truncate: Truncate = "END" if any(case.truncate == "END" for case in cases) else "NONE"
    return encode(model, [case.text for case in cases], input_type=input_type, truncate=truncate)


def calls(batch: tuple[Case, ...]) -> Iterator[tuple[Case, ...]]:
    """Split a batch into calls with one input type and one number of dimensions each."""
    kinds = dict.fromkeys((case.input_type, case.dimensions) for case in batch)
    return (tuple(case for case in batch if (case.input_type, case.dimensions) == kind) for kind in kinds)


def cut(vectors: FloatMatrix, case: Case) -> FloatMatrix:
    return vectors if case.dimensions is None else shorten(vectors, case.dimensions)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_text_becomes_the_tokens_and_the_vector_of_the_reference(name: FamilyName, case: Case) -> None:
    model = encoder(name, case.max_length)

    (tokens,) = model.tokenize([case.text], input_type=case.input_type, truncate=case.truncate)
    embedded = embed(model, (case,))

    assert tokens.rows == [case.ids]
    assert tokens.skip == case.pool_from
    assert embedded.prompt_tokens == len(case.ids)
    np.testing.assert_allclose(cut(embedded.vectors, case)[0], case.vector, rtol=0, atol=family(name).tolerance)


@pytest.mark.parametrize(("name", "batch"), BATCHES)
def test_texts_embedded_together_get_the_same_vectors_as_alone(name: FamilyName, batch: tuple[Case, ...]) -> None:
    for cases in calls(batch):
        embedded = embed(encoder(name), cases)

        assert embedded.prompt_tokens == sum(len(case.ids) for case in cases)
        for vectors, case in zip(embedded.vectors[:, None], cases, strict=True):
            np.testing.assert_allclose(cut(vectors, case)[0], case.vector, rtol=0, atol=family(name).tolerance)


@pytest.mark.parametrize(
    ("name", "case"), [case for case in CASES if isinstance(case.values[1], Case) and case.values[1].truncate == "END"]
)
def test_a_text_that_is_too_long_is_refused_with_its_length_unless_truncation_is_allowed(
    name: FamilyName, case: Case
) -> None:
    with pytest.raises(InputTooLong) as refused:
        encode(encoder(name, case.max_length), [case.text], input_type=case.input_type)

    assert (refused.value.index, refused.value.tokens) == (0, case.untruncated_tokens)
    assert refused.value.max_tokens == case.max_length


@pytest.mark.parametrize("name", MODELS)
def test_the_families_run_without_padding(name: FamilyName) -> None:
    assert encoder(name)._transformer.packed


# --- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server with all families, and a card for the tiny Llama, whose lengths differ from those of the real one."""
    card = {
        "id": MODELS["llama-nemotron-embed"],
        "matryoshka": family("llama-nemotron-embed").matryoshka,
        "max_tokens": family("llama-nemotron-embed").max_tokens,
    }
    models = [argument for name in MODELS for argument in ("--model", f"{MODELS[name]}={family(name).folder}")]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("EMBEDDINGS_MCP_CARDS", json.dumps([card]))
        environment.setenv("EMBEDDINGS_MCP_PRECISION", "float32")
        with server_process(COMMAND, "serve", "--transport", "http", "--port", "0", *models) as (_process, url):
            yield url


@pytest.mark.parametrize("name", MODELS)
def test_a_server_answers_with_the_vectors_of_the_reference(url: str, name: FamilyName) -> None:
    # An empty text is not a valid request; its vector is tested above.
    cases = tuple(case for case in family(name).cases if case.text and case.max_length == family(name).max_tokens)
    for call in calls(cases):
        request: dict[str, object] = {"model": MODELS[name], "input": [case.text for case in call], "truncate": "END"}
        if call[0].input_type is not None:
            request["input_type"] = call[0].input_type
        if call[0].dimensions is not None:
            request["dimensions"] = call[0].dimensions

        response = httpx.post(f"{url}/v1/embeddings", json=request, timeout=60)

        assert response.status_code == 200, response.text
        body = response.json()
        assert body["usage"]["prompt_tokens"] == sum(len(case.ids) for case in call)
        for row, case in zip(body["data"], call, strict=True):
            np.testing.assert_allclose(row["embedding"], case.vector, rtol=0, atol=family(name).tolerance)

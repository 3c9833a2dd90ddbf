"""Quantized vectors: the encoding of each `embedding_type`, and its accuracy."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embeddings_mcp.schema import TypedEmbeddingRequest
from embeddings_mcp.serialization import parse
from embeddings_mcp.vectors import FloatMatrix, normalize, quantize
from tests.support import service_of

VECTORS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 20)),
    elements=st.floats(-1, 1, width=32, allow_subnormal=False),
)


@given(VECTORS)
def test_int8_is_within_half_a_level_of_the_scaled_vector(vectors: FloatMatrix) -> None:
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    levels = quantize(vectors, "int8")

    assert levels.dtype == np.int8
    large = largest[:, 0] > 1e-9  # vectors close to zero need not be exact
    assert np.abs(levels[large] - 127 * vectors[large] / largest[large]).max(initial=0) <= 0.5 + 1e-4


@given(VECTORS)
def test_uint8_is_int8_offset_by_128(vectors: FloatMatrix) -> None:
    assert (quantize(vectors, "uint8").astype(int) - 128 == quantize(vectors, "int8")).all()


@given(VECTORS)
def test_ubinary_holds_the_signs_most_significant_bit_first(vectors: FloatMatrix) -> None:
    packed = quantize(vectors, "ubinary")
    bits = np.unpackbits(packed.astype(np.uint8), axis=1, count=vectors.shape[1])

    assert packed.shape[1] == -(-vectors.shape[1] // 8)
    assert (bits == (vectors > 0)).all()


@given(VECTORS)
def test_binary_is_ubinary_offset_by_128(vectors: FloatMatrix) -> None:
    assert (quantize(vectors, "binary").astype(int) + 128 == quantize(vectors, "ubinary")).all()


@given(VECTORS, st.sampled_from(["int8", "uint8", "binary", "ubinary"]))
def test_a_vector_is_quantized_independently_of_its_neighbors(vectors: FloatMatrix, embedding_type: str) -> None:
    together = quantize(vectors, embedding_type)  # type: ignore[arg-type]
    alone = [quantize(vector[None], embedding_type)[0] for vector in vectors]  # type: ignore[arg-type]

    assert (together == np.stack(alone)).all()


@pytest.mark.parametrize(("embedding_type", "minimum"), [("int8", 0.999), ("uint8", 0.999)])
def test_cosines_survive_one_byte_per_component(embedding_type: str, minimum: float) -> None:
    vectors = normalize(np.random.default_rng(0).standard_normal((50, 384)).astype(np.float32))
    levels = quantize(vectors, embedding_type).astype(np.float32)  # type: ignore[arg-type]
    levels -= 128 if embedding_type == "uint8" else 0

    assert (normalize(levels) * vectors).sum(axis=1).min() > minimum


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("embedding_type", "number"),
    [("float", "<f4"), ("int8", "i1"), ("uint8", "u1"), ("binary", "i1"), ("ubinary", "u1")],
)
async def test_base64_holds_the_bytes_of_the_numbers(embedding_type: str, number: str) -> None:
    service = service_of()
    fields = {"model": "default", "input": ["one", "two"], "embedding_type": embedding_type}
    as_numbers = await service.create_embedding(parse(TypedEmbeddingRequest, fields))
    as_base64 = await service.create_embedding(parse(TypedEmbeddingRequest, fields | {"encoding_format": "base64"}))

    for plain, packed in zip(as_numbers["data"], as_base64["data"], strict=True):
        assert isinstance(packed["embedding"], str)
        decoded = np.frombuffer(base64.b64decode(packed["embedding"]), dtype=number)
        assert decoded.tolist() == np.asarray(plain["embedding"]).tolist()

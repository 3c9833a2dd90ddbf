"""The wire types: as strict as the published schema, with actionable error messages."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import jsonschema
import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embeddings_mcp.errors import InvalidRequest
from embeddings_mcp.operations import OPERATIONS
from embeddings_mcp.publish.schemas import json_schema
from embeddings_mcp.schema import (
    EmbeddingRequest,
    EmbeddingResponse,
    ListModelsRequest,
    SearchRequest,
    SimilarityRequest,
)
from embeddings_mcp.serialization import dump_json, parse
from tests.published import TYPES, without

EMBED = {"model": "default", "input": "a"}
COMPARE = {"model": "default", "input": ["a", "b"]}
SEARCH = {"query": "q", "input": ["a", "b"]}


def rejection(request_type: Any, value: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(request_type, value)
    return caught.value


# --- What is published -----------------------------------------------------------------------------------------------


def test_the_response_schema_is_the_published_one_with_base64_as_an_alternative() -> None:
    published = without({"description", "example"}, TYPES["EmbeddingResponse"])
    vector = published["properties"]["data"]["items"]["properties"]["embedding"]
    published["properties"]["data"]["items"]["properties"]["embedding"] = {"oneOf": [vector, {"type": "string"}]}
    # `required` is our own addition: every field is always present.
    assert without({"description", "required"}, json_schema(EmbeddingResponse)) == published


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_published_schemas_are_valid_and_contain_no_reference(operation: Any) -> None:
    for wire_type in (operation.request, operation.response):
        schema = json_schema(wire_type)
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema["type"] == "object"
        assert "$ref" not in json.dumps(schema)


# --- What is accepted ------------------------------------------------------------------------------------------------

texts = st.text(max_size=3)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
anything = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
fields = {
    "model": texts,
    "input": texts | st.lists(texts, max_size=3),
    "input_type": st.sampled_from(["query", "passage", "Query"]),
    "encoding_format": st.sampled_from(["float", "base64", "int8"]),
    "truncate": st.sampled_from(["NONE", "START", "END", "none"]),
    "dimensions": numbers,
    "user": texts,
}
near_requests = st.fixed_dictionaries(
    {},
    optional={name: values | anything for name, values in fields.items()} | {"dimension": st.just(8)},
) | st.fixed_dictionaries(
    {"model": fields["model"], "input": fields["input"]},
    optional={name: values for name, values in fields.items() if name not in {"model", "input"}},
)


@given(near_requests)
def test_the_parser_accepts_what_the_published_schema_accepts_except_empty_texts(value: dict[str, Any]) -> None:
    strict = TYPES["EmbeddingRequest"] | {"additionalProperties": False}
    valid = jsonschema.Draft202012Validator(strict).is_valid(value)
    given_texts = value.get("input")
    if valid and given_texts and "" not in ([given_texts] if isinstance(given_texts, str) else given_texts):
        request = parse(EmbeddingRequest, value)
        assert request.model_dump(exclude_unset=True) == value
    else:
        rejection(EmbeddingRequest, value)


@pytest.mark.parametrize(
    "text", ['["a","b"]', '{"x":1}', "null", "123", "true", '"quoted"', " ", "\x00", "\N{PILE OF POO}"]
)
def test_texts_are_never_decoded_as_json(text: str) -> None:
    assert parse(EmbeddingRequest, {"model": "default", "input": text}).input == text
    assert parse(EmbeddingRequest, {"model": "default", "input": [text, text]}).input == [text, text]
    assert parse(SearchRequest, {"query": text, "input": text}).query == text


def test_an_integer_may_be_written_with_a_decimal_point() -> None:
    assert parse(EmbeddingRequest, {**EMBED, "dimensions": 3.0}).dimensions == 3
    assert parse(SearchRequest, {**SEARCH, "top_k": 2.0}).top_k == 2


# --- What is rejected, and how ---------------------------------------------------------------------------------------

TOKENS = "`input` must be text, not token ids"
REJECTED = [
    (EmbeddingRequest, {**EMBED, "input": None}, "`input` must be a string or an array of strings, not null"),
    (EmbeddingRequest, {**EMBED, "input": 3}, "`input` must be a string or an array of strings, not a number"),
    (EmbeddingRequest, {**EMBED, "input": {"a": 1}}, "`input` must be a string or an array of strings, not an object"),
    (EmbeddingRequest, {**EMBED, "input": ""}, "`input` must not be an empty string"),
    (EmbeddingRequest, {**EMBED, "input": []}, "`input` must not be an empty array: give at least one text"),
    (EmbeddingRequest, {**EMBED, "input": ["a", ""]}, "`input[1]` must not be an empty string"),
    (EmbeddingRequest, {**EMBED, "input": ["a", None]}, "`input[1]` must be a string, not null"),
    (EmbeddingRequest, {**EMBED, "input": ["a", True]}, "`input[1]` must be a string, not a boolean"),
    (EmbeddingRequest, {**EMBED, "input": ["a", ["b"]]}, "`input[1]` must be a string, not an array"),
    (EmbeddingRequest, {**EMBED, "input": "a\ud800"}, "`input` must not hold an unpaired surrogate"),
    (EmbeddingRequest, {**EMBED, "input": ["a", "\udfff"]}, "`input[1]` must not hold an unpaired surrogate"),
    (EmbeddingRequest, {**EMBED, "input": [True, False]}, "`input[0]` must be a string, not a boolean"),
    (EmbeddingRequest, {**EMBED, "input": [101, 102]}, TOKENS),
    (EmbeddingRequest, {**EMBED, "input": [[101, 102], [103]]}, TOKENS),
    (EmbeddingRequest, {**EMBED, "model": None}, "`model` must be a string, not null"),
    (EmbeddingRequest, {**EMBED, "model": 5}, "`model` must be a string, not a number"),
    (EmbeddingRequest, {**EMBED, "user": None}, "`user` must not be null: leave the field out instead"),
    (EmbeddingRequest, {**EMBED, "input_type": None}, "`input_type` must not be null: leave the field out instead"),
    (EmbeddingRequest, {**EMBED, "input_type": "Query"}, "`input_type` must be 'query' or 'passage', not 'Query'"),
    (EmbeddingRequest, {**EMBED, "truncate": 1}, "`truncate` must be 'NONE', 'START' or 'END', not a number"),
    (
        EmbeddingRequest,
        {**EMBED, "encoding_format": "int8"},
        "`encoding_format` must be 'float' or 'base64', not 'int8'",
    ),
    (EmbeddingRequest, {**EMBED, "dimensions": True}, "`dimensions` must be an integer, not a boolean"),
    (EmbeddingRequest, {**EMBED, "dimensions": "3"}, "`dimensions` must be an integer, not a string"),
    (EmbeddingRequest, {**EMBED, "dimensions": 3.5}, "`dimensions` must be an integer, not 3.5"),
    (EmbeddingRequest, {**EMBED, "dimensions": float("inf")}, "`dimensions` must be an integer, not inf"),
    (SimilarityRequest, {**COMPARE, "other": []}, "`other` must not be an empty array: give at least one text"),
    (SimilarityRequest, {**COMPARE, "other": None}, "`other` must not be null: leave the field out instead"),
    (SimilarityRequest, {**COMPARE, "other": [7]}, "`other` must be text, not token ids"),
    (SimilarityRequest, {**COMPARE, "metric": "l2"}, "`metric` must be 'cosine', 'dot' or 'euclidean', not 'l2'"),
    (SimilarityRequest, {**COMPARE, "top_k": 0}, "`top_k` must be at least 1, not 0"),
    (SearchRequest, {**SEARCH, "query": 7}, "`query` must be a string or an array of strings, not a number"),
    (SearchRequest, {**SEARCH, "query": ""}, "`query` must not be an empty string"),
    (SearchRequest, {**SEARCH, "top_k": -1.0}, "`top_k` must be at least 1, not -1"),
    (SearchRequest, {**SEARCH, "top_k": None}, "`top_k` must be an integer, not null"),
]


@pytest.mark.parametrize(("request_type", "value", "message"), REJECTED, ids=[message for _, _, message in REJECTED])
def test_an_error_names_the_field_what_was_wrong_and_what_is_accepted(
    request_type: Any, value: Any, message: str
) -> None:
    error = rejection(request_type, value)
    assert error.message.startswith(message)
    assert error.param == message.split("`")[1]


def test_the_error_for_token_ids_says_how_to_configure_the_client() -> None:
    assert (
        "OpenAIEmbeddings(check_embedding_ctx_length=False)"
        in rejection(EmbeddingRequest, {**EMBED, "input": [1]}).message
    )


def test_the_error_for_an_unknown_field_lists_the_known_ones_and_suggests_one() -> None:
    error = rejection(EmbeddingRequest, {**EMBED, "dimension": 8})
    assert error.param == "dimension"
    assert error.message == (
        "`dimension` is not a field of this request (did you mean `dimensions`?); accepted are model, input, "
        "input_type, encoding_format, truncate, dimensions, user"
    )
    assert "did you mean" not in rejection(EmbeddingRequest, {**EMBED, "zzz": 8}).message
    assert (
        rejection(ListModelsRequest, {"model": "a"}).message
        == "`model` is not a field of this request; accepted are no fields"
    )


def test_a_field_that_is_present_is_not_suggested_for_an_unknown_one() -> None:
    search = {"query": "a", "input": "b", "input_type": "query"}
    assert "did you mean" not in rejection(SearchRequest, search).message


def test_surplus_unknown_fields_are_only_counted() -> None:
    request = {**EMBED, "truncate": "end"} | {f"field {number}": 1 for number in range(10_000)}
    tracemalloc.start()
    try:
        message = rejection(EmbeddingRequest, request).message
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "not 'end'; `field 0` is not a field of this request; " in message
    assert "; `field 3` is not a field of this request; and 9996 more; accepted are model" in message
    assert peak < 300 * 10_000


def test_the_known_fields_are_listed_once_for_any_number_of_unknown_ones() -> None:
    message = rejection(SearchRequest, {"queries": "a", "inputs": "b", "limit": 3}).message
    assert "`queries` is not a field of this request (did you mean `query`?); `inputs` is not" in message
    assert message.count("top_k") == 1
    assert message.endswith(
        "; `limit` is not a field of this request; accepted are " + ", ".join(SearchRequest.model_fields)
    )


def test_a_missing_field_is_explained() -> None:
    error = rejection(EmbeddingRequest, {})
    assert error.param == "model"
    assert error.message.startswith("`model` is required: Model id, e.g. `sentence-transformers/all-MiniLM-L6-v2`")
    assert error.message.endswith("; `input` is required: The text to embed, or an array of texts")


def test_all_problems_are_reported_in_one_message() -> None:
    error = rejection(SearchRequest, {"input": "", "truncate": 3, "top_k": "x", "text": "a"})
    assert error.param == "query"
    problems = ["`query` is", "`input` must", "`top_k` must", "`truncate` must", "`text` is"]
    assert sorted(problems, key=error.message.index) == problems


@pytest.mark.parametrize(
    ("value", "kind"), [([], "an array"), ("a", "a string"), (None, "null"), (3, "a number"), (True, "a boolean")]
)
def test_a_request_must_be_an_object(value: Any, kind: str) -> None:
    error = rejection(EmbeddingRequest, value)
    assert (error.message, error.param) == (f"the request must be a JSON object, not {kind}", None)


@pytest.mark.parametrize(
    "value",
    [
        {**EMBED, "x" * 10_000: 1},
        {**EMBED, "truncate": "x" * 10_000},
        {**EMBED, "input": ["x" * 10_000, 3]},
        {**EMBED, "dimensions": "9" * 10_000},
        {**EMBED, "dimensions": {"x" * 10_000: 1}},
        {**EMBED, **{f"{number}{'x' * 100}": 1 for number in range(1000)}},
    ],
    ids=["name", "choice", "neighbor", "number", "object", "many"],
)
def test_long_values_from_the_caller_are_never_quoted_in_full(value: Any) -> None:
    error = rejection(EmbeddingRequest, value)
    assert len(error.message) < 1500
    assert "x" * 41 not in error.message
    assert "9" * 41 not in error.message
    assert len(error.param or "") <= 40


def test_a_long_number_is_truncated() -> None:
    assert len(rejection(SearchRequest, {**SEARCH, "top_k": -(10**4000)}).message) < 100


@given(
    operation=st.sampled_from(OPERATIONS),
    value=anything | st.dictionaries(st.sampled_from([*fields, "query"]), anything),
)
def test_no_json_value_crashes_the_parser(operation: Any, value: Any) -> None:
    try:
        parse(operation.request, value)
    except InvalidRequest as error:
        assert len(error.message.encode()) < 2500  # noqa: PT017 - both parsing and this error are valid outcomes


# --- What is written -------------------------------------------------------------------------------------------------


@given(hnp.arrays(np.float32, st.integers(0, 8), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_every_float32_survives_json_bit_for_bit(vector: Any) -> None:
    written = dump_json({"embedding": vector})
    read = np.array(orjson.loads(written)["embedding"], dtype=np.float32)
    assert read.tobytes() == vector.tobytes()
    assert json.loads(written) == orjson.loads(written)


def test_numbers_are_written_in_their_shortest_exact_form() -> None:
    assert (
        dump_json(np.array([0.1, 0.1234567, -1.0, 1e-8, 16777216.0], np.float32))
        == b"[0.1,0.1234567,-1.0,1e-8,16777216.0]"
    )

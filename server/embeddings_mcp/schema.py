"""The wire types: the single source of every published schema.

`EmbeddingRequest` and `EmbeddingResponse` mirror the NVIDIA NIM embeddings API (its OpenAPI document of 2026-05-25,
``POST /v1/embeddings``) field for field. Validation is as strict as the published schema: no unknown field, no null for
an optional one, no number where a string is expected. `serialization.parse` turns validation failures into one
actionable message, and `publish.schemas.json_schema` publishes a type in the style of the OpenAPI document.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, with_config
from pydantic_core import PydanticCustomError
from typing_extensions import NotRequired, TypedDict  # noqa: UP035 - pydantic accepts typing.TypedDict only on Python 3.12+

from embeddings_mcp.models import DEFAULT_MODEL, InputType, InputTypeUse, Mode, Truncate
from embeddings_mcp.vectors import EmbeddingType, Metric

EncodingFormat = Literal["float", "base64"]

# --- Values ----------------------------------------------------------------------------------------------------------


def _reject_null(value: object) -> object:
    if value is None:
        raise PydanticCustomError("null", "must not be null: leave the field out instead")
    return value


def _integral_float_to_int(value: object) -> object:
    """Convert 3.0 to 3: JSON Schema counts it as an integer, pydantic's strict mode does not."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_text(value: object, at: str = "") -> None:
    if not isinstance(value, str):
        raise PydanticCustomError("text", "must be a string, not {kind}", {"at": at, "kind": json_kind(value)})
    if not value:
        raise PydanticCustomError("empty", "must not be an empty string", {"at": at})
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            # JSON can escape one half of a surrogate pair, which no tokenizer accepts and UTF-8 cannot encode.
            raise PydanticCustomError("surrogate", "must not hold an unpaired surrogate", {"at": at}) from None


def _check_texts(value: object) -> object:
    """Validate by hand: pydantic would report an error for every failed branch of the union."""
    if not isinstance(value, list):
        if isinstance(value, str):
            _check_text(value)
            return value
        raise PydanticCustomError(
            "texts", "must be a string or an array of strings, not {kind}", {"kind": json_kind(value)}
        )
    if not value:
        raise PydanticCustomError("empty", "must not be an empty array: give at least one text")
    if _is_token_array(value) or _is_token_array(value[0]):
        raise PydanticCustomError(
            "tokens",
            "must be text, not token ids, which are specific to one tokenizer; configure the client not to tokenize "
            "(langchain-openai: OpenAIEmbeddings(check_embedding_ctx_length=False))",
        )
    for index, text in enumerate(value):
        _check_text(text, at=f"[{index}]")
    return value


def _check_modality(value: object) -> object:
    if not value or any(kind != "text" for kind in (value if isinstance(value, list) else [value])):
        raise PydanticCustomError("modality", "must be 'text' or an array of 'text': only texts are embedded here")
    return value


def _is_token_array(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def json_kind(value: object) -> str:
    """Return the JSON name of a value's type, with its article."""
    kinds: dict[type, str] = {bool: "a boolean", str: "a string", list: "an array", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), "a number")


_Value = TypeVar("_Value")
Optional = Annotated[_Value | None, BeforeValidator(_reject_null)]
"""A field that may be omitted but, if present, must not be null."""

Integer = Annotated[int, BeforeValidator(_integral_float_to_int)]
Texts = Annotated[str | list[str], BeforeValidator(_check_texts)]
IntegerVector = Annotated[npt.NDArray[np.int64], WithJsonSchema({"type": "array", "items": {"type": "integer"}})]
FloatRows = Annotated[
    npt.NDArray[np.float32],
    WithJsonSchema({"type": "array", "items": {"type": "array", "items": {"type": "number"}}}),
]
FloatVector = Annotated[npt.NDArray[np.float32], WithJsonSchema({"type": "array", "items": {"type": "number"}})]

# --- Shared request fields -------------------------------------------------------------------------------------------

ModelField = Annotated[
    str,
    Field(
        description=f"Model id, e.g. `{DEFAULT_MODEL}`, `nvidia/nv-embedqa-e5-v5`, `baai/bge-m3`; "
        "`default` is the server's default model."
    ),
]
InputTypeField = Annotated[
    Optional[InputType],
    Field(
        description="What the texts are for: `query` for questions and search terms, `passage` for documents to "
        "search. Asymmetric models (E5, NV-Embed, Nemotron) need it, symmetric ones ignore it."
    ),
]
TruncateField = Annotated[
    Truncate,
    Field(
        description="For a text over the model's limit: `NONE` rejects it, `START` drops its beginning, `END` its end."
    ),
]
DimensionsField = Annotated[
    Optional[Integer],
    Field(description="Length of the vectors, on models that allow shorter ones (Matryoshka models)."),
]
UserField = Annotated[Optional[str], Field(description="A label for the end user; it does not affect the response.")]
ModeField = Annotated[
    Mode,
    Field(
        description="What to compare: `dense` vectors; or, on models that have them (BGE-M3), `sparse` lexical "
        "weights, `colbert` token vectors, or all three as `hybrid`."
    ),
]
TopKField = Annotated[int, Field(ge=1), BeforeValidator(_integral_float_to_int)]

# --- Requests --------------------------------------------------------------------------------------------------------


class EmbeddingRequest(BaseModel):
    """A request for the vectors of one or more texts."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: ModelField
    input: Annotated[Texts, Field(description="The text to embed, or an array of texts.")]
    input_type: InputTypeField = None
    encoding_format: Annotated[
        EncodingFormat,
        Field(
            description="`float`: arrays of numbers. `base64`: little-endian float32 bytes, less than half the size."
        ),
    ] = "float"
    truncate: TruncateField = "NONE"
    dimensions: DimensionsField = None
    user: UserField = None


class TypedEmbeddingRequest(EmbeddingRequest):
    """The REST request: `EmbeddingRequest` with the fields that NIM 2.x added."""

    embedding_type: Annotated[
        EmbeddingType,
        Field(
            description="Number format of a vector: `float`, one byte per component (`int8`, `uint8`), or one bit "
            "(`binary`, `ubinary`, packed into signed or unsigned bytes). `base64` encodes those bytes: OpenAI's "
            "clients request it by default and decode it as float32, so with any other type they must set "
            "`encoding_format` to `float`."
        ),
    ] = "float"
    modality: Annotated[
        Optional[Literal["text"] | list[Literal["text"]]],
        BeforeValidator(_check_modality),
        Field(description="Modality of all inputs or, as an array, of each; only `text` is supported."),
    ] = None


class SparseEmbeddingRequest(BaseModel):
    """A request for the lexical weights of texts, on models that have them (BGE-M3)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: ModelField
    input: Annotated[Texts, Field(description="The text to embed, or an array of texts.")]
    input_type: InputTypeField = None
    truncate: TruncateField = "NONE"
    user: UserField = None


class ColbertEmbeddingRequest(SparseEmbeddingRequest):
    """A request for a vector for every token of texts, on models that have them (BGE-M3)."""

    encoding_format: Annotated[
        EncodingFormat,
        Field(description="`float`: arrays of numbers. `base64`: little-endian float32 bytes, row by row."),
    ] = "float"


class SimilarityRequest(BaseModel):
    """A request for similarity scores between texts."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: ModelField
    input: Annotated[Texts, Field(description="The text to compare, or an array of texts.")]
    other: Annotated[
        Optional[Texts],
        Field(
            description="Compare every `input` with each of these; if omitted, the texts of the array `input` with "
            "each other."
        ),
    ] = None
    metric: Annotated[
        Metric,
        Field(
            description="`cosine` (-1 to 1, higher is closer), `dot` (higher is closer) or `euclidean` "
            "(a distance, lower is closer); all but `cosine` in mode `dense` only."
        ),
    ] = "cosine"
    mode: ModeField = "dense"
    top_k: Annotated[
        Optional[TopKField],
        Field(description="Return only this many closest pairs, best first, instead of the full matrix."),
    ] = None
    input_type: InputTypeField = None
    truncate: TruncateField = "NONE"
    dimensions: DimensionsField = None
    user: UserField = None


class SearchRequest(BaseModel):
    """A request to rank passages by how well they answer a query."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    query: Annotated[
        Texts,
        Field(
            description="The question or search terms, embedded as a query; or an array of several wordings of it: "
            "each passage is scored by its closest one."
        ),
    ]
    input: Annotated[Texts, Field(description="The passages to rank; embedded as passages.")]
    top_k: Annotated[TopKField, Field(description="Return at most this many passages, best first.")] = 10
    mode: ModeField = "dense"
    model: ModelField = "default"
    truncate: TruncateField = "NONE"
    dimensions: DimensionsField = None
    user: UserField = None


class ListModelsRequest(BaseModel):
    """A request for the list of served models."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


# --- The texts of a request ------------------------------------------------------------------------------------------

_TEXT_FIELDS = ("query", "input", "other")


def texts_of(request: BaseModel) -> dict[str, str | list[str]]:
    """Return the texts to embed by field name, in the order in which they are embedded."""
    # `getattr` of a field that a pydantic model does not have takes as long as counting the texts of a large request.
    values = vars(request)
    return {name: texts for name in _TEXT_FIELDS if (texts := values.get(name)) is not None}


def count_texts(texts: str | list[str]) -> int:
    """Return the number of texts in a field."""
    return 1 if isinstance(texts, str) else len(texts)


def total_texts(request: BaseModel) -> int:
    """Return the number of texts to embed, in all fields together."""
    return sum(map(count_texts, texts_of(request).values()))


# --- Responses -------------------------------------------------------------------------------------------------------
# Plain dictionaries: vectors are serialized directly from numpy, without a pydantic model (see `dump_json`).


class Usage(TypedDict):
    """Token usage of the request, as counted by the model."""

    prompt_tokens: int
    total_tokens: int


@with_config(arbitrary_types_allowed=True)
class Embedding(TypedDict):
    """One vector of a response."""

    object: str
    index: Annotated[int, Field(description="Index of the text in `input`.")]
    embedding: Annotated[
        FloatVector | str, Field(description="Array of numbers, or base64 of little-endian float32 bytes.")
    ]


class EmbeddingResponse(TypedDict):
    """The vectors of the texts, in input order."""

    object: str
    data: list[Embedding]
    model: str
    usage: Usage


@with_config(arbitrary_types_allowed=True)
class SparseEmbedding(TypedDict):
    """The lexical weights of one text; tokens that are not listed have weight 0."""

    object: str
    index: Annotated[int, Field(description="Index of the text in `input`.")]
    token_ids: Annotated[IntegerVector, Field(description="Ids in the model's vocabulary, ascending.")]
    weights: Annotated[FloatVector, Field(description="Weight of each token, above 0.")]


class SparseEmbeddingResponse(TypedDict):
    """The lexical weights of the texts, in input order."""

    object: str
    data: list[SparseEmbedding]
    model: str
    usage: Usage


@with_config(arbitrary_types_allowed=True)
class ColbertEmbedding(TypedDict):
    """The token vectors of one text, excluding the first, special token."""

    object: str
    index: Annotated[int, Field(description="Index of the text in `input`.")]
    shape: Annotated[list[int], Field(description="Number of token vectors, and their length.")]
    embedding: Annotated[
        FloatRows | str, Field(description="Array of vectors, or base64 of little-endian float32 bytes row by row.")
    ]


class ColbertEmbeddingResponse(TypedDict):
    """The token vectors of the texts, in input order."""

    object: str
    data: list[ColbertEmbedding]
    model: str
    usage: Usage


class SimilarPair(TypedDict):
    """A pair of texts and its score."""

    input: Annotated[int, Field(description="Index in `input`.")]
    other: Annotated[int, Field(description="Index in `other`, or in `input` if `other` was omitted.")]
    score: float


class SimilarityResponse(TypedDict):
    """Similarity scores: the full matrix or, with `top_k`, the closest pairs."""

    model: str
    metric: NotRequired[Annotated[Metric, Field(description="Only in mode `dense`.")]]
    scores: NotRequired[
        Annotated[
            list[list[float]],
            Field(description="One row per `input`, one column per `other`; absent with `top_k`."),
        ]
    ]
    pairs: NotRequired[Annotated[list[SimilarPair], Field(description="Closest first; only with `top_k`.")]]
    usage: Usage


class SearchHit(TypedDict):
    """A passage and its score."""

    index: Annotated[int, Field(description="Index of the passage in `input`.")]
    score: Annotated[float, Field(description="Closeness to the query, higher is closer; in mode `dense` the cosine.")]


class SearchResponse(TypedDict):
    """The passages that best answer the query, best first."""

    model: str
    results: list[SearchHit]
    usage: Usage


class ModelEntry(TypedDict):
    """A served model; unknown properties are omitted."""

    id: str
    aliases: list[str]
    default: Annotated[bool, Field(description="Whether `default` names this model.")]
    dimensions: NotRequired[
        Annotated[int, Field(description="Length of a vector; unknown for a hub model until it is first loaded.")]
    ]
    allowed_dimensions: Annotated[
        list[int], Field(description="Shorter lengths that `dimensions` accepts; empty if there are none.")
    ]
    max_tokens: NotRequired[
        Annotated[int, Field(description="Longest text in tokens, including special tokens and prompt.")]
    ]
    input_type: Annotated[InputTypeUse, Field(description="Whether `input_type` is required, optional or ignored.")]
    modes: Annotated[list[Mode], Field(description="Accepted values of `mode` in similarity and search.")]
    served_from: Annotated[str, Field(description="`local`, or the URL of the endpoint that computes the vectors.")]
    license: NotRequired[Annotated[str, Field(description="The license of the weights.")]]
    hosted_until: NotRequired[
        Annotated[str, Field(description="Day on which NVIDIA's hosted endpoint stopped, or will stop, serving it.")]
    ]


class ModelsResponse(TypedDict):
    """The served models."""

    models: list[ModelEntry]


# --- REST only -------------------------------------------------------------------------------------------------------

NullableString = Annotated[str | None, WithJsonSchema({"type": ["string", "null"]})]


class ErrorDetail(TypedDict):
    """What went wrong."""

    message: Annotated[str, Field(description="What was wrong, what is accepted, what to do next.")]
    type: str
    param: Annotated[NullableString, Field(description="The field at fault, e.g. `input[3]`.")]
    code: str


class ErrorResponse(TypedDict):
    """An error."""

    error: ErrorDetail


class ModelObject(ModelEntry):
    """A model in OpenAI's format, with the additional fields of `ModelEntry`."""

    object: str
    created: Annotated[int, Field(description="Unix time at which this server started to serve it.")]
    owned_by: Annotated[str, Field(description="The part of the id before the slash.")]


class ModelList(TypedDict):
    """The served models."""

    object: str
    data: list[ModelObject]


class HealthResponse(TypedDict):
    """Liveness or readiness of the server."""

    object: str
    message: str
    live: NotRequired[bool]
    ready: NotRequired[bool]

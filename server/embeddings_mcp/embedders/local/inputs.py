"""From texts to what a model reads: rows of token ids, with the prompt of the input type, checked. Without torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import add

from embeddings_mcp.embedders.local.checkpoint import Checkpoint
from embeddings_mcp.embedders.local.tokenizer_files import read_tokenizer
from embeddings_mcp.errors import CheckpointInvalid, InputUnusable
from embeddings_mcp.models import InputType, ModelCard, Truncate

Row = Sequence[int]
"""Token ids of a text."""

_AT_ONCE = 256
"""Texts that are tokenized together: enough for all cores, little memory for what is made of a token besides its id,
which is some hundred bytes, and not long to wait for where the model could compute meanwhile."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Some texts, tokenized.

    Attributes:
        rows: token ids of each text.
        skip: how many tokens at each start belong to a prompt that is not pooled.
    """

    rows: list[list[int]]
    skip: int

    @property
    def counts(self) -> list[int]:
        """Tokens of each text."""
        return [len(row) for row in self.rows]


class InputTokenizer:
    """Makes tokens of texts as one model wants them.

    Args:
        checkpoint: the model.
        card: what it takes.
        vocabulary: tokens that it has vectors for.

    Raises:
        CheckpointInvalid: its tokenizer is missing, or cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint, card: ModelCard, *, vocabulary: int) -> None:
        recipe = checkpoint.recipe
        self._checkpoint = checkpoint
        self._card = card
        self._vocabulary = vocabulary
        self._tokenizer = read_tokenizer(
            checkpoint.pipeline.backbone,
            max_tokens=card.max_tokens or checkpoint.max_tokens,
            lowercase=checkpoint.lowercase,
            special_tokens=not checkpoint.pipeline.static,
            suffix=recipe.suffix(checkpoint.config) if recipe else "",
        )

    def tokenize(self, texts: Sequence[str], *, input_type: InputType | None, truncate: Truncate) -> Iterator[Tokens]:
        """Token ids, with the prompt of this input type: of some texts after the other, in their order.

        The first are there long before the last, so that the model can compute meanwhile. Whoever takes the next is
        told what is wrong with it:

        Raises:
            InputTooLong: a text is too long and `truncate` is NONE.
            InputUnusable: nothing of a text is left to pool.
            CheckpointInvalid: the tokenizer gives a token that the model does not know.
        """
        prompt = self._card.prompt(input_type)
        skip = self._unpooled(prompt)
        for start in range(0, len(texts), _AT_ONCE):
            try:
                rows = self._tokenizer.encode(texts[start : start + _AT_ONCE], prompt=prompt, truncate=truncate)
            except InputUnusable as error:
                raise error.about(partial(add, start)) from None
            self._check(rows, skip, start)
            yield Tokens(rows, skip)

    def ids_of(self, *tokens: str) -> Collection[int]:
        """The ids of these tokens, of those that there are."""
        return self._tokenizer.ids_of(*tokens)

    def _check(self, rows: Sequence[Row], skip: int, start: int) -> None:
        """See to it that the model can read these rows, of the texts from `start` on.

        Raises:
            InputUnusable: one is nothing but a prompt that is not pooled.
            CheckpointInvalid: one has a token that the model does not know.
        """
        for index, row in enumerate(rows, start):
            if len(row) <= skip:
                raise InputUnusable(f"has no tokens of its own behind the prompt of {skip} tokens", index=index)
            if max(row) >= self._vocabulary:  # on a GPU, to look it up would be the end of the process
                raise CheckpointInvalid(
                    f"{self._checkpoint.folder}: the tokenizer makes token {max(row)} of text {index}, and the model "
                    f"has only {self._vocabulary}: they do not belong together"
                )

    def _unpooled(self, prompt: str) -> int:
        """How many tokens at a text's start are not pooled."""
        recipe = self._checkpoint.recipe
        pooled = 0 if recipe is None else recipe.pooled_of_prompt
        if not prompt or (self._checkpoint.pipeline.pool_prompt and not pooled):
            return 0
        return self._tokenizer.prompt_length(prompt) - (pooled or 0)

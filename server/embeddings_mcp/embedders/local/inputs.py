"""Convert texts to model inputs: validated rows of token ids, with the prompt of the input type. Does not use torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from embeddings_mcp.embedders.local.checkpoint import Checkpoint
from embeddings_mcp.embedders.local.tokenizer_files import read_tokenizer
from embeddings_mcp.errors import CheckpointInvalid, InputUnusable
from embeddings_mcp.models import InputType, ModelCard, Truncate

Row = Sequence[int]
"""Token ids of a text."""

_BATCH_SIZE = 256
"""Texts that are tokenized in one batch: enough to use all cores, yet few enough to bound the memory for encodings
(some hundred bytes per token besides its id) and the delay until the model can start to compute."""


@dataclass(frozen=True, slots=True)
class TokenizedBatch:
    """A batch of tokenized texts.

    Attributes:
        rows: token ids of each text.
        skip: how many tokens at the start of each row belong to a prompt that is not pooled.
    """

    rows: list[list[int]]
    skip: int

    @property
    def counts(self) -> list[int]:
        """Number of tokens of each text."""
        return [len(row) for row in self.rows]


class InputTokenizer:
    """Tokenizes texts for one model.

    Args:
        checkpoint: the model's checkpoint.
        card: the model's card, with its limit and prompts.
        vocabulary_size: number of tokens for which the model has an embedding.

    Raises:
        CheckpointInvalid: the checkpoint's tokenizer is missing, or cannot be read.
        MissingDependency: the tokenizer needs a package that is not installed.
    """

    def __init__(self, checkpoint: Checkpoint, card: ModelCard, *, vocabulary_size: int) -> None:
        recipe = checkpoint.recipe
        self._checkpoint = checkpoint
        self._card = card
        self._vocabulary_size = vocabulary_size
        self._tokenizer = read_tokenizer(
            checkpoint.pipeline.backbone,
            max_tokens=card.max_tokens or checkpoint.max_tokens,
            lowercase=checkpoint.lowercase,
            suffix=recipe.suffix(checkpoint.config) if recipe else "",
            static=checkpoint.pipeline.static,
        )

    def tokenize(
        self, texts: Sequence[str], *, input_type: InputType | None, truncate: Truncate
    ) -> Iterator[TokenizedBatch]:
        """Tokenize texts with the prompt of this input type; yield consecutive batches, in the order of the texts.

        The model can compute the first batches while later ones are tokenized. Errors are raised when the batch in
        question is requested:

        Raises:
            InputTooLong: a text is too long and `truncate` is NONE.
            InputUnusable: a text has no tokens left to pool.
            CheckpointInvalid: the tokenizer gives a token for which the model has no embedding.
            InvalidRequest: prompt and special tokens leave no room for text within the model's limit.
        """
        prompt = self._card.prompt(input_type)
        skip = self._unpooled_tokens(prompt)
        for start in range(0, len(texts), _BATCH_SIZE):
            try:
                rows = self._tokenizer.encode(texts[start : start + _BATCH_SIZE], prompt=prompt, truncate=truncate)
            except InputUnusable as error:
                raise error.reindexed(lambda index: [start + index]) from None  # noqa: B023 - called here and now
            self._check_rows(rows, skip, start)
            yield TokenizedBatch(rows, skip)

    def token_ids(self, *tokens: str) -> Collection[int]:
        """Return the ids of these tokens; tokens that are not in the vocabulary are skipped."""
        return self._tokenizer.token_ids(*tokens)

    def _check_rows(self, rows: Sequence[Row], skip: int, start: int) -> None:
        """Check that the model can process these rows, the first of which is text number `start`.

        Raises:
            InputUnusable: a row consists of nothing but an unpooled prompt.
            CheckpointInvalid: a row has a token for which the model has no embedding.
        """
        for index, row in enumerate(rows, start):
            if len(row) <= skip:
                raise InputUnusable(f"has no tokens of its own after the prompt of {skip} tokens", index=index)
            if max(row) >= self._vocabulary_size:  # on a GPU, an out-of-range lookup would end the process
                raise CheckpointInvalid(
                    f"{self._checkpoint.folder}: the tokenizer makes token {max(row)} of text {index}, but the model "
                    f"has embeddings for only {self._vocabulary_size} tokens: they do not belong together"
                )

    def _unpooled_tokens(self, prompt: str) -> int:
        """Return how many tokens at the start of a text are not pooled."""
        recipe = self._checkpoint.recipe
        pooled = recipe.pooled_prompt_tokens if recipe else None
        if not prompt or (self._checkpoint.pipeline.pool_prompt and not pooled):
            return 0
        return self._tokenizer.prompt_length(prompt) - (pooled or 0)

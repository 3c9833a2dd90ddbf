"""Convert texts to token ids: prepend the prompt, and truncate to the model's maximum length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer as FastTokenizer

from embeddings_mcp.embedders.local.python_tokenizer import PythonTokenizer
from embeddings_mcp.errors import CheckpointInvalid, InputTooLong, InputUnusable, InvalidRequest
from embeddings_mcp.models import Truncate

_CHARACTERS_PER_TOKEN = 16
"""A text with more characters than this per token of the model's limit is first tokenized as an excerpt from one end.
English has about 4. A text with more characters per token is still tokenized correctly, but takes a second pass."""

_MARGIN = 64
"""Tokens at the cut edge of an excerpt that are not trusted, since the cut may have split a token."""

_MAX_COUNTED_CHARACTERS = 1 << 20
"""A text of up to this many characters is counted to its end before it is rejected, and is truncated as if it had been
tokenized as a whole. In a longer text without any word boundary, such as a run of one letter, an excerpt may begin with
half a token. Python tokenizers take time quadratic in the length of a word, and are given no more than the excerpt."""

_CHARACTERS_PER_BATCH = 1 << 20
"""Characters of several texts that are tokenized in one batch: besides its id, the tokenizers library holds some
hundred bytes per token until the whole batch is done."""

_UNBATCHED_CHARACTERS = 2048
"""A single text of up to this many characters is tokenized without releasing the GIL: this takes less time than to
reacquire it from threads that compute."""


class Tokenizer:
    """A model's tokenizer.

    Args:
        tokenizer: splits a text into tokens; must neither truncate nor pad.
        max_tokens: length of the longest text, special tokens and prompt included.
        suffix: appended to every text; truncation at the end removes it like the text.
    """

    def __init__(self, tokenizer: FastTokenizer | PythonTokenizer, *, max_tokens: int, suffix: str = "") -> None:
        self._tokenizer = tokenizer
        self._max_counted_characters = 0 if isinstance(tokenizer, PythonTokenizer) else _MAX_COUNTED_CHARACTERS
        self._suffix = suffix
        self.max_tokens = max_tokens
        special_tokens_mask = tokenizer.encode("a").special_tokens_mask
        self._leading_specials = special_tokens_mask.index(0)
        self._trailing_specials = special_tokens_mask[::-1].index(0)

    def encode(self, texts: Sequence[str], *, prompt: str, truncate: Truncate) -> list[list[int]]:
        """Return the token ids of each text, prompt and special tokens included, at most `max_tokens` of them.

        `truncate` END drops the end of a text, START its beginning; prompt and special tokens stay. A text much longer
        than the limit costs about as much as the part that is kept.

        Raises:
            CheckpointInvalid: the tokenizer cannot encode a text, for example because its unknown token is missing.
            InputTooLong: texts are too long and `truncate` is NONE.
            InputUnusable: the tokenizer makes no tokens of a text.
            InvalidRequest: prompt and special tokens leave no room for text within the limit.
        """
        if self._suffix:
            texts = [text + self._suffix for text in texts]
        first_length = _CHARACTERS_PER_TOKEN * self.max_tokens
        if truncate == "NONE":
            first_length = max(first_length, self._max_counted_characters)
        rows: list[list[int]] = []
        too_long: dict[int, int | None] = {}
        first_passes = self._encode_excerpts(texts, first_length, prompt, truncate)
        for index, (text, first_ids) in enumerate(zip(texts, first_passes, strict=True)):
            ids, excerpt_length = first_ids, first_length
            while excerpt_length < len(text) and not self._is_reliable(ids, text, excerpt_length, prompt, truncate):
                excerpt_length *= 8
                (ids,) = self._encode_excerpts([text], excerpt_length, prompt, truncate)
            if len(ids) > self.max_tokens:
                if truncate == "NONE":
                    too_long[index] = len(ids) if excerpt_length >= len(text) else None
                    continue
                ids = self._truncate(ids, prompt, truncate)
            if not ids:
                raise InputUnusable("holds nothing that the model's tokenizer keeps", index=index)
            rows.append(ids)
        if too_long:
            index, *others = too_long
            raise InputTooLong(index=index, tokens=too_long[index], max_tokens=self.max_tokens, others=others)
        return rows

    def _encode_excerpts(
        self, texts: Sequence[str], excerpt_length: int, prompt: str, truncate: Truncate
    ) -> Iterator[list[int]]:
        """Encode the prompt and up to `excerpt_length` characters of each text, from the end that `truncate` keeps."""
        excerpts = [
            prompt + (text[-excerpt_length:] if truncate == "START" else text[:excerpt_length]) for text in texts
        ]
        try:
            if len(excerpts) == 1 and len(excerpts[0]) <= _UNBATCHED_CHARACTERS:
                yield self._tokenizer.encode(excerpts[0]).ids
                return
            for batch in _batches(excerpts):
                yield from [encoding.ids for encoding in self._tokenizer.encode_batch_fast(batch)]
        except Exception as error:
            if type(error) is not Exception:  # the tokenizers library raises plain Exception for a faulty vocabulary
                raise
            raise CheckpointInvalid(f"the model's tokenizer has no tokens for a text: {error}") from error

    def _is_reliable(self, ids: list[int], text: str, excerpt_length: int, prompt: str, truncate: Truncate) -> bool:
        """Return whether the tokens to be kept are those of the whole text, whatever the position of the cut.

        This is assumed if an excerpt that is one character shorter gives the same tokens; for a run of one letter, it
        does not.
        """
        if len(ids) < self.max_tokens + _MARGIN:
            return False
        if truncate == "NONE" or excerpt_length >= self._max_counted_characters:
            return True
        (other_ids,) = self._encode_excerpts([text], excerpt_length - 1, prompt, truncate)
        kept = slice(-self.max_tokens, None) if truncate == "START" else slice(self.max_tokens)
        return ids[kept] == other_ids[kept]

    def token_ids(self, *tokens: str) -> set[int]:
        """Return the ids of these tokens; tokens that are not in the vocabulary are skipped."""
        return {token_id for token in tokens if (token_id := self._tokenizer.token_to_id(token)) is not None}

    def prompt_length(self, prompt: str) -> int:
        """Return how many tokens at the start of a text belong to the prompt or are special tokens.

        The prompt's last token may merge with the text's first one, and is then not counted.
        """
        if not prompt:
            return 0
        return len(self._tokenizer.encode(prompt).ids) - self._trailing_specials

    def _truncate(self, ids: list[int], prompt: str, truncate: Truncate) -> list[int]:
        """Drop the excess tokens, from the text's end or from its start."""
        end = len(ids) - self._trailing_specials
        head, tail = ids[: self._leading_specials + self._prompt_prefix_length(ids, prompt)], ids[end:]
        max_text_tokens = self.max_tokens - len(head) - len(tail)
        if max_text_tokens < 1:
            raise InvalidRequest(
                f"the limit of {self.max_tokens} tokens leaves no room for text after the prompt and special tokens, "
                f"which take {len(head) + len(tail)}"
            )
        text_ids = ids[len(head) : end]
        return head + (text_ids[:max_text_tokens] if truncate == "END" else text_ids[-max_text_tokens:]) + tail

    def _prompt_prefix_length(self, ids: list[int], prompt: str) -> int:
        """Return how many tokens after the leading special ones belong to the prompt alone."""
        prompt_ids = self._tokenizer.encode(prompt, add_special_tokens=False).ids if prompt else []
        pairs = zip(prompt_ids, ids[self._leading_specials :], strict=False)
        return next((count for count, (expected, actual) in enumerate(pairs) if expected != actual), len(prompt_ids))


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Split texts into consecutive batches of at most `_CHARACTERS_PER_BATCH` characters, or of one text."""
    start = characters = 0
    for index, text in enumerate(texts):
        characters += len(text)
        if characters > _CHARACTERS_PER_BATCH and index > start:
            yield texts[start:index]
            start, characters = index, len(text)
    yield texts[start:]

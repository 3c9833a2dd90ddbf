"""Texts to token ids, with the prompt before them, and cut to the model's length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer as FastTokenizer

from embeddings_mcp.embedders.local.python_tokenizer import PythonTokenizer
from embeddings_mcp.errors import CheckpointInvalid, InputTooLong, InputUnusable, InvalidRequest
from embeddings_mcp.models import Truncate

_CHARACTERS_PER_TOKEN = 16
"""Of a text with more characters than this for each token that the model takes, only one end is tokenized at first.
English has about 4; text that has more still comes out right, at the cost of a second look."""

_MARGIN = 64
"""Tokens at the edge of such an excerpt that are not believed, since the cut may have parted what belongs together."""

_COUNTED = 1 << 20
"""A text of up to so many characters is counted to its end before it is refused, and cut as if all of it had been
tokenized. In a longer one without any boundary, a run of one letter, an excerpt may begin with half a token. Tokenizers
in Python, which take the square of a word's length, are not asked for more than the excerpt."""

_AT_ONCE = 1 << 20
"""Characters of several texts that are tokenized together: of a token the tokenizer holds some hundred bytes, besides
its id, until all of these texts are done."""

_SHORT = 2048
"""Characters up to which a single text is tokenized without letting go of the interpreter lock: that takes less than to
get it back from threads that compute."""


class Tokenizer:
    """A model's tokenizer.

    Args:
        tokenizer: makes tokens of a text; never cuts, and never pads.
        max_tokens: longest text, special tokens and prompt included.
        suffix: what is put behind every text; truncation at the end drops it like the text.
    """

    def __init__(self, tokenizer: FastTokenizer | PythonTokenizer, *, max_tokens: int, suffix: str = "") -> None:
        self._tokenizer = tokenizer
        self._counted = 0 if isinstance(tokenizer, PythonTokenizer) else _COUNTED
        self._suffix = suffix
        self.max_tokens = max_tokens
        added = tokenizer.encode("a").special_tokens_mask
        self._before, self._after = added.index(0), added[::-1].index(0)

    def encode(self, texts: Sequence[str], *, prompt: str, truncate: Truncate) -> list[list[int]]:
        """The token ids of each text, prompt and special tokens included, never more than the model takes.

        `truncate` END drops the end of a text, START its beginning; prompt and special tokens stay. A text much longer
        than the model takes costs about as much as the part that is kept.

        Raises:
            CheckpointInvalid: what the tokenizer would put in the place of an unknown word, say, is missing.
            InputTooLong: texts are too long and `truncate` is NONE.
            InputUnusable: the tokenizer leaves nothing of a text.
            InvalidRequest: the model's limit behind the prompt leaves nothing of any text.
        """
        if self._suffix:
            texts = [text + self._suffix for text in texts]
        reach = _CHARACTERS_PER_TOKEN * self.max_tokens
        if truncate == "NONE":
            reach = max(reach, self._counted)
        rows: list[list[int]] = []
        too_long: dict[int, int | None] = {}
        for index, (text, first) in enumerate(zip(texts, self._look(texts, reach, prompt, truncate), strict=True)):
            ids, seen = first, reach
            while seen < len(text) and not self._settled(ids, text, seen, prompt, truncate):
                seen *= 8
                (ids,) = self._look([text], seen, prompt, truncate)
            if len(ids) > self.max_tokens:
                if truncate == "NONE":
                    too_long[index] = len(ids) if seen >= len(text) else None
                    continue
                ids = self._cut(ids, prompt, truncate)
            if not ids:
                raise InputUnusable("holds nothing that the model's tokenizer keeps", index=index)
            rows.append(ids)
        if too_long:
            index, *others = too_long
            raise InputTooLong(index=index, tokens=too_long[index], allowed=self.max_tokens, others=others)
        return rows

    def _look(self, texts: Sequence[str], reach: int, prompt: str, truncate: Truncate) -> Iterator[list[int]]:
        """The ids of the prompt and of that end of each text that is to be kept, `reach` characters of it at most."""
        excerpts = [prompt + (text[-reach:] if truncate == "START" else text[:reach]) for text in texts]
        try:
            if len(excerpts) == 1 and len(excerpts[0]) <= _SHORT:
                yield self._tokenizer.encode(excerpts[0]).ids
                return
            for some in _portions(excerpts):
                yield from [encoding.ids for encoding in self._tokenizer.encode_batch_fast(some)]
        except Exception as error:
            if type(error) is not Exception:  # as all are that the tokenizers library raises for such a vocabulary
                raise
            raise CheckpointInvalid(f"the model's tokenizer has no tokens for a text: {error}") from error

    def _settled(self, ids: list[int], text: str, reach: int, prompt: str, truncate: Truncate) -> bool:
        """Whether the tokens to be kept are those that the whole text has, and not an accident of where it was cut.

        They are believed when a cut elsewhere leaves the same; a text of one repeated letter is where it does not.
        """
        if len(ids) < self.max_tokens + _MARGIN:
            return False
        if truncate == "NONE" or reach >= self._counted:
            return True
        (others,) = self._look([text], reach - 1, prompt, truncate)
        kept = slice(-self.max_tokens, None) if truncate == "START" else slice(self.max_tokens)
        return ids[kept] == others[kept]

    def ids_of(self, *tokens: str) -> set[int]:
        """The ids of these tokens, of those that there are."""
        return {number for token in tokens if (number := self._tokenizer.token_to_id(token)) is not None}

    def prompt_length(self, prompt: str) -> int:
        """How many tokens at the start of a text are the prompt's or special.

        The last of the prompt may join the first of the text and is then not counted.
        """
        if not prompt:
            return 0
        return len(self._tokenizer.encode(prompt).ids) - self._after

    def _cut(self, ids: list[int], prompt: str, truncate: Truncate) -> list[int]:
        """Drop as many tokens as are too many, from the text's end or from its start."""
        end = len(ids) - self._after
        first, last = ids[: self._before + self._shared(ids, prompt)], ids[end:]
        kept = self.max_tokens - len(first) - len(last)
        if kept < 1:
            raise InvalidRequest(
                f"the limit of {self.max_tokens} tokens leaves no room for text behind the prompt and special tokens, "
                f"which are {len(first) + len(last)}"
            )
        text = ids[len(first) : end]
        return first + (text[:kept] if truncate == "END" else text[-kept:]) + last

    def _shared(self, ids: list[int], prompt: str) -> int:
        """How many tokens behind the special ones are the prompt's and nothing else's."""
        alone = self._tokenizer.encode(prompt, add_special_tokens=False).ids if prompt else []
        pairs = zip(alone, ids[self._before :], strict=False)
        return next((count for count, (ours, theirs) in enumerate(pairs) if ours != theirs), len(alone))


def _portions(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in their order, as many as are tokenized together."""
    start = characters = 0
    for index, text in enumerate(texts):
        characters += len(text)
        if characters > _AT_ONCE and index > start:
            yield texts[start:index]
            start, characters = index, len(text)
    yield texts[start:]

"""Tokenizers that transformers has in Python only, such as PhoBERT's and those of Japanese BERT models.

They are slower than those of the tokenizers library (a text of a hundred tokens takes some milliseconds), and the
models are of no use without them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text as tokens.

    Attributes:
        ids: of its tokens, special ones included.
        special_tokens_mask: 1 for the special ones that were put around it, 0 for those of the text.
    """

    ids: list[int]
    special_tokens_mask: list[int]


class PythonTokenizer:
    """One of them, in its use like ``tokenizers.Tokenizer``, so far as `tokenizer.Tokenizer` uses that.

    Args:
        tokenizer: transformers' own.
        lowercase: whether the checkpoint says that texts are put in lower case. As in sentence-transformers the
            tokenizer is told so, and most of these do not listen.
        special_tokens: whether any are put around a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, lowercase: bool, special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        if lowercase:
            tokenizer.do_lower_case = True
        self._special_tokens = special_tokens
        # Some hand texts to libraries that analyse one at a time.
        self._one_at_a_time = threading.Lock()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Encoded:
        """The tokens of one text, all of them, however many."""
        with self._one_at_a_time:
            made = self._tokenizer(
                text,
                add_special_tokens=add_special_tokens and self._special_tokens,
                return_special_tokens_mask=True,
                verbose=False,  # it would warn of texts that are longer than the model takes
            )
        return Encoded(made["input_ids"], made["special_tokens_mask"])

    def encode_batch_fast(self, texts: Sequence[str]) -> list[Encoded]:
        """The same of several."""
        return [self.encode(text) for text in texts]

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, or None where there is no such token."""
        return self._tokenizer.get_vocab().get(token)

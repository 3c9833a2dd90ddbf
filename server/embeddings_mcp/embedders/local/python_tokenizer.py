"""Tokenizers that transformers implements in Python only, such as PhoBERT's and those of Japanese BERT models.

They are slower than those of the tokenizers library (some milliseconds for a text of a hundred tokens), but these
models cannot be used without them.
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
    """A tokenized text.

    Attributes:
        ids: token ids, special tokens included.
        special_tokens_mask: 1 for the special tokens that were added around the text, 0 for the text's own tokens.
    """

    ids: list[int]
    special_tokens_mask: list[int]


class PythonTokenizer:
    """Adapt a Python tokenizer to the part of the `tokenizers.Tokenizer` interface that `tokenizer.Tokenizer` uses.

    Args:
        tokenizer: the tokenizer of transformers.
        lowercase: whether the checkpoint asks for lowercased texts. As in sentence-transformers this only sets
            ``do_lower_case``, which most of these tokenizers ignore.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, lowercase: bool) -> None:
        self._tokenizer = tokenizer
        if lowercase:
            tokenizer.do_lower_case = True
        # Some call libraries that are not thread-safe.
        self._lock = threading.Lock()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Encoded:
        """Tokenize a text, without truncation."""
        with self._lock:
            encoding = self._tokenizer(
                text,
                add_special_tokens=add_special_tokens,
                return_special_tokens_mask=True,
                verbose=False,  # suppresses the warning about texts longer than the model's limit
            )
        return Encoded(encoding["input_ids"], encoding["special_tokens_mask"])

    def encode_batch_fast(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokenize several texts."""
        return [self.encode(text) for text in texts]

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, or None if it is not in the vocabulary."""
        return self._tokenizer.get_vocab().get(token)

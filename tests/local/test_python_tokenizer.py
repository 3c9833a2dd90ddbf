"""Checkpoints whose tokenizer exists in Python only: they give the vectors of sentence-transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from transformers import AutoModel, AutoTokenizer

from embeddings_mcp.embedders.local.encoder import load_encoder
from embeddings_mcp.embedders.local.python_tokenizer import Encoded, PythonTokenizer
from embeddings_mcp.embedders.local.tokenizer import Tokenizer
from embeddings_mcp.errors import InputTooLong, MissingDependency
from embeddings_mcp.models import Truncate
from tests.local.checkpoints import SMALL, assert_as_sentence_transformers_reads_it, save_plain

LETTERS = "abcdefghijklmnopqrstuvwxyz.,?äñ猫水"
TEXTS = ["water is wet.", "x", "wa ter <mask> Water </s> <pad>", "猫 水 água"]

PHOBERT = {
    "tokenizer_config.json": json.dumps({"tokenizer_class": "PhobertTokenizer"}),
    "vocab.txt": "".join(f"{letter}@@ 1\n{letter} 1\n" for letter in LETTERS) + "wa@@ 1\nter 1\naa@@ 1\n",
    "bpe.codes": "w a 5\nt e 4\nte r</w> 3\na a 2\n",
}


def japanese(**fields: Any) -> dict[str, str]:
    """Files of a Japanese tokenizer."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + letter for letter in LETTERS)]
    config = {"tokenizer_class": "BertJapaneseTokenizer"} | fields
    return {"tokenizer_config.json": json.dumps(config), "vocab.txt": "\n".join(tokens)}


def save(folder: Path, files: dict[str, str]) -> Path:
    """Save a tiny model with these tokenizer files."""
    save_plain(folder, "roberta", AutoModel, **SMALL)
    (folder / "tokenizer.json").unlink()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "files",
    [
        PHOBERT,
        japanese(word_tokenizer_type="basic", subword_tokenizer_type="wordpiece"),
        japanese(word_tokenizer_type="basic", subword_tokenizer_type="character"),
    ],
    ids=["PhoBERT", "Japanese by pieces", "Japanese by characters"],
)
def test_their_vectors_are_those_of_sentence_transformers(tmp_path: Path, files: dict[str, str]) -> None:
    assert_as_sentence_transformers_reads_it(save(tmp_path, files), TEXTS)


def test_lowercasing_is_passed_to_the_tokenizer_as_in_sentence_transformers(tmp_path: Path) -> None:
    save(tmp_path, PHOBERT)
    config = {"max_seq_length": 64, "do_lower_case": True}
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert_as_sentence_transformers_reads_it(tmp_path, [*TEXTS, "WATER Is wet.", "Ä ñ <MASK> WA"])


class Counting(PythonTokenizer):
    """Counts the characters that it tokenizes."""

    characters = 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Encoded:
        self.characters += len(text)
        return super().encode(text, add_special_tokens=add_special_tokens)


@pytest.mark.parametrize("truncate", get_args(Truncate))
@pytest.mark.parametrize("text", ["wa ter ", "a", "猫"])
def test_only_the_kept_end_of_a_much_too_long_text_is_tokenized(tmp_path: Path, text: str, truncate: Truncate) -> None:
    python_tokenizer = AutoTokenizer.from_pretrained(save(tmp_path, PHOBERT))
    counting = Counting(python_tokenizer, lowercase=False)
    tokenizer = Tokenizer(counting, max_tokens=32)
    long_text = text * 100_000
    if truncate == "NONE":
        with pytest.raises(InputTooLong, match="more than the 32 tokens"):
            tokenizer.encode([long_text], prompt="", truncate=truncate)
    else:
        (kept,) = tokenizer.encode([long_text], prompt="", truncate=truncate)
        (expected,) = tokenizer.encode([text * 500], prompt="", truncate=truncate)
        assert (len(kept), kept) == (32, expected)
    assert counting.characters < 5000


def test_a_missing_package_that_a_tokenizer_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fugashi", None)  # as if it were not installed
    with pytest.raises(MissingDependency, match="You need to install fugashi"):
        load_encoder("test/japanese", save(tmp_path, japanese(word_tokenizer_type="mecab")))

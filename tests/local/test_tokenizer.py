"""Texts to token ids: how a text that is too long is truncated, and at what cost."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
from benchmarks import bulk
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Encoding, models
from tokenizers import Tokenizer as FastTokenizer

from embeddings_mcp.embedders.local.tokenizer import Tokenizer
from embeddings_mcp.embedders.local.tokenizer_files import read_tokenizer
from embeddings_mcp.errors import CheckpointInvalid, InputTooLong, InvalidRequest
from embeddings_mcp.models import Truncate
from tests.local.golden import FamilyName, encoder, family

LIMIT = 40
PROMPTS = ["", "query: ", "Instruct: find what answers the question\nQuery: "]


@dataclass(frozen=True)
class Kind:
    """A kind of tokenizer: its family, and how many special tokens it adds before and after a text."""

    family: FamilyName
    before: int
    after: int

    @property
    def path(self) -> Path:
        return family(self.family).folder / "tokenizer.json"


KINDS = {
    "WordPiece": Kind("e5", 1, 1),
    "byte-level BPE": Kind("llama-nemotron-embed", 1, 0),
    "SentencePiece BPE": Kind("nv-embed-v2", 1, 0),
    "Unigram": Kind("bge-m3", 1, 1),
}

TEXTS = st.text(max_size=120) | st.lists(
    st.sampled_from(["water ", "der Kaffee ", "  ", "猫", "é", "12345", "[SEP]", "</s>", "<|end_of_text|>", "\n", "🙂"])
    | st.text(max_size=6),
    max_size=80,
).map("".join)


@functools.cache
def whole(kind: Kind) -> FastTokenizer:
    """The kind's tokenizer as the tokenizers library reads it, without truncation."""
    tokenizer = FastTokenizer.from_file(str(kind.path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@functools.cache
def limited(kind: Kind) -> Tokenizer:
    return read_tokenizer(kind.path.parent, max_tokens=LIMIT)


def encode(tokenizer: Tokenizer, text: str, prompt: str = "", *, truncate: Truncate = "NONE") -> list[int]:
    (row,) = tokenizer.encode([text], prompt=prompt, truncate=truncate)
    return row


def parts(kind: Kind, prompt: str, text: str) -> tuple[list[int], list[int], list[int]]:
    """The ids of the whole text: special tokens and prompt, the text itself, and the special tokens after it."""
    ids = whole(kind).encode(prompt + text).ids
    # The prompt's last token may merge with the text's first one; its own are those that it also has alone.
    alone = whole(kind).encode(prompt, add_special_tokens=False).ids if prompt else []
    pairs = zip(alone, ids[kind.before :], strict=False)
    start = kind.before + len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    end = len(ids) - kind.after
    return ids[:start], ids[start:end], ids[end:]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@settings(max_examples=60)
@given(text=TEXTS, prompt=st.sampled_from(PROMPTS))
@example(text="1" * 1000, prompt="")
@example(text="a" * 2000, prompt="query: ")
@example(text="猫" * 1000, prompt="")
@example(text=" " * 3000 + "water", prompt="query: ")
@example(text="water\n" * 500, prompt="query: ")
def test_a_text_that_is_too_long_loses_tokens_at_one_end_only(kind: Kind, text: str, prompt: str) -> None:
    before, body, after = parts(kind, prompt, text)
    room = LIMIT - len(before) - len(after)
    if len(body) <= room:
        for truncate in get_args(Truncate):
            assert encode(limited(kind), text, prompt, truncate=truncate) == before + body + after
        return

    assert encode(limited(kind), text, prompt, truncate="END") == before + body[:room] + after
    assert encode(limited(kind), text, prompt, truncate="START") == before + body[-room:] + after
    with pytest.raises(InputTooLong) as refused:
        encode(limited(kind), text, prompt)
    assert (refused.value.tokens, refused.value.max_tokens) == (len(before) + len(body) + len(after), LIMIT)


@pytest.mark.parametrize("letters", range(2000, 2008))
@pytest.mark.parametrize("truncate", ["START", "END"])
def test_a_run_of_one_letter_is_truncated_as_if_it_were_tokenized_as_a_whole(letters: int, truncate: Truncate) -> None:
    # The last tokens depend on the number of letters in the text, not in the excerpt.
    pieces = {"a": 0, "aa": 1, "aaaa": 2}
    runs = FastTokenizer(models.BPE(vocab=pieces, merges=[("a", "a"), ("aa", "aa")]))
    ids = runs.encode("a" * letters).ids

    truncated = encode(Tokenizer(runs, max_tokens=16), "a" * letters, truncate=truncate)

    assert truncated == (ids[:16] if truncate == "END" else ids[-16:])


def test_a_token_that_the_first_excerpt_splits_is_found_whole() -> None:
    # A limit of five tokens makes the first excerpt 80 characters long. It ends within "abX", and both with "ab" and
    # with "a" the fifth token would seem to be "a".
    runs = ["c" * 2**power for power in range(7)]
    merges = [(run, run) for run in runs[:-1]] + [("b", "X"), ("a", "bX")]
    pieces = {piece: number for number, piece in enumerate([*runs, "a", "b", "X", "bX", "abX", "d"])}
    tokenizer = FastTokenizer(models.BPE(vocab=pieces, merges=merges))
    text = "c" * 78 + "abX" + "d" * 100

    truncated = encode(Tokenizer(tokenizer, max_tokens=5), text, truncate="END")

    assert truncated == tokenizer.encode(text).ids[:5]
    assert truncated[-1] == pieces["abX"]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_empty_text_becomes_special_tokens_and_the_prompt(kind: Kind) -> None:
    assert len(encode(limited(kind), "")) == kind.before + kind.after
    assert encode(limited(kind), "", "query: ") == whole(kind).encode("query: ").ids


def test_a_text_without_any_token_is_refused() -> None:
    letters = FastTokenizer(models.BPE(vocab={"a": 0}, merges=[]))

    with pytest.raises(InvalidRequest, match="`text 1` holds nothing that the model's tokenizer keeps"):
        Tokenizer(letters, max_tokens=16).encode(["a", ""], prompt="", truncate="NONE")


def test_an_invalid_string_is_not_reported_as_an_invalid_checkpoint() -> None:
    with pytest.raises(TypeError):
        encode(limited(KINDS["WordPiece"]), "half an emoji: \ud83d")


def test_texts_that_are_too_long_are_reported_by_index() -> None:
    with pytest.raises(InputTooLong) as refused:
        limited(KINDS["WordPiece"]).encode(["water", "water " * 50, "water " * 60], prompt="", truncate="NONE")

    assert (refused.value.index, refused.value.tokens, refused.value.others) == (1, 52, [2])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("truncate", ["START", "END"])
def test_a_limit_that_leaves_no_room_for_text_is_refused(kind: Kind, truncate: Truncate) -> None:
    prompt = PROMPTS[-1]
    limit = len(whole(kind).encode(prompt).ids) - 2

    with pytest.raises(InvalidRequest, match=f"limit of {limit} tokens leaves no room for text"):
        encode(read_tokenizer(kind.path.parent, max_tokens=limit), "water " * 50, prompt, truncate=truncate)


@pytest.mark.parametrize("name", ["nv-embed-v1", "nv-embed-v2"])
def test_a_limit_shorter_than_nv_embeds_prompt_is_refused_instead_of_dividing_by_zero(name: FamilyName) -> None:
    (alone,) = encoder(name).tokenize([""], input_type="query", truncate="NONE")
    prompt_tokens = sum(alone.counts) - 1  # without </s>

    for limit in (prompt_tokens - 3, prompt_tokens - 2):  # at which the authors' code divides by zero
        with pytest.raises(InvalidRequest, match="leaves no room for text"):
            bulk.encode(encoder(name, limit), ["Where is the water?"], input_type="query", truncate="END")
    embedded = bulk.encode(encoder(name, prompt_tokens), ["Where is the water?"], input_type="query", truncate="END")
    assert np.isfinite(embedded.vectors).all()


# --- special tokens --------------------------------------------------------------------------------------------------

LLAMA = {"tokenizer_class": "LlamaTokenizer"}
OTHERS = {"bos_token": "<s>", "eos_token": "</s>"}
GTE = {"auto_map": {"AutoTokenizer": ["tokenization_qwen.Qwen2Tokenizer", "tokenization_qwen.Qwen2TokenizerFast"]}}
WATER = [343, 424, 460]

SPECIAL_TOKENS = [
    (LLAMA | {"add_eos_token": True}, [1, *WATER, 2]),
    (LLAMA | {"add_eos_token": True, "add_bos_token": False}, [*WATER, 2]),
    (LLAMA | {"add_eos_token": True, "eos_token": {"__type": "AddedToken", "content": "<unk>"}}, [1, *WATER, 0]),
    (LLAMA | {"add_bos_token": True}, [1, *WATER]),
    (LLAMA | {"add_bos_token": False}, WATER),
    (LLAMA | {"add_bos_token": None}, WATER),
    (LLAMA, [1, *WATER]),
    ({"tokenizer_class": "LlamaTokenizerFast", "add_eos_token": True}, [1, *WATER, 2]),
    ({"tokenizer_class": "CodeLlamaTokenizer", "add_eos_token": True}, [1, *WATER, 2]),
    (OTHERS | {"tokenizer_class": "CohereTokenizerFast", "add_eos_token": True}, [1, *WATER, 2]),
    (OTHERS | {"tokenizer_class": "GemmaTokenizer", "add_eos_token": True}, [1, *WATER, 2]),
    (OTHERS | {"tokenizer_class": "GPTNeoXTokenizerFast", "add_eos_token": True}, [*WATER, 2]),
    (OTHERS | {"tokenizer_class": "Qwen2Tokenizer", "add_eos_token": True}, [1, *WATER]),
    (OTHERS | GTE | {"tokenizer_class": "Qwen2Tokenizer", "add_eos_token": True}, [*WATER, 2]),
    (OTHERS | GTE | {"tokenizer_class": "Qwen2Tokenizer", "add_eos_token": False}, WATER),
    (OTHERS | {"tokenizer_class": "PreTrainedTokenizerFast", "add_eos_token": True}, [1, *WATER]),
]
"""Fields of ``tokenizer_config.json``, and the ids that transformers 4.48, or the code that it names, makes of "Water."
with a ``tokenizer.json`` that adds ``<s>`` before a text."""


def read_with_config(folder: Path, config: dict[str, Any], *, max_tokens: int = LIMIT) -> Tokenizer:
    """Read NV-Embed's tokenizer with this ``tokenizer_config.json``."""
    shutil.copy(KINDS["SentencePiece BPE"].path, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return read_tokenizer(folder, max_tokens=max_tokens)


@pytest.mark.parametrize(("config", "ids"), SPECIAL_TOKENS, ids=str)
def test_a_text_gets_the_special_tokens_that_the_model_was_trained_with(
    tmp_path: Path, config: dict[str, Any], ids: list[int]
) -> None:
    assert encode(read_with_config(tmp_path, config), "Water.") == ids


def test_special_tokens_that_the_config_asks_for_survive_truncation(tmp_path: Path) -> None:
    tokenizer = read_with_config(tmp_path, LLAMA | {"add_eos_token": True}, max_tokens=6)

    assert encode(tokenizer, "Water. Water.", truncate="END") == [1, *WATER, 343, 2]
    assert encode(tokenizer, "Water. Water.", truncate="START") == [1, 460, *WATER, 2]
    with pytest.raises(InputTooLong) as refused:
        encode(tokenizer, "Water. Water.")
    assert refused.value.tokens == 8


def test_a_special_token_that_is_not_in_the_vocabulary_is_refused_by_file_and_field(tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match=r"tokenizer_config\.json: `eos_token` must be a token .* not '<end>'"):
        read_with_config(tmp_path, LLAMA | {"add_eos_token": True, "eos_token": "<end>"})


# --- cost ------------------------------------------------------------------------------------------------------------


@dataclass
class Counting:
    """Wraps a tokenizer, and counts the characters that it tokenizes."""

    tokenizer: FastTokenizer
    characters: int = field(default=0)
    largest_batch: int = field(default=0)  # in characters

    def encode_batch_fast(self, texts: Sequence[str]) -> list[Encoding]:
        characters = sum(map(len, texts))
        self.characters += characters
        self.largest_batch = max(self.largest_batch, characters)
        return self.tokenizer.encode_batch_fast(texts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


TEN_MEGABYTES = 10_000_000
LONG = {
    "words": "water coffee " * (TEN_MEGABYTES // 13),
    "Chinese": "猫喝水" * (TEN_MEGABYTES // 9),
    "digits": "31415926" * (TEN_MEGABYTES // 8),
    "one word": "electroencephalography" * (TEN_MEGABYTES // 22),
}
# WordPiece makes one [UNK] of a word of any length, so its long words are among the texts of few tokens below.
TOO_LONG = [
    pytest.param(kind, text, id=f"{name}-{text}")
    for name, kind in KINDS.items()
    for text in LONG
    if name != "WordPiece" or text not in {"digits", "one word"}
]


def cost(kind: Kind, text: str, truncate: Truncate) -> tuple[int, int]:
    """Return the number of tokens of the text, and how many characters were tokenized for it."""
    counting = Counting(FastTokenizer.from_file(str(kind.path)))
    row = encode(Tokenizer(cast("FastTokenizer", counting), max_tokens=LIMIT), text, truncate=truncate)
    return len(row), counting.characters


@pytest.mark.parametrize(("kind", "text"), TOO_LONG)
@pytest.mark.parametrize("truncate", ["START", "END"])
def test_truncating_ten_megabytes_costs_about_as_much_as_the_kept_part(
    kind: Kind, text: str, truncate: Truncate
) -> None:
    tokens, characters = cost(kind, LONG[text], truncate)

    assert tokens == LIMIT
    assert characters <= 40 * LIMIT


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        pytest.param(KINDS["WordPiece"], "electroencephalography" * 50_000, id="WordPiece-one word"),
        pytest.param(KINDS["WordPiece"], " " * 1_000_000, id="WordPiece-spaces"),
        pytest.param(KINDS["Unigram"], " " * 1_000_000, id="Unigram-spaces"),
    ],
)
@pytest.mark.parametrize("end", ["", " water"])
def test_a_text_of_few_tokens_is_tokenized_to_its_end_however_long_it_is(kind: Kind, text: str, end: str) -> None:
    tokens, characters = cost(kind, text + end, "END")

    assert tokens == len(whole(kind).encode(text + end).ids) < LIMIT
    assert characters <= 2.2 * len(text)


def test_a_text_far_too_long_to_be_counted_is_refused_without_a_number() -> None:
    with pytest.raises(InputTooLong, match="more than the 40 tokens") as refused:
        encode(limited(KINDS["byte-level BPE"]), LONG["words"])

    assert refused.value.tokens is None


def test_long_texts_are_tokenized_in_small_batches() -> None:
    counting = Counting(FastTokenizer.from_file(str(KINDS["byte-level BPE"].path)))
    tokenizer = Tokenizer(cast("FastTokenizer", counting), max_tokens=8192)
    texts = [f"{number} water" * 60_000 for number in range(3)]
    with pytest.raises(InputTooLong) as refused:
        tokenizer.encode([*texts, "coffee"], prompt="", truncate="NONE")

    assert (refused.value.index, refused.value.others) == (0, [1, 2])
    assert counting.characters == sum(map(len, texts)) + len("coffee")
    assert counting.largest_batch <= 1 << 20

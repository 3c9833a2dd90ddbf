"""Generated texts of common English words, the same in every run.

Each word is one token in MiniLM's vocabulary, and each text gets two special tokens, so lengths are exact. Imports only
the standard library, since peers use this module in their own environments.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

_WORDS = """
the of and to in a is that for it was on with as be at by this had not are but from or have an they which you one were
her all she there would their we him been has when who will more no if out so said what up its about into than them
can only other new some could time these two may then do first any my now such like our over man me even most made
after also did many before must through back years where much your way well down should because each just those people
how too little state good very make world still own see men work long get here between both life being under never day
same another know while last might us great old year off come since against go came right used take three committee
budget bridge repair money reserve second opinion cost lost city garden train music history science paper letter
window kitchen river mountain winter summer question answer system network model language search number table engine
market price report result change problem reason example method theory practice school teacher student doctor nurse
patient road station house family children friend water coffee password account bill email server memory error
database customer order delivery payment contract meeting
"""

WORDS = tuple(_WORDS.split())
"""The words of the texts, most frequent first."""

_WEIGHTS = [1 / rank for rank in range(3, len(WORDS) + 3)]
"""Relative frequency of each word, by Zipf's law."""

SPECIAL_TOKENS = 2
"""Special tokens that MiniLM adds to a text."""


def text(tokens: int, random_: random.Random) -> str:
    """A random text with this number of tokens, including special tokens."""
    return " ".join(random_.choices(WORDS, _WEIGHTS, k=tokens - SPECIAL_TOKENS))


def _short(random_: random.Random) -> int:
    return random_.randint(5, 30)


def _mixed(random_: random.Random) -> int:
    return min(256, max(8, round(random_.lognormvariate(math.log(55), 0.8))))


def _to_512(random_: random.Random) -> int:
    return min(512, max(16, round(random_.lognormvariate(math.log(128), 0.8))))


def _long(_random: random.Random) -> int:
    return 256


def _query(random_: random.Random) -> int:
    return random_.randint(6, 16)


_LENGTHS: Mapping[str, Callable[[random.Random], int]] = {
    "short": _short,
    "mixed": _mixed,
    "varied": _mixed,
    "long": _long,
    "to512": _to_512,
    "query": _query,
}
"""Random length of a text in tokens, by the workload's name."""


def texts(workload: str, count: int, *, seed: int = 0) -> list[str]:
    """The first `count` texts of a workload.

    Args:
        workload: ``short`` (5-30 tokens each), ``mixed`` (8-256, log-normal, median 55), ``long`` (256), ``query``
            (6-16), ``to512`` (16-512, log-normal, median 128) or ``varied`` (as ``mixed``).
        count: number of texts.
        seed: another seed gives different texts of the same lengths or, for ``varied``, of different lengths.
    """
    length_seed = f"{workload} lengths {seed}" if workload == "varied" else f"{workload} lengths"
    lengths, words = random.Random(length_seed), random.Random(f"{workload} words {seed}")  # noqa: S311 - texts
    return [text(_LENGTHS[workload](lengths), words) for _ in range(count)]

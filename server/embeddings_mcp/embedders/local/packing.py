"""Texts as one row of tokens, one behind the other: what a transformer reads in place of a padded batch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from embeddings_mcp.embedders.local.placement import numbers_on


class PackingUnsupported(Exception):
    """A model asks its attention for something that it cannot have over a packed row."""


@dataclass(frozen=True)
class Packing:
    """Where each text lies in a packed row.

    Attributes:
        lengths: tokens of each text, in the row's order; empty where they are known to the device only.
        longest: tokens of the longest text, or more.
        cumulative: int32 ``[n + 1]`` on the model's device, first token of each text and, last, the row's length.
    """

    lengths: tuple[int, ...]
    longest: int
    cumulative: torch.Tensor

    @functools.cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """``(first token, texts, tokens of each)`` of every run of neighbours of equal length.

        Raises:
            PackingUnsupported: the lengths are not known here.
        """
        if not self.lengths:
            raise PackingUnsupported("the texts' lengths are known to the device only")
        runs, start = [], 0
        for length, same in itertools.groupby(self.lengths):
            count = len(list(same))
            runs.append((start, count, length))
            start += count * length
        return tuple(runs)

    def of_first(self, texts: int) -> Packing:
        """Where each of the first so many texts lies."""
        return Packing(self.lengths[:texts], self.longest, self.cumulative[: texts + 1])


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Several texts as a transformer reads them.

    Attributes:
        ids: token ids, int64 ``[tokens]`` on the model's device.
        positions: id of the position that each token has in its text, likewise.
        packing: where each text lies.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    packing: Packing


def pack(rows: Sequence[Sequence[int]], device: torch.device, first_position: int = 0) -> PackedRow:
    """One row of the token ids of some texts, none of them empty; their positions as `lay_out` counts them."""
    lengths = [len(row) for row in rows]
    tokens, longest = sum(lengths), max(lengths)
    numbers = numbers_on(device, lay_out(rows, lengths, first_position))
    packing = Packing(tuple(lengths), longest, numbers[2 * tokens :].int())
    return PackedRow(numbers[:tokens], numbers[tokens : 2 * tokens], packing)


def lay_out(rows: Sequence[Sequence[int]], lengths: Sequence[int], first_position: int = 0) -> NDArray[np.int64]:
    """All that a device has to be told of a packed row, in one piece, since one copy takes as long as three.

    Args:
        rows: token ids of the texts.
        lengths: tokens of each of them; what is longer than that is filled up with zeros, at the end.
        first_position: position id of a text's first token. Where it is not 0, it follows the id of the padding token,
            as fairseq has it; and where a text names that token, it has its own id for a position and is not counted.

    Returns:
        int64 ``[tokens + tokens + n + 1]``: the ids, their positions, and the first token of each text and the end.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    tokens = int(ends[-1])
    numbers = np.zeros(2 * tokens + len(ends) + 1, dtype=np.int64)
    count = sum(map(len, rows))
    numbers[:count] = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int64, count=count)
    starts = ends - lengths
    numbers[tokens : 2 * tokens] = np.arange(first_position, first_position + tokens) - np.repeat(starts, lengths)
    numbers[2 * tokens + 1 :] = ends
    padding = first_position - 1
    if padding >= 0 and (numbers[:count] == padding).any():
        counted = numbers[:tokens] != padding
        before = np.cumsum(counted) - counted  # of each token of the row
        places = first_position + before - before[np.repeat(starts, lengths)]
        numbers[tokens : 2 * tokens] = np.where(counted, places, padding)
    return numbers


def fill(tokens: int, longest: int) -> list[int]:
    """The lengths of the fewest texts, none longer than `longest`, that have so many tokens together."""
    whole, part = divmod(tokens, longest)
    return [*[longest] * whole, *([part] if part else [])]

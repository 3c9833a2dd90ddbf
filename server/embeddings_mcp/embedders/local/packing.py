"""Packed batches: texts concatenated into one row of tokens, which a transformer reads instead of a padded batch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from embeddings_mcp.embedders.local.placement import to_device


class PackingUnsupported(Exception):
    """A model needs something from its attention that attention over a packed row does not support."""


@dataclass(frozen=True)
class Packing:
    """The boundaries of the texts in a packed row.

    Attributes:
        lengths: number of tokens of each text, in order; empty if the lengths are only known on the device.
        longest: number of tokens of the longest text, or an upper bound.
        cumulative: int32 ``[n + 1]`` on the model's device: the offset of the first token of each text, then the length
            of the row (``cu_seqlens`` of varlen attention kernels).
    """

    lengths: tuple[int, ...]
    longest: int
    cumulative: torch.Tensor

    @functools.cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """``(first token, number of texts, tokens per text)`` of every run of adjacent texts of equal length.

        Raises:
            PackingUnsupported: the lengths are only known on the device.
        """
        if not self.lengths:
            raise PackingUnsupported("the texts' lengths are only known on the device")
        runs, start = [], 0
        for length, equal in itertools.groupby(self.lengths):
            count = len(list(equal))
            runs.append((start, count, length))
            start += count * length
        return tuple(runs)

    def first(self, texts: int) -> Packing:
        """Return the boundaries of the first `texts` texts."""
        return Packing(self.lengths[:texts], self.longest, self.cumulative[: texts + 1])


@dataclass(frozen=True, slots=True)
class PackedRow:
    """A packed row: the input of a transformer.

    Attributes:
        ids: token ids, int64 ``[tokens]`` on the model's device.
        positions: position id of each token within its text, likewise.
        packing: the boundaries of the texts.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    packing: Packing


def pack(rows: Sequence[Sequence[int]], device: torch.device, first_position: int = 0) -> PackedRow:
    """Pack the token ids of texts, none of them empty, into one row on the device; arguments as for `lay_out`."""
    lengths = [len(row) for row in rows]
    tokens, longest = sum(lengths), max(lengths)
    layout = to_device(lay_out(rows, lengths, first_position), device)
    packing = Packing(tuple(lengths), longest, layout[2 * tokens :].int())
    return PackedRow(layout[:tokens], layout[tokens : 2 * tokens], packing)


def lay_out(rows: Sequence[Sequence[int]], lengths: Sequence[int], first_position: int = 0) -> NDArray[np.int64]:
    """Return the ids, positions and boundaries of a packed row as one array, so that one copy moves it to a device.

    The cost of such a copy is mostly fixed, so that one is cheaper than three.

    Args:
        rows: token ids of the texts.
        lengths: number of tokens of each text; they may add up to more than `rows` hold, in which case the rest of the
            row is filled with zeros.
        first_position: position id of a text's first token. If it is not 0, it is the padding token's id plus 1, as in
            fairseq: a padding token within a text has its own id as its position, and does not advance the positions
            of the tokens after it.

    Returns:
        int64 ``[tokens + tokens + n + 1]``: the ids, the position ids, and the offsets as in `Packing.cumulative`.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    tokens = int(ends[-1])
    layout = np.zeros(2 * tokens + len(ends) + 1, dtype=np.int64)
    count = sum(map(len, rows))
    layout[:count] = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int64, count=count)
    starts = ends - lengths
    layout[tokens : 2 * tokens] = np.arange(first_position, first_position + tokens) - np.repeat(starts, lengths)
    layout[2 * tokens + 1 :] = ends
    padding = first_position - 1
    if padding >= 0 and (layout[:count] == padding).any():
        counted = layout[:tokens] != padding
        before = np.cumsum(counted) - counted  # for each token, the counted tokens of the row before it
        positions = first_position + before - before[np.repeat(starts, lengths)]
        layout[tokens : 2 * tokens] = np.where(counted, positions, padding)
    return layout


def filler_lengths(tokens: int, longest: int) -> list[int]:
    """Return the lengths of the fewest texts of at most `longest` tokens that add up to `tokens`."""
    full, rest = divmod(tokens, longest)
    return [*[longest] * full, *([rest] if rest else [])]

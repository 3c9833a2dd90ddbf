"""Which recorded pass is replayed for which texts, and that what fills its row up goes unnoticed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings_mcp.embedders.local.cuda_graphs import SMALLEST, Graphed, Size, _sizes
from embeddings_mcp.embedders.local.packing import PackedRow, Packing, lay_out, pack
from tests.local.golden import FamilyName, encoder, family

SIZES = st.builds(lambda power, longest: Size.of(SMALLEST << power, longest), st.integers(0, 6), st.integers(1, 8192))


@st.composite
def lengths_within(draw: st.DrawFn, size: Size) -> list[int]:
    """Lengths of texts that a recording of this size holds."""
    lengths = draw(st.lists(st.integers(1, size.longest), min_size=1, max_size=size.texts))
    while not size.holds(lengths):
        lengths.pop()
        lengths = lengths or [1]
    return lengths


@given(st.data(), SIZES)
def test_what_fills_a_recording_up_brings_it_to_its_size_exactly(data: st.DataObject, size: Size) -> None:
    lengths = data.draw(lengths_within(size))
    filled = size.fill(lengths)

    assert filled[: len(lengths)] == lengths
    assert (sum(filled), len(filled)) == (size.tokens, size.texts)
    assert max(filled) <= size.longest


def test_a_recording_takes_neither_too_many_texts_nor_too_long_ones_nor_too_many_tokens() -> None:
    size = Size.of(1024, 8192)
    assert size.holds([512, 512])
    assert not size.holds([513])
    assert not size.holds([512, 512, 1])
    assert size.holds([1] * 72)
    assert not size.holds([1] * size.texts)


@pytest.mark.parametrize("name", ["e5", "llama-nemotron-embed"])
@settings(deadline=None)  # the first example loads the model
@given(rows=st.lists(st.lists(st.integers(4, 100), min_size=1, max_size=20), min_size=1, max_size=6))
def test_a_text_does_not_see_what_fills_its_row_up(name: FamilyName, rows: list[list[int]]) -> None:
    transformer = encoder(name)._backbone
    size = Size.of(256, family(name).max_tokens)
    lengths = [len(row) for row in rows]
    filled = size.fill(lengths)
    numbers = torch.from_numpy(lay_out(rows, filled)).to(transformer.device)
    packing = Packing(tuple(length for length in filled if length), size.longest, numbers[512:].int())

    with torch.inference_mode():
        alone = transformer.forward(pack(rows, transformer.device))
        in_company = transformer.forward(PackedRow(numbers[:256], numbers[256:512], packing))

    assert (in_company[: sum(lengths)] - alone).abs().max() < 1e-5


@dataclass
class Recorded:
    """As much of a recording as is looked at before it is replayed."""

    size: Size
    seconds: float


def graphed(*recordings: Any, launching: float) -> Graphed:
    return Graphed(encoder("e5")._backbone, recordings, launching=launching)


SMALL: Any = Recorded(Size.of(64, 512), 0.001)
LARGE: Any = Recorded(Size.of(1024, 512), 0.004)


def test_the_smallest_recording_that_holds_the_texts_is_replayed() -> None:
    model = graphed(SMALL, LARGE, launching=0.005)
    assert model.recording_for([20, 44]) is SMALL
    assert model.recording_for([20, 45]) is LARGE
    assert model.recording_for([5] * 12) is SMALL
    assert model.recording_for([4] * 13) is LARGE
    assert model.recording_for([513]) is None
    assert model.recording_for([512, 512, 1]) is None


def test_nothing_is_replayed_where_what_fills_it_up_takes_longer_than_launching_would() -> None:
    model = graphed(LARGE, launching=0.002)
    assert model.recording_for([65]) is None
    assert model.recording_for([450, 450]) is None
    assert model.recording_for([470, 470]) is LARGE


def test_recordings_are_made_from_small_to_large_and_large_ones_for_short_texts_too() -> None:
    made = [(size.tokens, size.longest) for size in _sizes(4096, 512)]
    assert made[:5] == [(32, 32), (64, 64), (128, 128), (256, 256), (512, 512)]
    assert made[5:] == [(1024, 512), (2048, 64), (2048, 512), (4096, 64), (4096, 512)]
    assert [size.longest for size in _sizes(4096, 50)] == [32, *[50] * 7]

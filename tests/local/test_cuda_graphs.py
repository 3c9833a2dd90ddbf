"""Which CUDA graph is replayed for which texts, and that filler texts do not change the vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embeddings_mcp.embedders.local.cuda_graphs import MIN_TOKENS, GraphedTransformer, GraphSize, _sizes
from embeddings_mcp.embedders.local.packing import PackedRow, Packing, lay_out, pack
from tests.local.golden import FamilyName, encoder, family

SIZES = st.builds(
    lambda power, longest: GraphSize.of(MIN_TOKENS << power, longest), st.integers(0, 6), st.integers(1, 8192)
)


@st.composite
def lengths_within(draw: st.DrawFn, size: GraphSize) -> list[int]:
    """Lengths of texts that fit into a graph of this size."""
    lengths = draw(st.lists(st.integers(1, size.longest), min_size=1, max_size=size.texts))
    while not size.fits(lengths):
        lengths.pop()
        lengths = lengths or [1]
    return lengths


@given(st.data(), SIZES)
def test_fillers_pad_a_batch_to_exactly_the_size_of_the_graph(data: st.DataObject, size: GraphSize) -> None:
    lengths = data.draw(lengths_within(size))
    padded = size.pad(lengths)

    assert padded[: len(lengths)] == lengths
    assert (sum(padded), len(padded)) == (size.tokens, size.texts)
    assert max(padded) <= size.longest


def test_a_graph_fits_neither_too_many_texts_nor_too_long_ones_nor_too_many_tokens() -> None:
    size = GraphSize.of(1024, 8192)
    assert size.fits([512, 512])
    assert not size.fits([513])
    assert not size.fits([512, 512, 1])
    assert size.fits([1] * 72)
    assert not size.fits([1] * size.texts)


@pytest.mark.parametrize("name", ["e5", "llama-nemotron-embed"])
@given(rows=st.lists(st.lists(st.integers(4, 100), min_size=1, max_size=20), min_size=1, max_size=6))
def test_a_text_does_not_attend_to_the_fillers_of_its_row(name: FamilyName, rows: list[list[int]]) -> None:
    transformer = encoder(name)._transformer
    size = GraphSize.of(256, family(name).max_tokens)
    lengths = [len(row) for row in rows]
    padded = size.pad(lengths)
    layout = torch.from_numpy(lay_out(rows, padded)).to(transformer.device)
    packing = Packing(tuple(length for length in padded if length), size.longest, layout[512:].int())

    with torch.inference_mode():
        alone = transformer.forward(pack(rows, transformer.device))
        with_fillers = transformer.forward(PackedRow(layout[:256], layout[256:512], packing))

    assert (with_fillers[: sum(lengths)] - alone).abs().max() < 1e-5


@dataclass
class FakeGraph:
    """The attributes of a graph that decide whether it is replayed."""

    size: GraphSize
    seconds: float


def graphed(*graphs: Any, launch_seconds: float) -> GraphedTransformer:
    return GraphedTransformer(encoder("e5")._transformer, graphs, launch_seconds=launch_seconds)


SMALL: Any = FakeGraph(GraphSize.of(64, 512), 0.001)
LARGE: Any = FakeGraph(GraphSize.of(1024, 512), 0.004)


def test_the_smallest_graph_that_fits_the_texts_is_replayed() -> None:
    model = graphed(SMALL, LARGE, launch_seconds=0.005)
    assert model.graph_for([20, 44]) is SMALL
    assert model.graph_for([20, 45]) is LARGE
    assert model.graph_for([5] * 12) is SMALL
    assert model.graph_for([4] * 13) is LARGE
    assert model.graph_for([513]) is None
    assert model.graph_for([512, 512, 1]) is None


def test_no_graph_is_replayed_if_its_fillers_take_longer_than_launching_would() -> None:
    model = graphed(LARGE, launch_seconds=0.002)
    assert model.graph_for([65]) is None
    assert model.graph_for([450, 450]) is None
    assert model.graph_for([470, 470]) is LARGE


def test_graphs_are_captured_from_small_to_large_with_additional_large_ones_for_short_texts() -> None:
    sizes = [(size.tokens, size.longest) for size in _sizes(4096, 512)]
    assert sizes[:5] == [(32, 32), (64, 64), (128, 128), (256, 256), (512, 512)]
    assert sizes[5:] == [(1024, 512), (2048, 64), (2048, 512), (4096, 64), (4096, 512)]
    assert [size.longest for size in _sizes(4096, 50)] == [32, *[50] * 7]

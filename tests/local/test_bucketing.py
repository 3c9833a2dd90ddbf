"""Batches are padded to one of a few sizes, without any effect on the vectors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embeddings_mcp.embedders.local import placement
from embeddings_mcp.embedders.local.bert import Bert
from embeddings_mcp.embedders.local.bucketing import BucketedTransformer, bucket_size
from embeddings_mcp.embedders.local.encoder import load_encoder
from embeddings_mcp.embedders.local.hardware import has_onednn
from embeddings_mcp.embedders.local.packing import PackedRow
from tests.local.golden import FamilyName, encoder, family


@given(st.integers(1, 40_000))
def test_a_batch_is_padded_with_few_tokens(tokens: int) -> None:
    most = 0 if tokens <= 32 else 15 if tokens <= 128 else tokens / 4
    assert 0 <= bucket_size(tokens) - tokens <= most


def test_there_are_few_bucket_sizes() -> None:
    assert len({bucket_size(tokens) for tokens in range(1, 2049)}) == 58


@pytest.mark.parametrize("name", ["e5", "bge-m3", "llama-nemotron-embed"])
@given(rows=st.lists(st.lists(st.integers(4, 100), min_size=1, max_size=20), min_size=1, max_size=20))
def test_a_text_does_not_attend_to_the_fillers_of_its_batch(name: FamilyName, rows: list[list[int]]) -> None:
    transformer = encoder(name)._transformer
    with torch.inference_mode():
        plain, plain_packing = transformer.hidden_states(rows)
        bucketed, packing = BucketedTransformer(transformer).hidden_states(rows)

    assert bucketed.shape == plain.shape
    assert (bucketed - plain).abs().max() < 1e-5
    assert (packing.lengths, packing.cumulative.tolist()) == (plain_packing.lengths, plain_packing.cumulative.tolist())


@pytest.mark.skipif(not has_onednn(torch.device("cpu")), reason="only x86 CPUs have AMX")
@pytest.mark.parametrize(("amx", "expected"), [(True, [48]), (False, [42])])
def test_batches_are_padded_if_bfloat16_runs_on_amx(
    amx: bool, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    token_counts: list[int] = []
    forward = Bert.forward

    def counting(self: Bert, row: PackedRow) -> torch.Tensor:
        token_counts.append(len(row.ids))
        return forward(self, row)

    monkeypatch.setattr(placement, "has_amx", lambda: amx)
    model = load_encoder("test/e5", family("e5").folder, device="cpu", precision="bfloat16")
    monkeypatch.setattr(Bert, "forward", counting)
    model.forward([[5] * 20, [6] * 12, [7] * 10], 0)
    assert token_counts == expected

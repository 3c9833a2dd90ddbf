"""What is asked of PyTorch's packed attention on CUDA, held to its documented meaning by a stand-in on the CPU."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from embeddings_mcp.embedders.local import attention
from embeddings_mcp.embedders.local.attention import Packing, attend

LENGTHS = (7, 7, 3, 1)


def documented_varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What its documentation says: -1 is no limit, (W, 0) sees W tokens back and none ahead."""
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k == int((cu_seq_q[1:] - cu_seq_q[:-1]).max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    shared = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty_like(query)
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_k[1:].tolist(), strict=True):
        for token in range(start, end):
            first = start if window_size[0] < 0 else max(start, token - window_size[0])
            last = end if window_size[1] < 0 else min(end, token + window_size[1] + 1)
            scores = torch.einsum("hd,khd->hk", query[token], key[first:last]) * factor
            out[token] = torch.einsum("hk,khd->hd", scores.softmax(-1), value[first:last])
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reach", [None, 0, 2, 50])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_the_kernel_and_the_runs_attend_alike(
    monkeypatch: pytest.MonkeyPatch, causal: bool, reach: int | None, key_heads: int, scaling: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    query, key, value = (torch.randn(tokens, heads, 8, generator=generator) for heads in (4, key_heads, key_heads))
    packing = Packing.of(LENGTHS, torch.device("cpu"))
    options: dict[str, Any] = {"causal": causal, "reach": reach, "scaling": scaling}
    by_runs = attend(query, key, value, packing, **options)
    monkeypatch.setattr(attention, "_kernel_for", lambda _query: documented_varlen_attn)
    by_kernel = attend(query, key, value, packing, **options)

    assert (by_runs - by_kernel).abs().max() < 1e-5


def test_the_kernel_takes_what_it_is_given() -> None:
    ours = inspect.signature(documented_varlen_attn).parameters
    theirs = inspect.signature(varlen_attn).parameters

    assert ours.keys() <= theirs.keys()
    positional = [name for name, parameter in theirs.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert positional == list(ours)[: len(positional)]


def test_on_the_cpu_no_kernel_is_looked_for() -> None:
    assert attention._kernel_for(torch.empty(1, dtype=torch.bfloat16)) is None

"""How PyTorch's varlen kernels for CUDA are called, tested on the CPU with fakes that follow their documentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from embeddings_mcp.embedders.local import attention
from embeddings_mcp.embedders.local.attention import attend, packed_attention
from embeddings_mcp.embedders.local.packing import Packing, PackingUnsupported

LENGTHS = (7, 7, 3, 1)
PACKING = Packing(LENGTHS, max(LENGTHS), torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32))


def attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    *,
    scale: float | None,
    back: int,
    ahead: int,
) -> torch.Tensor:
    """Compute attention token by token. Each attends to `back` tokens before it and `ahead` after it; -1: all."""
    group_size = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group_size, dim=1) for tensor in (key, value))
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty_like(query)
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        for token in range(start, end):
            first = start if back < 0 else max(start, token - back)
            last = end if ahead < 0 else min(end, token + ahead + 1)
            scores = torch.einsum("hd,khd->hk", query[token], key[first:last]) * factor
            out[token] = torch.einsum("hk,khd->hd", scores.softmax(-1), value[first:last])
    return out


def documented_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor,
    cum_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    scale: float | None,
    window_size_left: int,
    window_size_right: int,
) -> tuple[torch.Tensor]:
    """A window size of -1 is no limit; causal means that no token attends to later ones."""
    assert (dropout_p, return_debug_mask) == (0.0, False)
    assert cum_seq_q.dtype == torch.int32
    assert cum_seq_q is cum_seq_k
    assert max_q == max_k == max(LENGTHS)
    ahead = 0 if is_causal else window_size_right
    return (attended(query, key, value, cum_seq_q, scale=scale, back=window_size_left, ahead=ahead),)


def documented_efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float,
    custom_mask_type: int,
    scale: float | None,
) -> tuple[torch.Tensor]:
    """A batch of one row, with as many key heads as query heads; mask type 1 is causal, 0 is none."""
    assert (bias, dropout_p) == (None, 0.0)
    assert cu_seqlens_q.dtype == torch.int32
    assert cu_seqlens_q is cu_seqlens_k
    assert max_seqlen_q == max_seqlen_k == max(LENGTHS)
    assert query.shape == key.shape == value.shape
    ahead = {0: -1, 1: 0}[custom_mask_type]
    return (attended(query[0], key[0], value[0], cu_seqlens_q, scale=scale, back=-1, ahead=ahead)[None],)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("kernel", "reach"), [("flash", None), ("flash", 0), ("flash", 2), ("flash", 50), ("efficient", None)]
)
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_the_kernels_and_the_runs_give_the_same_results(
    monkeypatch: pytest.MonkeyPatch, kernel: str, causal: bool, reach: int | None, key_heads: int, scaling: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(sum(LENGTHS), heads, 8, generator=generator) for heads in (4, key_heads, key_heads)
    )
    options: dict[str, Any] = {"causal": causal, "reach": reach, "scaling": scaling}
    by_runs = attend(query, key, value, PACKING, **options)
    monkeypatch.setattr(attention, "_select_kernel", lambda *_: kernel)
    monkeypatch.setattr(attention, "_flash", documented_flash)
    monkeypatch.setattr(attention, "_efficient", documented_efficient)
    by_kernel = attend(query, key, value, PACKING, **options)

    assert (by_runs - by_kernel).abs().max() < 1e-5


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reach", [0, 1, 63, 64, 65, 128, 300, 420])
@pytest.mark.parametrize("length", [2, 64, 65, 129, 421])
def test_a_token_attends_to_its_window_and_nothing_else(length: int, reach: int, causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2 * length + 1, 2, 8, generator=generator) for _ in range(3))
    packing = Packing((length, length, 1), length, torch.tensor([0, length, 2 * length, 2 * length + 1]))
    result = attend(query, key, value, packing, causal=causal, reach=reach)
    expected = attended(query, key, value, packing.cumulative, scale=None, back=reach, ahead=0 if causal else reach)
    assert (result - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("kernel", "documented"),
    [("_flash", documented_flash), ("_efficient", documented_efficient)],
    ids=["flash", "efficient"],
)
def test_the_kernels_have_the_parameters_they_are_called_with(kernel: str, documented: Any) -> None:
    actual = [argument.name for argument in getattr(attention, kernel).default._schema.arguments]
    code = documented.__code__
    positional = code.co_varnames[: code.co_argcount]
    keyword_only = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]

    assert tuple(actual[: len(positional)]) == positional
    assert set(keyword_only) <= set(actual)


@pytest.mark.parametrize("keyword", ["softcap", "s_aux", "position_bias"])
def test_an_unsupported_keyword_that_would_change_the_scores_is_refused(keyword: str) -> None:
    tensor = torch.zeros(1, 2, sum(LENGTHS), 8)
    keywords: dict[str, Any] = {keyword: tensor}
    with pytest.raises(PackingUnsupported, match=keyword):
        packed_attention(torch.nn.Identity(), tensor, tensor, tensor, None, packing=PACKING, **keywords)


def test_on_the_cpu_attention_is_computed_by_runs() -> None:
    tensor = torch.empty(1, 1, 16, dtype=torch.bfloat16)
    assert attention._select_kernel(tensor, tensor, 1, None) == "runs"


@dataclass
class OnCuda:
    """The attributes of a CUDA tensor that decide which kernel is used."""

    dtype: torch.dtype
    width: int = 64
    heads: int = 4
    device: str = "cuda"
    is_cuda: bool = True

    @property
    def shape(self) -> tuple[int, int, int]:
        return 7, self.heads, self.width

    def element_size(self) -> int:
        return self.dtype.itemsize


BFLOAT16, FLOAT16, FLOAT32 = (OnCuda(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32))


@pytest.mark.parametrize(
    ("capability", "query", "key", "longest", "reach", "kernel"),
    [
        ((9, 0), BFLOAT16, BFLOAT16, 65, None, "flash"),
        ((9, 0), BFLOAT16, BFLOAT16, 64, None, "efficient"),
        ((9, 0), BFLOAT16, OnCuda(torch.bfloat16, heads=2), 64, None, "flash"),
        ((9, 0), BFLOAT16, BFLOAT16, 64, 5, "flash"),
        ((8, 0), FLOAT16, FLOAT16, 512, 5, "flash"),
        ((9, 0), FLOAT32, FLOAT32, 512, None, "efficient"),
        ((9, 0), FLOAT32, FLOAT32, 512, 5, "runs"),
        ((7, 5), FLOAT16, FLOAT16, 512, None, "efficient"),
        ((7, 5), FLOAT16, FLOAT16, 512, 5, "runs"),
        ((7, 5), BFLOAT16, BFLOAT16, 512, None, "runs"),
        ((9, 0), OnCuda(torch.bfloat16, 12), OnCuda(torch.bfloat16, 12), 512, None, "runs"),
        ((9, 0), OnCuda(torch.float32, 12), OnCuda(torch.float32, 12), 512, None, "efficient"),
        ((9, 0), OnCuda(torch.float32, 10), OnCuda(torch.float32, 10), 512, None, "runs"),
        ((9, 0), OnCuda(torch.bfloat16, 264), OnCuda(torch.bfloat16, 264), 512, None, "runs"),
    ],
)
def test_a_kernel_is_selected_only_for_tensors_that_it_supports(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    query: Any,
    key: Any,
    longest: int,
    reach: int | None,
    kernel: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert attention._select_kernel(query, key, longest, reach) == kernel

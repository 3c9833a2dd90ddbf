"""Linear layers on a CPU, with their fused operations, match PyTorch's own, or come as close as 8 bits allow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from embeddings_mcp.embedders.local import linear
from embeddings_mcp.embedders.local.hardware import has_onednn, has_vnni
from embeddings_mcp.embedders.local.linear import GELU_MIN, Int8Linear, Linear

WEIGHT_LEVELS = 127 if has_vnni() else 63
"""Levels of a weight to either side of 0."""


@pytest.fixture(params=[True, False], ids=["AVX-512", "AVX2 alone"])
def _processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Select the code for each kind of processor, whatever processor this is."""
    monkeypatch.setattr(linear, "has_avx512", lambda: request.param)


@pytest.mark.usefixtures("_processor")
@pytest.mark.parametrize("tokens", [1, 10, 300])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("dtype", "atol", "rtol"), [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 2**-6, 2**-7)])
def test_a_layer_and_its_fused_operations_match_pytorch_s(
    tokens: int, biased: bool, dtype: torch.dtype, atol: float, rtol: float
) -> None:
    random = torch.Generator().manual_seed(1)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    rows, weight, residual = numbers(tokens, 48), numbers(96, 48) / 7, numbers(tokens, 96)
    bias = numbers(96) if biased else None
    expected = functional.linear(rows.float(), weight.float(), None if bias is None else bias.float())
    before = residual.clone()
    with torch.inference_mode():
        layer = Linear(weight, bias)
        for result, exact in [
            (layer(rows), expected),
            (layer.gelu(rows), functional.gelu(expected)),
            (layer.add_residual(rows.clone(), residual), expected + residual.float()),
        ]:
            assert result.dtype == dtype
            torch.testing.assert_close(result.float(), exact, atol=atol, rtol=rtol)
    assert torch.equal(residual, before)


@pytest.mark.skipif(not has_onednn(torch.device("cpu")), reason="int8 is for x86 CPUs")
@pytest.mark.parametrize("lower_bound", [None, GELU_MIN])
@given(
    sizes=st.lists(st.one_of(st.just(0.0), st.floats(1e-4, 1e4)), min_size=1, max_size=20),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=50)
def test_an_int8_layer_is_off_by_at_most_half_a_level_per_number(
    lower_bound: float | None, sizes: list[float], seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(16, 64, generator=random), torch.randn(16, generator=random)
    rows = torch.randn(len(sizes), 64, generator=random) * torch.tensor(sizes)[:, None]
    if lower_bound is not None:
        rows = functional.gelu(rows)
    weight_steps = (weight.abs().amax(1) / WEIGHT_LEVELS)[None]  # [1, out]
    abs_max = rows.abs().amax(1, keepdim=True)
    # [tokens, 1]. With a lower bound, 32 levels reach down to it, and 223 up to the largest input.
    input_steps = (
        abs_max / 127 if lower_bound is None else torch.maximum(abs_max / 223, torch.tensor(-lower_bound / 32))
    )

    with torch.inference_mode():
        result = Int8Linear(weight, bias, lower_bound=lower_bound)(rows).double()

    exact = functional.linear(rows.double(), weight.double(), bias.double())
    allowed = (
        input_steps / 2 * weight.abs().sum(1)
        + weight_steps / 2 * rows.abs().sum(1, keepdim=True)
        + 64 * input_steps * weight_steps / 4
    )
    assert ((result - exact).abs() <= allowed * 1.001 + 1e-5).all()

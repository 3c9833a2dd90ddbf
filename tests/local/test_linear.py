"""Linear layers on a CPU, and what follows them, are what PyTorch's own make of the same."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from embeddings_mcp.embedders.local import linear
from embeddings_mcp.embedders.local.linear import Linear


@pytest.fixture(params=[True, False], ids=["AVX-512", "AVX2 alone"])
def _processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the two ways that processors differ in, each on whatever processor this is."""
    monkeypatch.setattr(linear, "has_avx512", lambda: request.param)


@pytest.mark.usefixtures("_processor")
@pytest.mark.parametrize("tokens", [1, 10, 300])
@pytest.mark.parametrize("biased", [True, False])
def test_a_layer_and_what_follows_it_are_pytorch_s(tokens: int, biased: bool) -> None:
    random = torch.Generator().manual_seed(1)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    rows, weight, residual = numbers(tokens, 48), numbers(96, 48) / 7, numbers(tokens, 96)
    bias = numbers(96) if biased else None
    expected = functional.linear(rows, weight, bias)
    before = residual.clone()
    with torch.inference_mode():
        layer = Linear(weight, bias)
        torch.testing.assert_close(layer(rows), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.gelu(rows), functional.gelu(expected), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.plus(rows.clone(), residual), expected + residual, atol=1e-5, rtol=1e-5)
    assert torch.equal(residual, before)

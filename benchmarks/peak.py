"""Peak throughput of matrix products on this CPU, as the ceiling for the other figures."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from embeddings_mcp.embedders.local.linear import Linear

MINILM_SHAPES = ((2048, 384, 1152), (2048, 384, 384), (2048, 384, 1536), (2048, 1536, 384))
"""Rows, input and output width of MiniLM's four matrix products, for a full batch."""

SQUARE = 2048

_ROUNDS = 5


@torch.inference_mode()
def float32_peak(threads: int, *, square: int = SQUARE) -> float:
    """FLOP/s of the fastest float32 matrix product: with MKL or oneDNN, of MiniLM's shapes or a square one.

    Args:
        threads: number of threads that share a product.
        square: edge of the square matrices.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return max(_fastest(products, shape) for shape, products in _products(square))
    finally:
        torch.set_num_threads(before)


def _products(square: int) -> list[tuple[tuple[int, int, int], list[Callable[[], object]]]]:
    result: list[tuple[tuple[int, int, int], list[Callable[[], object]]]] = []
    for shape in ((square, square, square), *MINILM_SHAPES):
        rows, inner, outer = shape
        left, weight = torch.randn(rows, inner), torch.randn(outer, inner)
        onednn = Linear(weight, None)
        result.append((shape, [partial(torch.nn.functional.linear, left, weight), partial(onednn, left)]))
    return result


def _fastest(products: Sequence[Callable[[], object]], shape: tuple[int, int, int]) -> float:
    """FLOP/s of the fastest implementation of one product, in its best round."""
    rows, inner, outer = shape
    shortest = float("inf")
    for product in products:
        product()
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            product()
            shortest = min(shortest, time.perf_counter() - started)
    return 2 * rows * inner * outer / shortest


if __name__ == "__main__":
    print(float32_peak(int(sys.argv[1]), square=int(sys.argv[2])))

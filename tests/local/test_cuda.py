"""On a GPU: the reference's vectors, CUDA graphs, the varlen kernels, concurrent callers, and running out of memory.

``make test-gpu`` runs these if PyTorch finds a CUDA device, which is hidden from all other tests.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import anyio
import numpy as np
import pytest
import torch
from benchmarks.bulk import encode
from torch.nn.functional import gelu, layer_norm, linear

from embeddings_mcp.assemble import build_service
from embeddings_mcp.embedders.local.attention import _attend_runs, attend
from embeddings_mcp.embedders.local.cuda_graphs import GraphedTransformer
from embeddings_mcp.embedders.local.encoder import Encoder, load_encoder
from embeddings_mcp.embedders.local.linear import Linear
from embeddings_mcp.embedders.local.norm import Norm, _fused_kernel
from embeddings_mcp.embedders.local.out_of_memory import split_on_oom
from embeddings_mcp.embedders.local.packing import Packing
from embeddings_mcp.models import Precision, find_card
from embeddings_mcp.settings import Settings
from tests.local.golden import Case, FamilyName, encoder, family
from tests.local.test_golden import BATCHES, CASES, calls, cut, embed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="PyTorch finds no CUDA device; where there is one, `make test-gpu` runs it",
    ),
]


@pytest.mark.parametrize(("name", "batch"), [*CASES, *BATCHES])
def test_the_vectors_are_those_of_the_reference(name: FamilyName, batch: Case | tuple[Case, ...]) -> None:
    for cases in calls((batch,) if isinstance(batch, Case) else batch):
        embedded = embed(encoder(name, min(case.max_length for case in cases)), cases)
        for vectors, case in zip(embedded.vectors[:, None], cases, strict=True):
            np.testing.assert_allclose(cut(vectors, case)[0], case.vector, rtol=0, atol=family(name).tolerance)


NAMES: tuple[FamilyName, ...] = ("bge-m3", "e5", "llama-nemotron-embed", "nemotron-3-embed")
WORDS = ["water", "bridge", "the", "of", "a", "committee", "opinion", "letter", "garden", "mountain"]


@functools.cache
def on_cuda(name: FamilyName, precision: Precision, *, graphs: bool) -> Encoder:
    golden = family(name)
    builtin_card = find_card(golden.model)
    loaded = load_encoder(
        golden.model, golden.folder, builtin_card=builtin_card, device="cuda", precision=precision, cuda_graphs=graphs
    )
    assert isinstance(loaded._transformer, GraphedTransformer) == graphs
    return loaded


@pytest.fixture(scope="module")
def texts() -> list[str]:
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS, size=size)) for size in (1, 2, 3, 5, 8, 13, 21, 34, 55, 1, 1, 40, 40, 9)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 5e-6), ("bfloat16", 2e-2)])
def test_replayed_graphs_give_the_vectors_of_eager_passes(
    name: FamilyName, precision: Precision, tolerance: float, texts: list[str]
) -> None:
    graphed, eager = (on_cuda(name, precision, graphs=graphs) for graphs in (True, False))
    transformer = graphed._transformer
    assert isinstance(transformer, GraphedTransformer)
    assert all(transformer.graph_for([length]) for length in (1, 20, 60)), "launching takes longer than running"

    expected = encode(eager, texts, truncate="END").vectors
    together = encode(graphed, texts, truncate="END").vectors
    alone = np.concatenate([encode(graphed, [text], truncate="END").vectors for text in texts])

    assert np.abs(together - expected).max() < tolerance
    assert np.abs(alone - expected).max() < tolerance


def test_texts_launched_while_others_are_tokenized_get_their_own_vectors(texts: list[str]) -> None:
    model = on_cuda("e5", "float32", graphs=True)
    alone = np.concatenate([encode(model, [text], truncate="END").vectors for text in texts])
    # Some 100,000 tokens, in batches of 16,384.
    places = np.random.default_rng(1).integers(len(texts), size=5000)

    together = encode(model, [texts[place] for place in places], truncate="END").vectors

    assert np.abs(together - alone[places]).max() < 5e-6


def test_threads_that_replay_at_the_same_time_get_their_own_vectors(texts: list[str]) -> None:
    model = on_cuda("e5", "float32", graphs=True)
    expected = [encode(model, [text], truncate="END").vectors for text in texts]
    start = threading.Barrier(len(texts))

    def ask(index: int) -> float:
        start.wait(timeout=60)
        results = [encode(model, [texts[index]], truncate="END").vectors for _ in range(50)]
        return max(float(np.abs(vectors - expected[index]).max()) for vectors in results)

    with ThreadPoolExecutor(len(texts)) as pool:
        assert max(pool.map(ask, range(len(texts)), timeout=120)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["", "grouped"])
@pytest.mark.parametrize("width", [4, 8, 10, 32, 64, 80, 128, 256])
@pytest.mark.parametrize("lengths", [(300, 17, 17, 513, 1), (30, 17, 17, 64, 1)], ids=["long", "short"])
def test_the_kernels_of_this_gpu_give_the_results_of_the_runs(
    dtype: torch.dtype, heads: tuple[int, int], width: int, lengths: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    tensors = [torch.randn(sum(lengths), count, width, generator=generator) for count in (heads[0], heads[1], heads[1])]
    cpu_packing = Packing(lengths, max(lengths), ends)
    cuda_packing = Packing(lengths, max(lengths), ends.cuda())
    on_gpu = [tensor.to("cuda", dtype) for tensor in tensors]
    for causal in (False, True):
        for reach in (None, 0, 50):
            query, key, value = (tensor.double() for tensor in tensors)
            expected = _attend_runs(query, key, value, cpu_packing, None, causal=causal, reach=reach)
            result = attend(on_gpu[0], on_gpu[1], on_gpu[2], cuda_packing, causal=causal, reach=reach).double().cpu()
            assert (result - expected).norm() / expected.norm() < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [10, 384, 1000, 1024])
def test_a_fused_norm_of_a_sum_is_at_least_as_exact_as_two_kernels(dtype: torch.dtype, width: int) -> None:
    pytest.importorskip("triton", reason="Triton, which compiles the kernel, is not installed")
    generator = torch.Generator().manual_seed(0)
    rows, others = (torch.randn(300, width, generator=generator).to("cuda", dtype) for _ in range(2))
    weight, bias = (torch.randn(width, generator=generator).to("cuda", dtype) for _ in range(2))
    norm, eye = Norm(weight, bias, 1e-5), torch.eye(width, device="cuda", dtype=dtype)
    exact = layer_norm((rows.double() + others.double()), (width,), weight.double(), bias.double(), 1e-5)

    fused = norm.linear_add_norm(Linear(eye, None), rows, others)

    assert norm._add_norm is not None, "the kernel is not available"
    error = (fused.double() - exact).norm()
    assert error <= (norm(rows + others).double() - exact).norm() * 1.1
    assert error / exact.norm() < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]


def test_without_a_compiler_norms_are_computed_by_pytorch(monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> None:
    expected = encode(on_cuda("e5", "float32", graphs=True), texts, truncate="END").vectors
    _fused_kernel.cache_clear()
    monkeypatch.setitem(sys.modules, "embeddings_mcp.embedders.local.fused_norm", None)
    unfused = encode(on_cuda.__wrapped__("e5", "float32", graphs=True), texts, truncate="END").vectors
    _fused_kernel.cache_clear()
    assert np.abs(unfused - expected).max() < 5e-6


def test_gelu_fused_into_a_product_in_bfloat16_is_more_exact_than_a_separate_one() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 384, generator=generator).to("cuda", torch.bfloat16)
    weight = (torch.randn(1536, 384, generator=generator) / 8).to("cuda", torch.bfloat16)
    bias = torch.randn(1536, generator=generator).to("cuda", torch.bfloat16)
    exact = gelu(linear(rows.double(), weight.double(), bias.double()))
    assert exact.abs().max() > 5, "the outputs must cover both sides of the bend of GELU"

    fused = Linear(weight, bias).gelu(rows).double()

    separate = gelu(linear(rows, weight, bias)).double()
    assert (fused - exact).norm() < (separate - exact).norm()


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Limit the GPU's memory so that a large batch does not fit."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("little_memory")
def test_a_batch_too_large_for_the_gpu_is_computed_in_halves() -> None:
    model = on_cuda("e5", "float32", graphs=True)
    (tokens,) = model.tokenize(["water bridge " * 20], input_type=None, truncate="END")
    rows = tokens.rows * 20_000
    with pytest.raises(torch.OutOfMemoryError):
        model.forward(rows, tokens.skip)
    vectors = np.stack(split_on_oom(lambda part: list(model.forward(part, tokens.skip)), rows))
    assert np.abs(vectors - vectors[0]).max() < 2e-6


@pytest.mark.anyio
async def test_callers_of_a_server_on_the_gpu_get_the_vectors_of_their_own_texts(texts: list[str]) -> None:
    golden = family("bge-m3")
    settings = Settings(models=(f"mine={golden.folder}",), device="cuda", precision="float32", cache="off")
    embedder = build_service(settings).catalog.default
    assert embedder is not None
    expected = encode(on_cuda("bge-m3", "float32", graphs=False), texts, truncate="END").vectors
    errors: list[float] = []

    async def ask(offset: int) -> None:
        order = [(offset + place) % len(texts) for place in range(len(texts))]
        embedded = await embedder.embed([texts[index] for index in order], input_type=None, truncate="END")
        errors.append(float(np.abs(embedded.vectors - expected[order]).max()))

    with anyio.fail_after(120):
        async with anyio.create_task_group() as callers:
            for offset in range(32):
                callers.start_soon(ask, offset)
    await embedder.aclose()
    assert len(errors) == 32
    assert max(errors) < 5e-6

"""Large models in bfloat16 on a GPU, compared with sentence-transformers: ``python -m benchmarks.gpu``.

It needs only numpy, torch, transformers, tokenizers and safetensors, since machines with a GPU often have little else.
If sentence-transformers is not installed, a reimplementation takes its place: padded batches of texts sorted by length.
If the server's packages are not installed, its queue is left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tests.local.golden import MODELS, Case, Family, FamilyName, family
from tokenizers import Tokenizer as FastTokenizer

from benchmarks.bulk import encode
from benchmarks.contenders import ours_served
from benchmarks.machine import describe
from benchmarks.shapes import BERT_LARGE, BERT_SMALL, LLAMA_1B, TINY_BERT, TINY_LLAMA, Shape, write
from benchmarks.table import number, ratio, show
from benchmarks.workloads import texts
from embeddings_mcp.embedders.local.encoder import Encoder, load_encoder
from embeddings_mcp.errors import ModelUnavailable
from embeddings_mcp.models import Truncate, find_card
from embeddings_mcp.vectors import FloatMatrix, shorten

NO_GPU = 3
"""Exit code if there is no GPU."""

_AIMS = {LLAMA_1B.name: "aim: at least 3.00x, and at least 45 % of the peak", BERT_LARGE.name: "aim: at least 3.00x"}

_PRECISIONS: tuple[Literal["float32"], Literal["bfloat16"]] = ("float32", "bfloat16")

_ROUNDS = 3

_QUERIES = 20
"""Single queries in each round."""

_PRODUCTS = 8
"""Matrix products per time measurement."""

Embed = Callable[[Sequence[str]], FloatMatrix]


@dataclass(frozen=True, slots=True)
class _Setting:
    """Device and workload of the measurements."""

    device: str
    golden: Sequence[FamilyName]
    shapes: Sequence[Shape]
    count: int
    square: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code: 1 if vectors differ from the reference, 3 if there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--tiny", action="store_true", help="tiny models, on a CPU if there is no GPU, to check that it runs"
    )
    options = parser.parse_args(arguments)
    if torch.cuda.is_available():
        device = "cuda"
    elif options.tiny:
        device = "cpu"
    else:
        sys.stderr.write("benchmarks.gpu: PyTorch finds no CUDA device on this machine: nothing was measured\n")
        return NO_GPU
    setting = (
        _Setting(device, ["bge-m3", "llama-nemotron-embed"], [TINY_BERT, TINY_LLAMA], count=40, square=256)
        if options.tiny
        else _Setting(device, list(MODELS), [LLAMA_1B, BERT_LARGE, BERT_SMALL], count=4096, square=8192)
    )
    gpu = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    print(f"## On a GPU\n\n{gpu}; {describe()}")
    exact = _show_golden(setting)
    for shape in setting.shapes:
        _show_shape(shape, setting)
    return 0 if exact else 1


# --- Accuracy of the vectors -----------------------------------------------------------------------------------------


def _show_golden(setting: _Setting) -> bool:
    """Compare with the reference vectors of tests/golden; returns whether float32 is within the tolerances."""
    rows, missing, exact = [], [], True
    for name in setting.golden:
        golden = family(name)
        row = [name, f"{golden.tolerance:.0e}"]
        try:
            for precision in _PRECISIONS:
                difference, cosine = _largest_deviation(golden, setting.device, precision)
                exact &= precision != "float32" or difference <= golden.tolerance
                row += [f"{difference:.1e}", f"{1 - cosine:.1e}"]
        except ModelUnavailable as error:
            missing.append(f"missing: {name}: {error}")
        else:
            rows.append(row)
    header = [
        "",
        "tolerance",
        "float32: largest difference",
        "1 - cosine",
        "bfloat16: largest difference",
        "1 - cosine",
    ]
    show("Reference vectors of tests/golden, alone and in their batches", header, rows, *missing)
    return exact


def _largest_deviation(golden: Family, device: str, precision: Literal["float32", "bfloat16"]) -> tuple[float, float]:
    """Largest difference and lowest cosine between any vector and its reference."""
    encoders: dict[int, Encoder] = {}
    largest, least = 0.0, 1.0
    for group in (*((case,) for case in golden.cases), *golden.batches):
        for calls in _calls(group):
            limit = min(case.max_length for case in calls)
            if limit not in encoders:
                encoders[limit] = load_encoder(
                    golden.model,
                    golden.folder,
                    builtin_card=find_card(golden.model),
                    device=device,
                    precision=precision,
                    max_tokens=limit,
                )
            truncate: Truncate = "END" if any(case.truncate == "END" for case in calls) else calls[0].truncate
            result = encode(
                encoders[limit], [case.text for case in calls], input_type=calls[0].input_type, truncate=truncate
            )
            for case, full in zip(calls, result.vectors, strict=True):
                vector = full if case.dimensions is None else shorten(full[None], case.dimensions)[0]
                largest = max(largest, float(np.abs(vector - case.vector).max()))
                lengths = float(np.linalg.norm(vector) * np.linalg.norm(case.vector))
                least = min(least, float(vector @ case.vector.ravel()) / lengths)
    return largest, least


def _calls(cases: Sequence[Case]) -> list[list[Case]]:
    """Group the cases that fit into one call, which has one input type, token limit and number of dimensions."""
    kinds: dict[object, list[Case]] = {}
    for case in cases:
        kinds.setdefault((case.input_type, case.max_length, case.dimensions), []).append(case)
    return list(kinds.values())


# --- Speed -----------------------------------------------------------------------------------------------------------


def _show_shape(shape: Shape, setting: _Setting) -> None:
    on_gpu = setting.device == "cuda"
    workload = texts("to512" if on_gpu else "mixed", setting.count)
    queries = texts("query", _QUERIES)
    peak = _matrix_peak(setting)
    with tempfile.TemporaryDirectory() as parent:
        folder = write(shape, Path(parent) / "model", torch.bfloat16)
        encoder = load_encoder("random", folder, device=setting.device, precision="bfloat16")
        counts = _tokens(encoder, workload)
        flops = sum(map(shape.flops, counts))
        embedders: dict[str, Embed] = {"ours": lambda batch: encode(encoder, batch, truncate="END").vectors}
        embedders |= _served(folder, setting.device)
        embedders |= _peers(folder, shape, setting.device)
        batch_seconds: dict[str, list[float]] = {name: [] for name in embedders}
        query_seconds: dict[str, list[float]] = {name: [] for name in embedders}
        outputs = {name: embed(workload) for name, embed in embedders.items()}  # also the warm-up
        for _ in range(_ROUNDS):
            for name, embed in embedders.items():
                batch_seconds[name].append(_seconds(partial(embed, workload)))
                query_seconds[name] += [_seconds(partial(embed, [query])) for query in queries]
        tokenizing = _seconds(lambda: _tokens(encoder, workload))
    rows = []
    for name, seconds in batch_seconds.items():
        middle = statistics.median(seconds)
        faster = statistics.median(theirs / ours for theirs, ours in zip(seconds, batch_seconds["ours"], strict=True))
        least_cosine = (outputs[name] * outputs["ours"]).sum(axis=1).min()
        rows.append(
            [
                name,
                number(len(workload) / middle),
                number(sum(counts) / middle),
                f"{flops / middle / peak:.1%}",
                "" if name == "ours" else ratio(faster),
                number(statistics.median(query_seconds[name]) * 1000),
                f"{least_cosine:.4f}",
            ]
        )
    header = [
        "",
        "texts/s",
        "tokens/s",
        "of the matrix peak",
        "ours is faster by",
        "one query alone, ms",
        "least cosine to ours",
    ]
    show(
        f"{shape.name}, bfloat16, random weights: {len(workload):,} texts of mixed length",
        header,
        rows,
        f"{sum(counts):,} tokens, {min(counts)}-{max(counts)} each; tokenizing them takes ours {number(tokenizing)} s",
        f"measured peak of bfloat16 products: {peak / 1e12:.3g} TFLOP/s",
        *([_AIMS[shape.name]] if shape.name in _AIMS else []),
    )


def _tokens(encoder: Encoder, batch: Sequence[str]) -> list[int]:
    """Number of tokens of each text."""
    return [count for some in encoder.tokenize(batch, input_type=None, truncate="END") for count in some.counts]


def _served(folder: Path, device: str) -> dict[str, Embed]:
    """Our embedder as the server runs it, with its queue; empty if the server's packages are not installed."""
    try:
        return {"ours, served": ours_served(folder, 0, precision="bfloat16", device=device)}
    except ImportError:
        return {}


def _peers(folder: Path, shape: Shape, device: str) -> dict[str, Embed]:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return {
            f"padded batches of {size} (sentence-transformers is not installed)": _padded(folder, shape, device, size)
            for size in (32, 128)
        }
    model = SentenceTransformer(str(folder), device=device, model_kwargs={"dtype": torch.bfloat16})

    def embed(batch: Sequence[str], size: int) -> FloatMatrix:
        vectors: FloatMatrix = model.encode(
            list(batch), batch_size=size, show_progress_bar=False, convert_to_tensor=True
        ).float().cpu().numpy()  # fmt: skip
        return vectors

    return {f"sentence-transformers, batches of {size}": partial(embed, size=size) for size in (32, 128)}


def _padded(folder: Path, shape: Shape, device: str, size: int) -> Embed:
    """Reimplement ``SentenceTransformer.encode``: longest texts first, in batches of `size`, padded to the longest."""
    from transformers import AutoModel

    model: Any = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval().to(device)
    tokenizer = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(shape.max_tokens)
    tokenizer.enable_padding(pad_id=0)

    @torch.inference_mode()
    def embed(batch: Sequence[str]) -> FloatMatrix:
        order = sorted(range(len(batch)), key=lambda index: -len(batch[index]))
        parts = []
        for start in range(0, len(order), size):
            encodings = tokenizer.encode_batch([batch[index] for index in order[start : start + size]])
            ids = torch.tensor([encoding.ids for encoding in encodings]).to(device)
            mask = torch.tensor([encoding.attention_mask for encoding in encodings]).to(device)
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            pooled = (hidden * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
            parts.append(torch.nn.functional.normalize(pooled.float(), dim=1))
        vectors = np.empty((len(batch), shape.config["hidden_size"]), dtype=np.float32)
        vectors[order] = torch.cat(parts).cpu().numpy()
        return vectors

    return embed


def _seconds(work: Callable[[], object]) -> float:
    _synchronize()
    started = time.perf_counter()
    work()
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.inference_mode()
def _matrix_peak(setting: _Setting) -> float:
    """Highest FLOP/s of square bfloat16 matrix products of two sizes."""
    best = 0.0
    for edge in (setting.square // 2, setting.square):
        left, right = (torch.randn(edge, edge, device=setting.device, dtype=torch.bfloat16) for _ in range(2))

        def run(left: torch.Tensor = left, right: torch.Tensor = right) -> None:
            for _ in range(_PRODUCTS):
                left @ right

        run()
        best = max(best, _PRODUCTS * 2 * edge**3 / min(_seconds(run) for _ in range(5)))
    return best


if __name__ == "__main__":
    sys.exit(main())

"""MiniLM on a CPU, compared with sentence-transformers, onnxruntime and infinity-emb: ``python -m benchmarks.cpu``."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.contest import Contender, Job, Result, contenders, float32_peak, median, speed_up, take_turns
from benchmarks.machine import cores, describe
from benchmarks.shapes import BERT_LARGE, MINILM, TINY_BERT, Shape, write
from benchmarks.table import number, ratio, show
from benchmarks.workloads import texts
from embeddings_mcp.embedders.local.locate import locate
from embeddings_mcp.embedders.local.tokenizer_files import read_tokenizer
from embeddings_mcp.models import DEFAULT_MODEL
from embeddings_mcp.vectors import FloatMatrix

ST, ORT, ORT_INT8, INFINITY = "sentence-transformers", "onnxruntime", "onnxruntime int8", "infinity-emb torch"


@dataclass(frozen=True, slots=True)
class Aim:
    """The speed-up that we aim for over two peers."""

    sentence_transformers: float
    onnxruntime: float


@dataclass(frozen=True, slots=True)
class Section:
    """Contenders that take turns at a list of jobs.

    Attributes:
        title: of its tables.
        threads: compute threads of each contender.
        names: the contenders, ours first.
        jobs: title, job and aim of each.
        onnx: the onnxruntime contender that the speed-up is relative to.
        shape: the model; MiniLM has its real weights, all others have random ones.
    """

    title: str
    threads: int
    names: Sequence[str]
    jobs: Sequence[tuple[str, Job, Aim | None]]
    onnx: str = ORT
    shape: Shape = MINILM


SHORT, MIXED, LONG = Job("short", 1000), Job("mixed", 1000), Job("long", 200)
QUERIES = Job("query", 80, apart=True)


def _sections() -> dict[str, Section]:
    short, mixed = "1,000 short texts (5-30 tokens)", "1,000 texts of mixed length (8-256)"
    long, queries = "200 texts of 256 tokens", "one query at a time (6-16 tokens)"
    return {
        "one": Section(
            "One thread each, float32",
            1,
            ["ours", ST, ORT, INFINITY],
            [
                (short, SHORT, Aim(1.5, 1.0)),
                (mixed, MIXED, Aim(1.9, 1.0)),
                (long, LONG, Aim(1.05, 1.0)),
                (queries, QUERIES, Aim(1 / 0.6, 1 / 1.5)),
            ],
        ),
        "int8": Section(
            "One thread each, int8",
            1,
            ["ours int8", ST, ORT_INT8],
            [(short, SHORT, None), (mixed, MIXED, Aim(3.0, 1.3)), (long, LONG, None), (queries, QUERIES, None)],
            onnx=ORT_INT8,
        ),
        "bfloat16": Section(
            "One thread each, bfloat16",
            1,
            ["ours bfloat16", ST, f"{ST} bfloat16", ORT_INT8],
            [
                (short, SHORT, None),
                (mixed, MIXED, None),
                (f"{mixed}, other lengths in each round", Job("varied", 1000), None),
                (long, LONG, None),
                (queries, QUERIES, None),
            ],
            onnx=ORT_INT8,
        ),
        "all": Section(
            f"All {cores()} cores: ours with the server's default workers, each peer with as many threads",
            cores(),
            ["ours, served", "ours int8, served", ST, ORT, INFINITY],
            [
                (short, SHORT, Aim(1.6, 1.05)),
                (mixed, MIXED, Aim(1.8, 1.05)),
                (long, LONG, Aim(1.3, 1.05)),
                (queries, QUERIES, None),
            ],
        ),
        "large": Section(
            f"{BERT_LARGE.name}, random weights, all {cores()} cores",
            cores(),
            ["ours, served", ST],
            [("24 texts of mixed length (8-256)", Job("mixed", 24), None)],
            shape=BERT_LARGE,
        ),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the selected sections."""
    sections = _sections()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--section", choices=sections, action="append", help="run only this section; may be repeated")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (default: 5)")
    parser.add_argument("--tiny", action="store_true", help="only a few texts, to check that it runs")
    options = parser.parse_args(arguments)
    print(f"## Local embedding on a CPU\n\n{describe()}")
    for key, section in sections.items():
        if key in (options.section or sections):
            _run(section, options.rounds, tiny=options.tiny)


def _run(section: Section, rounds: int, *, tiny: bool) -> None:
    square = 256 if tiny else 2048
    peaks = [float32_peak(section.threads, square=square)]
    with (
        _folder(section.shape, tiny=tiny) as folder,
        contenders(section.names, folder, section.threads) as (present, missing),
    ):
        tokenizer = read_tokenizer(folder, max_tokens=256)
        for title, full, aim in section.jobs[-1:] if tiny else section.jobs:
            job = replace(full, count=max(4, full.count // 100)) if tiny else full
            results = take_turns(present, job, rounds)
            peaks.append(float32_peak(section.threads, square=square))
            lengths = [len(row) for row in tokenizer.encode(texts(job.workload, job.count), prompt="", truncate="END")]
            work = _Work(job, sum(lengths), sum(map(section.shape.flops, lengths)), max(peaks))
            header, rows = _compare(section, work, results, aim)
            tokens = f"{work.tokens:,} tokens; the machine's peak is {work.peak / 1e9:.0f} GFLOP/s"
            show(f"{section.title}: {title}", header, rows, tokens, *(f"missing: {reason}" for reason in missing))
        _show_fidelity(section, present, tiny=tiny)
        loads = ", ".join(f"{contender.name} {contender.load_seconds:.1f} s" for contender in present)
        print(f"- to import and load: {loads}")
    print(f"- peaks of float32 products measured in between, GFLOP/s: {', '.join(f'{at / 1e9:.0f}' for at in peaks)}")


@contextlib.contextmanager
def _folder(shape: Shape, *, tiny: bool) -> Iterator[Path]:
    """The folder of the checkpoint."""
    if shape is MINILM:
        yield locate(DEFAULT_MODEL, DEFAULT_MODEL)
        return
    with tempfile.TemporaryDirectory() as parent:
        yield write(TINY_BERT if tiny else shape, Path(parent) / "model")


@dataclass(frozen=True, slots=True)
class _Work:
    """The size of a job.

    Attributes:
        job: the job.
        tokens: total of all texts.
        flops: operations that the model needs for all texts.
        peak: highest FLOP/s that the machine reached in this run.
    """

    job: Job
    tokens: int
    flops: int
    peak: float


def _compare(
    section: Section, work: _Work, results: Mapping[str, Sequence[Result]], aim: Aim | None
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a job's table."""
    apart, count = work.job.apart, work.job.count
    header = ["", "ms a text" if apart else "texts/s", "wall s", "CPU s"]
    header += [f"x {peer}, wall / CPU" for peer in (ST, section.onnx)] + ["of peak"]
    rows = []
    for name, rounds in results.items():
        middle = median(rounds)
        row = [name, number(middle.wall * 1000 if apart else count / middle.wall), number(middle.wall)]
        row.append(number(middle.cpu))
        for peer in (ST, section.onnx):
            faster = speed_up(rounds, results[peer]) if peer in results else None
            row.append("-" if faster is None else f"{ratio(faster.wall)} / {ratio(faster.cpu)}")
        share = work.flops / (count if apart else 1) / middle.wall / work.peak
        rows.append([*row, "-" if "int8" in name or "bfloat16" in name else f"{share:.0%}"])
    if aim is not None:
        aims = [f">= {ratio(least)}" for least in (aim.sentence_transformers, aim.onnxruntime)]
        rows.append(["*aim for ours*", "", "", "", *aims, ""])
    return header, rows


# --- Accuracy of the vectors -----------------------------------------------------------------------------------------


def _show_fidelity(section: Section, present: Sequence[Contender], *, tiny: bool) -> None:
    """Compare the vectors with those of sentence-transformers, and the order in which they rank pairs of texts."""
    if ST not in [contender.name for contender in present]:
        return
    job = Job("mixed", 8 if tiny else 200)
    with tempfile.TemporaryDirectory() as folder:
        vectors_of: dict[str, FloatMatrix] = {}
        for position, contender in enumerate(present):
            path = Path(folder) / f"{position}.npy"
            contender.perform(job, save=path)
            vectors_of[contender.name] = np.load(path)
    reference = vectors_of[ST]
    rows = []
    for name, vectors in vectors_of.items():
        cosines = (vectors * reference).sum(axis=1) / np.linalg.norm(vectors, axis=1)
        rows.append(
            [
                name,
                f"{np.abs(vectors - reference).max():.1e}",
                f"{cosines.mean():.5f}",
                f"{cosines.min():.5f}",
                f"{_rank_correlation(_pairs(vectors), _pairs(reference)):.4f}",
            ]
        )
    header = ["", "largest difference", "mean cosine", "least cosine", "order of pairs (Spearman)"]
    show(
        f"{section.title}: vectors compared with those of {ST}",
        header,
        rows,
        f"{job.count} texts of mixed length, all pairs",
    )


def _pairs(vectors: FloatMatrix) -> FloatMatrix:
    """Cosine similarity of every pair."""
    scores: FloatMatrix = (vectors @ vectors.T)[np.triu_indices(len(vectors), k=1)]
    return scores


def _rank_correlation(left: FloatMatrix, right: FloatMatrix) -> float:
    """Spearman's rank correlation: 1 if both order the pairs in the same way."""
    return float(np.corrcoef(left.argsort().argsort(), right.argsort().argsort())[0, 1])


if __name__ == "__main__":
    main()

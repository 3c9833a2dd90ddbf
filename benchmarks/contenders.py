"""The contenders, each run in its own process: ``python -m benchmarks.contenders NAME FOLDER THREADS``.

The process loads its contender and then runs jobs, one line of JSON each, until the end of its stdin (see `contest`).
Peers run this file in their own environment, so only the standard library is imported before the contender is known.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.process import peak_megabytes
from benchmarks.workloads import texts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Precision = Literal["float32", "bfloat16", "int8"]
    Vectors = NDArray[np.float32]
    Embed = Callable[[Sequence[str]], Vectors]

_MAX_TOKENS = 256
"""Longest text that MiniLM accepts, in tokens."""

_ONNX_BATCH = 16
"""Batch size for onnxruntime: the fastest of 16, 32 and 64 for every workload."""


# --- Ours ------------------------------------------------------------------------------------------------------------


def ours(folder: Path, threads: int, *, precision: Precision = "float32") -> Embed:
    """Our encoder, called directly from one thread."""
    import torch

    from benchmarks.bulk import encode
    from embeddings_mcp.embedders.local.encoder import load_encoder

    torch.set_num_threads(threads)
    encoder = load_encoder("benchmark", folder, device="cpu", precision=precision)
    return lambda batch: encode(encoder, batch, truncate="END").vectors


def ours_served(folder: Path, _threads: int, *, precision: Precision = "float32", device: str = "cpu") -> Embed:
    """Our embedder as the server runs it, with its queue and default number of workers."""
    from embeddings_mcp.assemble import build_service
    from embeddings_mcp.settings import Settings

    loop = asyncio.new_event_loop()
    settings = Settings(models=(f"benchmark={folder}",), device=device, precision=precision, cache="off")
    embedder = build_service(settings).catalog.default
    assert embedder is not None, "the default model is served"
    loop.run_until_complete(embedder.check())

    def embed(batch: Sequence[str]) -> Vectors:
        return loop.run_until_complete(embedder.embed(batch, input_type=None, truncate="END")).vectors

    return embed


# --- Peers -----------------------------------------------------------------------------------------------------------


def sentence_transformers(folder: Path, threads: int, *, precision: Precision = "float32") -> Embed:
    """``SentenceTransformer.encode`` with its defaults, except for the precision."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": getattr(torch, precision)})

    def embed(batch: Sequence[str]) -> Vectors:
        vectors: Vectors = model.encode(list(batch), show_progress_bar=False)
        return vectors

    return embed


def onnxruntime(folder: Path, threads: int, *, int8: bool = False) -> Embed:
    """A plain inference session on texts sorted by length, with the model's pooling."""
    import numpy as np
    import onnxruntime as ort
    from tokenizers import Tokenizer

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(
        str(exported() / ("model_quantized.onnx" if int8 else "model.onnx")),
        options,
        providers=["CPUExecutionProvider"],
    )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(_MAX_TOKENS)

    def embed(batch: Sequence[str]) -> Vectors:
        rows = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(batch))]
        vectors: list[Any] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        for start in range(0, len(order), _ONNX_BATCH):
            chosen = order[start : start + _ONNX_BATCH]
            ids = np.zeros((len(chosen), len(rows[chosen[-1]])), dtype=np.int64)
            mask = np.zeros_like(ids)
            for position, index in enumerate(chosen):
                ids[position, : len(rows[index])] = rows[index]
                mask[position, : len(rows[index])] = 1
            inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
            (hidden,) = session.run(["last_hidden_state"], inputs)
            weights = mask[:, :, None].astype(np.float32)
            pooled = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
            pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
            for index, vector in zip(chosen, pooled, strict=True):
                vectors[index] = vector
        return np.stack(vectors)

    return embed


def infinity(folder: Path, threads: int, *, engine: str) -> Embed:
    """infinity-emb's engine without its server."""
    import numpy as np
    import torch
    from infinity_emb import AsyncEmbeddingEngine, EngineArgs

    torch.set_num_threads(threads)
    arguments = EngineArgs(
        model_name_or_path=str(exported() if engine == "optimum" else folder),
        engine=engine,
        device="cpu",
        model_warmup=False,
    )
    loop = asyncio.new_event_loop()
    embedding_engine = AsyncEmbeddingEngine.from_args(arguments)
    loop.run_until_complete(embedding_engine.astart())

    def embed(batch: Sequence[str]) -> Vectors:
        vectors, _tokens = loop.run_until_complete(embedding_engine.embed(sentences=list(batch)))
        return np.stack(vectors)

    return embed


def exported() -> Path:
    """Folder of the ONNX model that `make bench-peers` exported, in the peers' environment."""
    return Path(sys.prefix) / "minilm-onnx"


CONTENDERS: Mapping[str, Callable[[Path, int], Embed]] = {
    "ours": ours,
    "ours bfloat16": lambda folder, threads: ours(folder, threads, precision="bfloat16"),
    "ours int8": lambda folder, threads: ours(folder, threads, precision="int8"),
    "ours, served": ours_served,
    "ours int8, served": lambda folder, threads: ours_served(folder, threads, precision="int8"),
    "sentence-transformers": sentence_transformers,
    "sentence-transformers bfloat16": lambda folder, threads: sentence_transformers(
        folder, threads, precision="bfloat16"
    ),
    "onnxruntime": onnxruntime,
    "onnxruntime int8": lambda folder, threads: onnxruntime(folder, threads, int8=True),
    "infinity-emb torch": lambda folder, threads: infinity(folder, threads, engine="torch"),
}

PEERS = frozenset({"onnxruntime", "onnxruntime int8", "infinity-emb torch"})
"""Contenders that run in the peers' environment."""


# --- Jobs ------------------------------------------------------------------------------------------------------------


def perform(embed: Embed, job: Mapping[str, Any]) -> dict[str, Any]:
    """Embed the texts of a workload and measure it.

    Args:
        embed: the contender.
        job: ``workload``, ``count``, ``seed``; ``apart``: whether to embed the texts one by one; ``save``: a file for
            the vectors, or null.

    Returns:
        ``wall`` and ``cpu`` in seconds, for the median text if ``apart``; ``peak_megabytes`` of the process.
    """
    workload = texts(job["workload"], job["count"], seed=job["seed"])
    calls = [[text] for text in workload] if job["apart"] else [workload]
    walls, cpus, results = [], [], []
    for batch in calls:
        cpu, wall = time.process_time(), time.perf_counter()
        vectors = embed(batch)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        results.append(vectors)
    if job["save"]:
        import numpy as np

        np.save(job["save"], np.concatenate(results))
    middle = len(calls) // 2
    return {"wall": sorted(walls)[middle], "cpu": sorted(cpus)[middle], "peak_megabytes": peak_megabytes()}


def main(name: str, folder: str, threads: str) -> None:
    """Load the contender and run jobs."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep output of libraries off the stream of answers
    started = time.perf_counter()
    embed = CONTENDERS[name](Path(folder), int(threads))
    loaded: dict[str, Any] = {"load": time.perf_counter() - started}
    for answer in itertools.chain([loaded], (perform(embed, json.loads(line)) for line in sys.stdin)):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What is compared, each in a process of its own: ``python -m benchmarks.contenders NAME FOLDER THREADS``.

The process loads its contender and then answers jobs, a line of JSON each, until its stdin ends (see `contest`). Peers
run this file in their own environment, so nothing outside Python's library is imported before the contender is known.
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

_LONGEST = 256
"""Tokens that MiniLM takes."""

_ONNX_BATCH = 16
"""Texts of a batch in onnxruntime: of 16, 32 and 64 the fastest at every workload."""


# --- Ours ------------------------------------------------------------------------------------------------------------


def ours(folder: Path, threads: int, *, precision: Precision = "float32") -> Embed:
    """Our encoder, called from the one thread."""
    import torch

    from benchmarks.bulk import encode
    from embeddings_mcp.embedders.local.encoder import load_encoder

    torch.set_num_threads(threads)
    encoder = load_encoder("benchmark", folder, device="cpu", precision=precision)
    return lambda batch: encode(encoder, batch, truncate="END").vectors


def ours_served(folder: Path, _threads: int, *, precision: Precision = "float32", device: str = "cpu") -> Embed:
    """Our embedder as the server runs it: the queue before the encoder, and as many workers as it finds good."""
    from embeddings_mcp.assemble import build_service
    from embeddings_mcp.settings import Settings

    loop = asyncio.new_event_loop()
    settings = Settings(models=(f"benchmark={folder}",), device=device, precision=precision, cache="off")
    embedder = build_service(settings).catalogue.default
    assert embedder is not None, "the default model is served"
    loop.run_until_complete(embedder.check())

    def embed(batch: Sequence[str]) -> Vectors:
        return loop.run_until_complete(embedder.embed(batch, input_type=None, truncate="END")).vectors

    return embed


# --- Peers -----------------------------------------------------------------------------------------------------------


def sentence_transformers(folder: Path, threads: int, *, precision: Precision = "float32") -> Embed:
    """``SentenceTransformer.encode`` with its defaults, but for the precision."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": getattr(torch, precision)})

    def embed(batch: Sequence[str]) -> Vectors:
        vectors: Vectors = model.encode(list(batch), show_progress_bar=False)
        return vectors

    return embed


def onnxruntime(folder: Path, threads: int, *, int8: bool = False) -> Embed:
    """A bare session over texts sorted by length, with the pooling that the model wants."""
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
    tokenizer.enable_truncation(_LONGEST)

    def embed(batch: Sequence[str]) -> Vectors:
        rows = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(batch))]
        vectors: list[Any] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        for start in range(0, len(order), _ONNX_BATCH):
            chosen = order[start : start + _ONNX_BATCH]
            ids = np.zeros((len(chosen), len(rows[chosen[-1]])), dtype=np.int64)
            mask = np.zeros_like(ids)
            for place, index in enumerate(chosen):
                ids[place, : len(rows[index])] = rows[index]
                mask[place, : len(rows[index])] = 1
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
    """infinity-emb's engine, which its server runs too, without the server."""
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
    running = AsyncEmbeddingEngine.from_args(arguments)
    loop.run_until_complete(running.astart())

    def embed(batch: Sequence[str]) -> Vectors:
        vectors, _tokens = loop.run_until_complete(running.embed(sentences=list(batch)))
        return np.stack(vectors)

    return embed


def exported() -> Path:
    """Where `make bench-peers` put the model as ONNX, seen from the peers' environment."""
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
"""Which of them run in the peers' environment."""


# --- Jobs ------------------------------------------------------------------------------------------------------------


def perform(embed: Embed, job: Mapping[str, Any]) -> dict[str, Any]:
    """Embed the texts of a workload, and say what it took.

    Args:
        embed: the contender.
        job: ``workload``, ``count``, ``seed``; ``apart``: whether the texts come one by one; ``save``: a file for the
            vectors, or null.

    Returns:
        ``wall`` and ``cpu`` in seconds, of the median text where they come apart; ``peak_megabytes`` of the process.
    """
    wanted = texts(job["workload"], job["count"], seed=job["seed"])
    calls = [[text] for text in wanted] if job["apart"] else [wanted]
    walls, cpus, made = [], [], []
    for batch in calls:
        cpu, wall = time.process_time(), time.perf_counter()
        vectors = embed(batch)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        made.append(vectors)
    if job["save"]:
        import numpy as np

        np.save(job["save"], np.concatenate(made))
    middle = len(calls) // 2
    return {"wall": sorted(walls)[middle], "cpu": sorted(cpus)[middle], "peak_megabytes": peak_megabytes()}


def main(name: str, folder: str, threads: str) -> None:
    """Load the contender and answer jobs."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print what they like, but not between answers
    started = time.perf_counter()
    embed = CONTENDERS[name](Path(folder), int(threads))
    loaded: dict[str, Any] = {"load": time.perf_counter() - started}
    for answer in itertools.chain([loaded], (perform(embed, json.loads(line)) for line in sys.stdin)):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])

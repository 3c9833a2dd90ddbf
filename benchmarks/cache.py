"""The cost of a cache hit, compared with embedding the text: ``python -m benchmarks.cache``.

Everything runs in this process, through the interface that the service uses, with MiniLM on the CPU. Contenders take
turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import anyio
import numpy as np

from benchmarks.machine import describe
from benchmarks.table import number, ratio, show
from benchmarks.workloads import texts
from embeddings_mcp.embedders.base import Embedder, Embeddings, OnRows
from embeddings_mcp.embedders.cache import Cache, CachedEmbedder, DiskStore, MemoryStore
from embeddings_mcp.embedders.local.model_files import ModelFiles
from embeddings_mcp.embedders.local_embedder import LocalEmbedder
from embeddings_mcp.models import DEFAULT_MODEL, ModelCard, find_card

GIB = 1 << 30

TIMES_FASTER = 50
"""Aim for a cached text, compared with embedding it."""

LOOKUP_MILLISECONDS = 50
"""Aim for looking up 1,000 texts out of 100,000."""


async def compare_with_embedding(folder: Path, rounds: int, many: int) -> None:
    """Print a table: one text and many, embedded, and cached in memory and on disk."""
    card = cast("ModelCard", find_card(DEFAULT_MODEL))
    files = ModelFiles(card.id, builtin_card=card, folder=None, repository=None, device="cpu", precision="float32")
    encoder = LocalEmbedder(card, files.load, files.identify)
    disk = DiskStore(folder, GIB)
    contenders: dict[str, Embedder] = {
        "embedded": encoder,
        "from memory": CachedEmbedder(encoder, Cache(MemoryStore(GIB))),
        "from disk": CachedEmbedder(encoder, Cache(MemoryStore(0), disk)),
    }
    rows = []
    for title, workload, count in (
        ("one short text", "query", 1),
        ("one text of 256 tokens", "long", 1),
        (f"{many:,} short texts", "short", many),
    ):
        batch = texts(workload, count)
        reference = await embed(contenders["from memory"], batch)
        await embed(contenders["from disk"], batch)
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds if count == 1 else max(3, rounds // 20)):
            for name, contender in contenders.items():
                elapsed, result = await timed(contender, batch)
                seconds[name].append(elapsed)
                if name == "from memory":
                    assert result.vectors.tobytes() == reference.vectors.tobytes(), "a hit differs from what was stored"
        medians = {name: statistics.median(measured) for name, measured in seconds.items()}
        faster = [ratio(medians["embedded"] / medians[name]) for name in ("from memory", "from disk")]
        rows.append([title, *(number(1e3 * value) for value in medians.values()), *faster])
    show(
        f"MiniLM, one request at a time: milliseconds, medians of {rounds} rounds",
        ["", *contenders, "memory", "disk"],
        rows,
        f"aim: {TIMES_FASTER}x, bit for bit the same",
    )
    await encoder.aclose()
    await disk.aclose()


async def look_up(folder: Path, stored: int, rounds: int) -> None:
    """Print a table: 1,000 random texts out of many, with vectors of several lengths."""
    rows = []
    for dimensions in (384, 1024):
        source = Numbers(dimensions)
        disk = DiskStore(folder / str(dimensions), 4 * GIB)
        embedder = CachedEmbedder(source, Cache(MemoryStore(0), disk))
        start = time.perf_counter()
        for first in range(0, stored, 1000):
            await embed(embedder, source.texts(range(first, first + 1000)))
        fill_seconds = time.perf_counter() - start
        random = np.random.default_rng(0)
        seconds = []
        for _ in range(rounds):
            chosen = random.choice(stored, 1000, replace=False)
            elapsed, result = await timed(embedder, source.texts(chosen))
            assert np.array_equal(result.vectors[:, 0], chosen.astype(np.float32)), "a row belongs to another text"
            seconds.append(elapsed)
        assert source.embedded == stored, "a text was not cached"
        rows.append(
            [
                f"{stored:,} of {dimensions}",
                number(disk.path.stat().st_size / (1 << 20)),
                number(1e6 * fill_seconds / stored),
                number(1e3 * statistics.median(seconds)),
                number(1e3 * max(seconds)),
            ]
        )
        await disk.aclose()
    show(
        f"1,000 random texts from a file: medians of {rounds} rounds",
        ["vectors", "MiB", "stored, µs each", "looked up, ms", "slowest, ms"],
        rows,
        f"aim: {LOOKUP_MILLISECONDS} ms; this includes keys, checksums and the matrix of the response",
    )


class Numbers:
    """An embedder of numbers: every component of a text's vector is the number that the text starts with."""

    origin = "local"

    def __init__(self, dimensions: int) -> None:
        self.card = ModelCard(id=f"benchmark/{dimensions}", dimensions=dimensions)
        self.embedded = 0

    @staticmethod
    def texts(numbers: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[str]:
        """Texts for these numbers, about as long as a sentence."""
        return [f"{number} is the number of this text, which is about as long as a sentence is" for number in numbers]

    async def identify(self) -> str:
        """See `Embedder.identify`."""
        return self.card.id

    async def embed(
        self,
        texts: Sequence[str],
        *,
        on_rows: OnRows | None = None,
        **_options: object,
    ) -> Embeddings:
        """See `Embedder.embed`."""
        self.embedded += len(texts)
        numbers = np.array([text.split(" ", 1)[0] for text in texts], np.float32)
        vectors = np.repeat(numbers[:, None], self.card.dimensions or 1, axis=1)
        result = Embeddings(vectors, [len(texts)] * len(texts))
        if on_rows is not None:
            on_rows(range(len(texts)), result)
        return result

    async def check(self) -> None:
        """See `Embedder.check`."""

    async def aclose(self) -> None:
        """See `Embedder.aclose`."""


async def embed(embedder: Embedder, batch: Sequence[str]) -> Embeddings:
    return await embedder.embed(batch, input_type=None, truncate="END")


async def timed(embedder: Embedder, batch: Sequence[str]) -> tuple[float, Embeddings]:
    """Elapsed seconds and the result."""
    start = time.perf_counter()
    result = await embed(embedder, batch)
    return time.perf_counter() - start, result


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=200, help="rounds of the first table (default: 200); the second has a fifth"
    )
    parser.add_argument(
        "--stored", type=int, default=100_000, help="vectors in the second table's file (default: 100,000)"
    )
    parser.add_argument("--tiny", action="store_true", help="only a few of each, to check that it runs")
    options = parser.parse_args(arguments)
    rounds, stored, many = (3, 1000, 10) if options.tiny else (options.rounds, options.stored, 1000)
    print(describe())
    with tempfile.TemporaryDirectory() as name:
        anyio.run(compare_with_embedding, Path(name), rounds, many)
        anyio.run(look_up, Path(name), stored, max(5, rounds // 5))


if __name__ == "__main__":
    main()

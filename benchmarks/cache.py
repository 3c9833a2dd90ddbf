"""What a text costs that is remembered, beside what it costs to embed it: ``python -m benchmarks.cache``.

All in this process, at the door that the service uses, with MiniLM on the CPU. Those compared take turns.
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
"""A text that is remembered, against the same text embedded."""

LOOKUP_MILLISECONDS = 50
"""1,000 texts out of 100,000."""


async def compare_with_embedding(folder: Path, rounds: int, many: int) -> None:
    """One table: a text, and many, embedded, and remembered in memory and on disk."""
    card = cast("ModelCard", find_card(DEFAULT_MODEL))
    files = ModelFiles(card.id, known=card, folder=None, repository=None, device="cpu", precision="float32")
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
        some = texts(workload, count)
        reference = await embed(contenders["from memory"], some)
        await embed(contenders["from disk"], some)
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds if count == 1 else max(3, rounds // 20)):
            for name, contender in contenders.items():
                took, made = await timed(contender, some)
                seconds[name].append(took)
                if name == "from memory":
                    assert made.vectors.tobytes() == reference.vectors.tobytes(), "a hit is not what was stored"
        medians = {name: statistics.median(taken) for name, taken in seconds.items()}
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
    """One table: 1,000 texts out of many, of vectors of several lengths."""
    rows = []
    for dimensions in (384, 1024):
        source = Numbers(dimensions)
        disk = DiskStore(folder / str(dimensions), 4 * GIB)
        embedder = CachedEmbedder(source, Cache(MemoryStore(0), disk))
        start = time.perf_counter()
        for first in range(0, stored, 1000):
            await embed(embedder, source.texts(range(first, first + 1000)))
        filled = time.perf_counter() - start
        random = np.random.default_rng(0)
        seconds = []
        for _ in range(rounds):
            chosen = random.choice(stored, 1000, replace=False)
            took, made = await timed(embedder, source.texts(chosen))
            assert np.array_equal(made.vectors[:, 0], chosen.astype(np.float32)), "a row is not its text's"
            seconds.append(took)
        assert source.made == stored, "a text was not remembered"
        rows.append(
            [
                f"{stored:,} of {dimensions}",
                number(disk.path.stat().st_size / (1 << 20)),
                number(1e6 * filled / stored),
                number(1e3 * statistics.median(seconds)),
                number(1e3 * max(seconds)),
            ]
        )
        await disk.aclose()
    show(
        f"1,000 texts out of a file, chosen at random: medians of {rounds} rounds",
        ["vectors", "MiB", "stored, µs each", "looked up, ms", "slowest, ms"],
        rows,
        f"aim: {LOOKUP_MILLISECONDS} ms; keys, checksums and the matrix of the answer are in it",
    )


class Numbers:
    """An embedder whose text is a number, which all its vector's components are."""

    origin = "local"

    def __init__(self, dimensions: int) -> None:
        self.card = ModelCard(id=f"benchmark/{dimensions}", dimensions=dimensions)
        self.made = 0

    @staticmethod
    def texts(numbers: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[str]:
        """The texts of these numbers, as long as a sentence."""
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
        self.made += len(texts)
        numbers = np.array([text.split(" ", 1)[0] for text in texts], np.float32)
        vectors = np.repeat(numbers[:, None], self.card.dimensions or 1, axis=1)
        made = Embeddings(vectors, [len(texts)] * len(texts))
        if on_rows is not None:
            on_rows(range(len(texts)), made)
        return made

    async def check(self) -> None:
        """See `Embedder.check`."""

    async def aclose(self) -> None:
        """See `Embedder.aclose`."""


async def embed(embedder: Embedder, some: Sequence[str]) -> Embeddings:
    return await embedder.embed(some, input_type=None, truncate="END")


async def timed(embedder: Embedder, some: Sequence[str]) -> tuple[float, Embeddings]:
    """How many seconds it took, and what came of it."""
    start = time.perf_counter()
    made = await embed(embedder, some)
    return time.perf_counter() - start, made


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="of the first table; the second has a fifth")
    parser.add_argument("--stored", type=int, default=100_000, help="vectors in the file of the second table")
    parser.add_argument("--tiny", action="store_true", help="a few of each only, to see that it runs")
    options = parser.parse_args(arguments)
    rounds, stored, many = (3, 1000, 10) if options.tiny else (options.rounds, options.stored, 1000)
    print(describe())
    with tempfile.TemporaryDirectory() as name:
        anyio.run(compare_with_embedding, Path(name), rounds, many)
        anyio.run(look_up, Path(name), stored, max(5, rounds // 5))


if __name__ == "__main__":
    main()

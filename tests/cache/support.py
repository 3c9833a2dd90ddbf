"""An embedder that a test can block or make fail at any text."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.lowlevel
import numpy as np

from embeddings_mcp.embedders.base import Embeddings, OnProgress, OnRows
from embeddings_mcp.embedders.cache import Cache, CachedEmbedder, DiskStore, MemoryStore, cached
from embeddings_mcp.models import InputType, ModelCard, Truncate
from embeddings_mcp.vectors import FloatMatrix
from tests.support import SECONDS, HashEmbedder

MB = 1 << 20

ASYMMETRIC = ModelCard(
    id="test/asymmetric",
    dimensions=8,
    max_tokens=64,
    input_type="optional",
    query_prompt="query: ",
    passage_prompt="passage: ",
)


@dataclass
class TextByText(HashEmbedder):
    """Embeds one text after the other.

    Attributes:
        identity: returned by `identify`.
        served_model: model id in its results.
        held: texts that wait for an event.
        failures: exceptions to raise, by text.
        counts: how often each text was embedded.
    """

    card: ModelCard = field(default_factory=lambda: ASYMMETRIC)
    identity: str = "test"
    served_model: str | None = None
    held: dict[str, anyio.Event] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    async def identify(self) -> str:
        return self.identity

    async def embed(
        self,
        texts: Sequence[str],
        *,
        input_type: InputType | None,
        truncate: Truncate,
        on_progress: OnProgress | None = None,
        on_rows: OnRows | None = None,
    ) -> Embeddings:
        self.batches.append(list(texts))
        parts = []
        for position, text in enumerate(texts):
            await anyio.lowlevel.checkpoint()
            if text in self.held:
                await self.held[text].wait()
            if text in self.failures:
                raise self.failures[text]
            self.counts[text] += 1
            vectors = self.vector(text, input_type)[None]
            parts.append(Embeddings(vectors, [len(text.split()) + 2], self.served_model))
            if on_rows is not None:
                on_rows([position], parts[-1])
            if on_progress is not None:
                await on_progress(position + 1)
        return Embeddings(
            np.concatenate([part.vectors for part in parts]), [part.tokens[0] for part in parts], self.served_model
        )


def in_memory(embedder: HashEmbedder, megabytes: int = 16) -> CachedEmbedder:
    """Wrap the embedder in a cache in memory."""
    return cached(embedder, Cache(MemoryStore(megabytes * MB)))


def on_disk(embedder: HashEmbedder, disk: DiskStore) -> CachedEmbedder:
    """Wrap the embedder in a cache on disk only."""
    return cached(embedder, Cache(MemoryStore(0), disk))


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make the folder and its files read-only for the duration of the block."""
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    user = os.geteuid()
    if user == 0:  # root ignores permissions
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        for path in (folder, *folder.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)


async def ask(
    embedder: CachedEmbedder,
    texts: Sequence[str],
    *,
    input_type: InputType | None = None,
    truncate: Truncate = "NONE",
    on_progress: OnProgress | None = None,
) -> Embeddings:
    """Embed the texts, with a timeout."""
    with anyio.fail_after(SECONDS):
        return await embedder.embed(texts, input_type=input_type, truncate=truncate, on_progress=on_progress)


def expected(embedder: HashEmbedder, texts: Sequence[str], input_type: InputType | None = None) -> FloatMatrix:
    """Return the expected vectors of these texts."""
    return np.stack([embedder.vector(text, input_type) for text in texts])

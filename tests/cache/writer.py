"""A process that fills a cache until it is killed: ``python -m tests.cache.writer FOLDER NAME``.

It prints the number of each batch once it is committed.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from pathlib import Path

import numpy as np

from embeddings_mcp.embedders.cache.database import FILE, Database
from embeddings_mcp.embedders.cache.rows import Key, Row

ROWS = 20  # in a batch

MAX_BYTES = 1 << 30


def batch(name: str, number: int) -> dict[Key, Row]:
    """Return the nth batch of the process with this name."""
    rows = {}
    for index in range(ROWS):
        key = hashlib.sha256(f"{name} {number} {index}".encode()).digest()
        vector = np.random.default_rng(int.from_bytes(key[:8], "little")).standard_normal(384).astype("<f4")
        rows[key] = Row(vector.tobytes(), number, name)
    return rows


if __name__ == "__main__":
    folder, name = sys.argv[1:]
    database = Database(Path(folder) / FILE, MAX_BYTES)
    for number in itertools.count():
        database.put(batch(name, number), model=name, origin="local")
        print(number, flush=True)

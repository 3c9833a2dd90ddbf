"""The command line with models that never finish loading: ``python -m tests.e2e.endless_model ...``.

Writes ``loading`` to stderr when loading starts.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import torch

from embeddings_mcp.__main__ import main
from embeddings_mcp.embedders.local.model_files import ModelFiles


def load(_files: ModelFiles) -> NoReturn:
    """Compute forever, as loading a model does for most of its time."""
    numbers = torch.ones(500, 500)
    print("loading", file=sys.stderr, flush=True)
    while True:
        numbers.mm(numbers)


if __name__ == "__main__":
    ModelFiles.load = load  # type: ignore[assignment, method-assign]
    main()

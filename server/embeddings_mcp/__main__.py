"""The ``embeddings-mcp`` command, and ``python -m embeddings_mcp``: what must be so before anything is imported."""

from __future__ import annotations

import os

from embeddings_mcp.garbage import nothing_collected


def main() -> None:
    """Run the command line."""
    # numpy multiplies little here. OpenBLAS's other threads would only keep processors busy that the model computes on.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with nothing_collected():
        from embeddings_mcp.faces.cli import main as run
    run()


if __name__ == "__main__":
    main()

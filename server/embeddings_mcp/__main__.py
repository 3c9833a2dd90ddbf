"""The ``embeddings-mcp`` command, and ``python -m embeddings_mcp``: what must be so before anything is imported."""

from __future__ import annotations

import os
import sys

from embeddings_mcp.gc_pause import gc_paused


def main() -> None:
    """Run the command line; what is being made when it ends is not waited for."""
    # numpy multiplies little here. OpenBLAS's other threads would only keep processors busy that the model computes on.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _open_what_is_closed()
    try:
        with gc_paused():
            from embeddings_mcp.embedders.lazy import is_making
            from embeddings_mcp.faces.cli.commands import main as run
        run()
    except KeyboardInterrupt:
        sys.exit(130)  # as commands end that are interrupted later
    except SystemExit as end:
        if is_making() and isinstance(end.code, int):
            # Python would end the thread that loads a model in the middle of torch, and torch aborts the process then.
            os._exit(end.code)
        raise


def _open_what_is_closed() -> None:
    """Who closes stdin, stdout or stderr for a process wants nothing of it: as if it were ``/dev/null``."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115


if __name__ == "__main__":
    main()

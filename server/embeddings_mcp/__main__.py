"""The ``embeddings-mcp`` command, and ``python -m embeddings_mcp``: prepares the process before heavy imports."""

from __future__ import annotations

import os
import sys

from embeddings_mcp.gc_pause import gc_paused


def main() -> None:
    """Run the command line, and exit without waiting for a model that is still loading."""
    # numpy multiplies little here. More OpenBLAS threads would only compete with the model for the cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _replace_closed_streams()
    try:
        with gc_paused():
            from embeddings_mcp.embedders.lazy import is_factory_running
            from embeddings_mcp.faces.cli.commands import main as run
        run()
    except KeyboardInterrupt:
        sys.exit(130)  # the exit code of commands that are interrupted later
    except SystemExit as end:
        if is_factory_running() and isinstance(end.code, int):
            # Python would end the thread that loads a model in the middle of torch, and torch aborts the process then.
            os._exit(end.code)
        raise


def _replace_closed_streams() -> None:
    """Open ``/dev/null`` in place of a closed stdin, stdout or stderr, which Python sets to None."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115


if __name__ == "__main__":
    main()

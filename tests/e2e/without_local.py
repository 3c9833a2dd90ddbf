"""The command line as if installed without the extra ``local``: ``python -m tests.e2e.without_local ...``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

EXTRA = {"torch", "transformers", "tokenizers", "safetensors", "huggingface_hub"}


class NotInstalled(MetaPathFinder):
    """Fails to find the packages of the extra, before other finders get a chance."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname.partition(".")[0] in EXTRA:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


if __name__ == "__main__":
    sys.meta_path.insert(0, NotInstalled())

    from embeddings_mcp.faces.cli.commands import main

    main()

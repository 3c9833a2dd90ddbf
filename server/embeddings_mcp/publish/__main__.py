"""Write all generated files to the repository (``make published``)."""

from __future__ import annotations

from pathlib import Path

from embeddings_mcp.publish.files import FILES

ROOT = Path(__file__).parents[3]

if __name__ == "__main__":
    for path, text in FILES.items():
        file = ROOT / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text(), encoding="utf-8")

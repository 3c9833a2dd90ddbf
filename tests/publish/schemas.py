"""Third-party schemas that validate the published documents; they are not part of this repository."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

_FOLDER = Path(os.environ.get("EMBEDDINGS_MCP_SCHEMAS") or ROOT.parent / "shared" / "schemas")


def schema_of(name: str) -> dict[str, Any]:
    """Load a schema by name, or skip the test if it is not available."""
    file = _FOLDER / f"{name}.json"
    if not file.exists():
        pytest.skip(f"{file} does not exist; set EMBEDDINGS_MCP_SCHEMAS to the folder with the schemas")
    schema: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return schema

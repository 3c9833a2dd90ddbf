"""The schemas of other owners, by which what we publish is valid; they are not ours to carry."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

_FOLDER = Path(os.environ.get("EMBEDDINGS_MCP_SCHEMAS") or ROOT.parent / "shared" / "schemas")


def schema_of(name: str) -> dict[str, Any]:
    """The schema in this file; where it is not at hand, the test is skipped."""
    file = _FOLDER / f"{name}.json"
    if not file.exists():
        pytest.skip(f"the schema is not at {file}; EMBEDDINGS_MCP_SCHEMAS names the folder it is in")
    schema: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return schema

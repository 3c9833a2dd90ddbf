"""The published OpenAPI document of NIM, with which ours is compared."""

from __future__ import annotations

from typing import Any

import yaml

from tests.support import ROOT

PUBLISHED: dict[str, Any] = yaml.safe_load((ROOT / "tests" / "data" / "nim-embeddings-openapi.yaml").read_text("utf-8"))

TYPES: dict[str, Any] = PUBLISHED["components"]["schemas"]


def without(keywords: set[str], node: Any) -> Any:
    """Return a copy of `node` without these keywords, at any depth."""
    if isinstance(node, list):
        return [without(keywords, item) for item in node]
    if not isinstance(node, dict):
        return node
    return {key: without(keywords, value) for key, value in node.items() if key not in keywords}

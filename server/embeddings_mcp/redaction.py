"""Masking of keys in texts that go into a log or a response."""

from __future__ import annotations

import re

_KEY = re.compile(r"(?:nvapi-|emk_)[\w-]+")
"""NVIDIA's keys, and those that `embeddings-mcp key` makes."""


def mask_keys(text: str) -> str:
    """Mask everything that looks like a key."""
    return _KEY.sub("***", text)

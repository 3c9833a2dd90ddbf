"""Fixtures for the endpoint tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import stamina


@pytest.fixture(autouse=True)
def _no_pauses() -> Iterator[None]:
    """Keep the number of retries, but without backoff."""
    with stamina.set_testing(True, attempts=100, cap=True):
        yield

"""Fixtures for the tests of endpoints."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import stamina


@pytest.fixture(autouse=True)
def _no_pauses() -> Iterator[None]:
    """Retries happen as often as they would, but at once."""
    with stamina.set_testing(True, attempts=100, cap=True):
        yield

"""A short soak test; `make soak` runs the full one."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.soak.soak import leaks, report, soak


@pytest.mark.anyio
@pytest.mark.skipif(sys.platform != "linux", reason="resources of a process are read from /proc")
async def test_a_server_under_load_answers_correctly_and_leaks_nothing(tmp_path: Path) -> None:
    began = time.monotonic()
    findings = await soak(tmp_path, rounds=2, seconds=4, kills=1)
    figures = report(findings, began)
    assert not findings.wrong, figures
    assert not leaks(findings, settled=False), figures
    assert findings.vectors > 100, figures

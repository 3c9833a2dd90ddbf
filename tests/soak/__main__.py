"""The full soak test: ``python -m tests.soak --minutes 5``."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

import anyio

from tests.soak.soak import Findings, leaks, report, soak


def main() -> None:
    """Run it and print a report; exits with 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    logging.disable()  # clients log errors whenever their server is killed
    began = time.monotonic()
    rounds, kills = 6, 4

    async def run(folder: str) -> Findings:
        seconds = options.minutes * 60 / (rounds + kills)
        return await soak(Path(folder), rounds=rounds, seconds=seconds, kills=kills, seed=options.seed)

    with tempfile.TemporaryDirectory() as folder:
        findings = anyio.run(run, folder)
    print(f"seed {options.seed}\n{report(findings, began)}")
    if found := leaks(findings, settled=True):
        print("leaks: " + "; ".join(found))
    sys.exit(1 if findings.wrong or found else 0)


if __name__ == "__main__":
    main()

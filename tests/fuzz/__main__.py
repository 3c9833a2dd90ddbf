"""Start the server and run schemathesis against it.

Schemathesis has its own environment (created by `make fuzz`), since it would install its pytest plugin into ours.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tests.support import server_process

EXAMPLES = 1_000
"""Generated cases per operation, in addition to the examples in the schema."""


def main() -> None:
    """Run schemathesis, and exit with its exit code: 0 if every check passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("schemathesis", type=Path, help="path of its command, `st`")
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    options = parser.parse_args()
    with server_process(sys.executable, "-m", "tests.fuzz.server") as (_process, url):
        completed = subprocess.run(
            [
                options.schemathesis.absolute(),
                *("--config-file", Path(__file__).with_name("schemathesis.toml")),
                *("run", f"{url}/openapi.json", "--checks", "all"),
                *("--max-examples", str(options.examples), "--suppress-health-check", "all", "--warnings", "off"),
            ],
            check=False,
        )
    sys.exit(completed.returncode)


if __name__ == "__main__":
    main()

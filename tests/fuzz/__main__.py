"""Start the server, and let schemathesis loose on it.

Schemathesis lies in an environment of its own (`make fuzz` makes it): it would bring its pytest plugin into ours.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tests.support import running

EXAMPLES = 1_000
"""Cases that are made up for each operation, besides those that the schema itself suggests."""


def main() -> None:
    """Run it; exits with the code of schemathesis, which is 0 where every check held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("schemathesis", type=Path, help="its command, `st`")
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    chosen = parser.parse_args()
    with running(sys.executable, "-m", "tests.fuzz.server") as (_process, url):
        done = subprocess.run(
            [
                chosen.schemathesis.absolute(),
                *("--config-file", Path(__file__).with_name("schemathesis.toml")),
                *("run", f"{url}/openapi.json", "--checks", "all"),
                *("--max-examples", str(chosen.examples), "--suppress-health-check", "all", "--warnings", "off"),
            ],
            check=False,
        )
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()

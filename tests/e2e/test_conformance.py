"""The installed server checked with the official tools: MCP conformance suites, Inspector, bundle validator.

The tools come from the npm registry, at the versions named here, and so does the Node.js that runs them. Without npx or
access to the registry, the tests are skipped. `make test` does not include them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import COMMAND, ROOT, server_process

pytestmark = pytest.mark.node

NODE = "node@22"
CONFORMANCE = "@modelcontextprotocol/conformance"
INSPECTOR = "@modelcontextprotocol/inspector@2.12.0"
BUNDLER = "@anthropic-ai/mcpb@2.1.2"

SECONDS = 300
"""Timeout for one tool, including its download."""

Npx = Callable[..., str]


@pytest.fixture(scope="session")
def npx() -> Npx:
    """Run a program of an npm package and return its stdout; the exit code must be 0."""
    command = shutil.which("npx")
    if command is None:
        pytest.skip("npx not found: install Node.js to run these tests")

    def run(package: str, *arguments: str) -> str:
        completed = subprocess.run(
            [command, "--yes", "--package", NODE, "--package", package, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
        output = f"{completed.stdout}{completed.stderr}"
        assert completed.returncode == 0, f"{' '.join(arguments)} exited with {completed.returncode}: {output}"
        return completed.stdout

    probe = subprocess.run(
        [command, "--yes", "--package", NODE, "node", "--version"],
        env={**os.environ, "npm_config_fetch_retries": "1", "npm_config_fetch_retry_mintimeout": "1000"},
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    if probe.returncode != 0 or not probe.stdout.startswith("v22."):
        pytest.skip(f"npx cannot fetch {NODE}: is the npm registry reachable?")
    return run


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """MCP address of a server that runs for this module."""
    with server_process(COMMAND, "serve", "--transport", "http", "--port", "0") as (_, url):
        yield f"{url}/mcp"


@pytest.mark.parametrize(
    ("version", "requirements"),
    [("0.1.16", None), ("0.2.0-alpha.12", "2025-11-25"), ("0.2.0-alpha.12", "2026-07-28")],
)
def test_the_conformance_suite_misses_only_its_own_fixtures(
    npx: Npx, address: str, tmp_path: Path, version: str, requirements: str | None
) -> None:
    baseline = ROOT / "tests" / "data" / "conformance" / f"{requirements or version}.yml"
    options = [] if requirements is None else ["--requirements", requirements]
    command = ["conformance", "server", "--url", address, *options, "--expected-failures", str(baseline)]

    printed = npx(f"{CONFORMANCE}@{version}", *command, "-o", str(tmp_path))

    assert "Baseline check passed" in printed


@pytest.mark.parametrize("era", ["modern", "legacy"])
@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_the_inspector_accepts_the_tools_as_portable(npx: Npx, address: str, transport: str, era: str) -> None:
    server = [COMMAND, "serve"] if transport == "stdio" else [address]
    options = ["--protocol-era", era, "--method", "tools/list", "--strict", "--format", "json", "-q"]

    assert '"create_embedding"' in npx(INSPECTOR, "mcp-inspector", "--cli", *server, *options)


@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_the_inspector_verifies_every_file_of_the_skill(npx: Npx, address: str, transport: str) -> None:
    server = [COMMAND, "serve"] if transport == "stdio" else [address]
    options = ["--protocol-era", "modern", "--method", "skills/list", "--verify", "--require-digests"]

    assert '"outcome":"verified"' in npx(INSPECTOR, "mcp-inspector", "--cli", *server, *options)


def test_the_manifest_of_the_bundle_is_valid(npx: Npx) -> None:
    printed = npx(BUNDLER, "mcpb", "validate", str(ROOT / "packaging" / "mcpb" / "manifest.json"))
    assert "Manifest schema validation passes" in printed

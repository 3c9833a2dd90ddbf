"""The installation files are valid by the official schemas, and all start the server in the same way."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from jsonschema.validators import validator_for

from embeddings_mcp import __version__
from embeddings_mcp.publish import identity, install
from tests.publish.schemas import schema_of
from tests.support import ROOT

HOSTS = (ROOT / "docs" / "hosts.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("schema", "document"),
    [
        ("server.schema", install.registry_entry()),
        ("plugin.schema", install.plugin()),
        ("mcp.schema", install.plugin_servers()),
        ("mcpb-manifest-v0.4.schema", install.bundle_manifest()),
    ],
)
def test_the_file_is_valid_by_the_official_schema(schema: str, document: dict[str, Any]) -> None:
    official = schema_of(schema)
    validator_for(official)(official, format_checker=jsonschema.FormatChecker()).validate(document)


def test_the_registry_entry_has_the_version_of_the_package() -> None:
    entry = install.registry_entry()
    (package,) = entry["packages"]
    assert entry["version"] == package["version"] == __version__
    assert package["runtimeArguments"][0]["value"].endswith(f"=={__version__}")
    assert f"mcp-name: {identity.REGISTRY_NAME}" in (ROOT / "README.md").read_text("utf-8")


def test_exactly_the_secrets_are_marked_as_secret() -> None:
    (package,) = install.registry_entry()["packages"]
    assert {variable["name"] for variable in package["environmentVariables"] if variable["isSecret"]} == {
        "NVIDIA_API_KEY"
    }
    assert install.bundle_manifest()["user_config"]["nvidia_api_key"]["sensitive"] is True


def test_an_empty_field_in_claude_desktop_becomes_an_empty_variable() -> None:
    """The host replaces ``${user_config.name}`` only where it has a value or a default."""
    manifest = install.bundle_manifest()
    for value in manifest["server"]["mcp_config"]["env"].values():
        assert manifest["user_config"][value.removeprefix("${user_config.").removesuffix("}")]["default"] == ""


def test_both_plugin_formats_start_the_same_server() -> None:
    (portable,) = install.plugin_servers()["mcpServers"].values()
    (claude,) = install.claude_plugin()["mcpServers"].values()
    assert claude["command"].removeprefix("${CLAUDE_PLUGIN_ROOT}/") == portable["command"].removeprefix("./")
    assert claude["args"] == portable["args"]


# --- Documentation ---------------------------------------------------------------------------------------------------


def servers(configuration: Any) -> list[dict[str, Any]]:
    """Return all server entries in a host's configuration."""
    if not isinstance(configuration, dict):
        return []
    if configuration.keys() & {"command", "url"}:
        return [configuration]
    return [server for value in configuration.values() for server in servers(value)]


def test_every_documented_host_configuration_starts_the_server() -> None:
    blocks = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", HOSTS, flags=re.DOTALL)]
    found = [server for block in blocks for server in servers(block)]
    assert len(found) == len(blocks) >= 8
    for server in found:
        if "url" in server:
            assert server["url"] == "http://127.0.0.1:8000/mcp"
        else:
            command = server["command"]
            started = command if isinstance(command, list) else [command, *server["args"]]
            assert started == [identity.NAME, "serve"]
    assert set(re.findall(r"-- (embeddings-mcp .*)", HOSTS)) == {"embeddings-mcp serve"}

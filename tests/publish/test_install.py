"""What users install from: valid by its owners' schemas, and the same way to start the server everywhere."""

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
def test_the_file_is_valid_by_the_schema_of_its_owner(schema: str, document: dict[str, Any]) -> None:
    read = schema_of(schema)
    validator_for(read)(read, format_checker=jsonschema.FormatChecker()).validate(document)


def test_the_registry_is_told_of_this_very_version() -> None:
    entry = install.registry_entry()
    (package,) = entry["packages"]
    assert entry["version"] == package["version"] == __version__
    assert package["runtimeArguments"][0]["value"].endswith(f"=={__version__}")
    assert f"mcp-name: {identity.REGISTRY_NAME}" in (ROOT / "README.md").read_text("utf-8")


def test_secrets_are_marked_as_such_and_nothing_else_is() -> None:
    (package,) = install.registry_entry()["packages"]
    assert {variable["name"] for variable in package["environmentVariables"] if variable["isSecret"]} == {
        "NVIDIA_API_KEY"
    }
    assert install.bundle_manifest()["user_config"]["nvidia_api_key"]["sensitive"] is True


def test_an_answer_that_is_left_empty_in_claude_desktop_is_an_empty_variable() -> None:
    """The host replaces ``${user_config.name}`` only where it has a value or a default."""
    manifest = install.bundle_manifest()
    for value in manifest["server"]["mcp_config"]["env"].values():
        assert manifest["user_config"][value.removeprefix("${user_config.").removesuffix("}")]["default"] == ""


def test_the_plugins_of_both_kinds_start_the_same() -> None:
    (portable,) = install.plugin_servers()["mcpServers"].values()
    (claude,) = install.claude_plugin()["mcpServers"].values()
    assert claude["command"].removeprefix("${CLAUDE_PLUGIN_ROOT}/") == portable["command"].removeprefix("./")
    assert claude["args"] == portable["args"]


# --- What the pages say ----------------------------------------------------------------------------------------------


def servers(configuration: Any) -> list[dict[str, Any]]:
    """Every entry of a host's configuration that says how to reach a server."""
    if not isinstance(configuration, dict):
        return []
    if configuration.keys() & {"command", "url"}:
        return [configuration]
    return [server for value in configuration.values() for server in servers(value)]


def test_every_host_is_told_to_start_the_server_as_it_is_started() -> None:
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

"""Files that registries and hosts read to install the server, one function per file."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from embeddings_mcp import __version__
from embeddings_mcp.operations import OPERATIONS
from embeddings_mcp.publish import identity
from embeddings_mcp.settings import PREFIX, Settings

_REGISTRY_SETTINGS = ("models", "default_model", "endpoints", "nvidia_api_key", "device", "precision", "cache")
"""Settings that are useful for a server of a single host; the others are for servers over HTTP."""

_LAUNCHER = "bin/embeddings-mcp"
"""Script that starts the server from a checkout or an unpacked plugin, relative to its root."""

_BUNDLE_SETTINGS = {"models": "Models", "nvidia_api_key": "NVIDIA API key"}
"""Settings that Claude Desktop asks the user for, with their titles."""

_METADATA = {
    "name": identity.NAME,
    "version": __version__,
    "description": identity.DESCRIPTION,
    "author": {"name": identity.AUTHOR},
    "homepage": identity.REPOSITORY,
    "license": identity.LICENSE,
    "keywords": [*identity.KEYWORDS],
}


def registry_entry() -> dict[str, Any]:
    """``server.json`` of the MCP registry, schema of 2025-12-11."""
    return {
        "$schema": "https://static.modelcontextprotocol.io/schemas/2025-12-11/server.schema.json",
        "name": identity.REGISTRY_NAME,
        "title": identity.TITLE,
        "description": identity.DESCRIPTION,
        "version": __version__,
        "websiteUrl": identity.REPOSITORY,
        "repository": {"url": identity.REPOSITORY, "source": "github"},
        "packages": [
            {
                "registryType": "pypi",
                "identifier": identity.NAME,
                "version": __version__,
                "runtimeHint": "uvx",
                "runtimeArguments": [
                    {"type": "named", "name": "--from", "value": f"{identity.NAME}[{identity.EXTRAS}]=={__version__}"}
                ],
                "packageArguments": [{"type": "positional", "value": "serve"}],
                "environmentVariables": [_variable(name, Settings.model_fields[name]) for name in _REGISTRY_SETTINGS],
                "transport": {"type": "stdio"},
            }
        ],
    }


def environment_variable(name: str) -> str:
    """Return the environment variable of a setting."""
    alias = Settings.model_fields[name].validation_alias
    return alias if isinstance(alias, str) else PREFIX + name.upper()


def is_secret(field: FieldInfo) -> bool:
    """Return whether a setting is a secret."""
    return field.annotation is SecretStr or SecretStr in get_args(field.annotation)


def _variable(name: str, field: FieldInfo) -> dict[str, Any]:
    """Describe a setting in the registry's format for environment variables."""
    described: dict[str, Any] = {
        "name": environment_variable(name),
        "description": field.description,
        "isRequired": field.is_required(),
        "isSecret": is_secret(field),
    }
    if choices := [value for value in get_args(field.annotation) if isinstance(value, str)]:
        described["choices"] = choices
    if isinstance(field.default, str):
        described["default"] = field.default
    return described


def plugin() -> dict[str, Any]:
    """``plugin.json`` of Agent Plugins 1.0.0; skills and servers are found by their paths."""
    return {
        "$schema": "https://agent-plugins.org/schemas/1.0.0/plugin.schema.json",
        **_METADATA,
        "repository": identity.REPOSITORY,
    }


def plugin_servers() -> dict[str, Any]:
    """``mcp.json`` of Agent Plugins 1.0.0, which also starts the server from a checkout."""
    return {
        "$schema": "https://agent-plugins.org/schemas/1.0.0/mcp.schema.json",
        "mcpServers": {"embeddings": {"type": "stdio", "command": f"./{_LAUNCHER}", "args": ["serve"]}},
    }


def claude_plugin() -> dict[str, Any]:
    """``.claude-plugin/plugin.json``: the plugin in the format of Claude Code."""
    return {
        **_METADATA,
        "repository": identity.REPOSITORY,
        "mcpServers": {"embeddings": {"command": f"${{CLAUDE_PLUGIN_ROOT}}/{_LAUNCHER}", "args": ["serve"]}},
    }


def claude_marketplace() -> dict[str, Any]:
    """``.claude-plugin/marketplace.json``: this repository as a marketplace with one plugin."""
    return {
        "name": identity.NAME,
        "owner": {"name": identity.AUTHOR},
        "metadata": {"description": identity.DESCRIPTION},
        "plugins": [{"name": identity.NAME, "source": "./", "description": identity.DESCRIPTION}],
    }


def bundle_manifest() -> dict[str, Any]:
    """``manifest.json`` of an MCP bundle, version 0.4, for Claude Desktop, which provides uv and thereby Python."""
    extras = [part for extra in identity.EXTRAS.split(",") for part in ("--extra", extra)]
    return {
        "manifest_version": "0.4",
        **_METADATA,
        "display_name": identity.TITLE,
        "repository": {"type": "git", "url": identity.REPOSITORY},
        "documentation": f"{identity.REPOSITORY}#readme",
        "server": {
            "type": "uv",
            "entry_point": "server/embeddings_mcp/__main__.py",
            "mcp_config": {
                "command": "uv",
                "args": ["run", "--directory", "${__dirname}", *extras, identity.NAME, "serve"],
                "env": {environment_variable(name): f"${{user_config.{name}}}" for name in _BUNDLE_SETTINGS},
            },
        },
        "tools": [{"name": operation.name, "description": operation.title} for operation in OPERATIONS],
        "prompts_generated": True,
        "compatibility": {"platforms": ["darwin", "linux", "win32"], "runtimes": {"python": ">=3.11"}},
        "user_config": {
            name: {
                "type": "string",
                "title": title,
                "description": Settings.model_fields[name].description,
                "required": False,
                "sensitive": is_secret(Settings.model_fields[name]),
                # Without a default the host would set the variable to the literal text `${user_config...}`; an empty
                # variable counts as not set.
                "default": "",
            }
            for name, title in _BUNDLE_SETTINGS.items()
        },
    }

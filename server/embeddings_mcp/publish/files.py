"""The table of all generated files in the repository."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from embeddings_mcp.publish import identity, install, reference
from embeddings_mcp.publish.documents import FORMATS, to_json

FILES: Mapping[str, Callable[[], str]] = {
    **{document.path: partial(document.text, identity.LOCAL_URL) for document in FORMATS.values() if document.path},
    "server.json": lambda: to_json(install.registry_entry()),
    "plugin.json": lambda: to_json(install.plugin()),
    "mcp.json": lambda: to_json(install.plugin_servers()),
    ".claude-plugin/plugin.json": lambda: to_json(install.claude_plugin()),
    ".claude-plugin/marketplace.json": lambda: to_json(install.claude_marketplace()),
    "packaging/mcpb/manifest.json": lambda: to_json(install.bundle_manifest()),
    "docs/api.md": reference.api,
    "docs/configuration.md": reference.configuration,
    "skills/embeddings/references/models.md": reference.models,
    "skills/embeddings/references/errors.md": reference.errors,
}
"""Maps the path of each generated file to the function that renders it; a test checks that the files are up to date."""

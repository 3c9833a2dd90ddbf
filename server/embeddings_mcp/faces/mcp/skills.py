"""The Agent Skill over MCP: its files as resources, and the methods of the skills extension (SEP-2640).

A client that supports the extension lists skills with the digest of every file and reads the files as resources. For
any other client they are ordinary resources.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from mcp.server.context import ServerRequestContext
from mcp.server.extension import Extension, MethodBinding, ResourceBinding
from mcp.server.mcpserver.prompts.base import UserMessage
from mcp.server.mcpserver.resources import TextResource
from mcp.shared.exceptions import MCPError
from mcp.types import INVALID_PARAMS, EmbeddedResource, PaginatedRequestParams, RequestParams, TextResourceContents
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import Field

from embeddings_mcp.publish.skill import SKILL, Skill, read_skill

SKILL_URI = f"skill://{SKILL}/SKILL.md"
"""URI of the skill."""

_TTL_MS = 60 * 60 * 1000
"""The skill changes only with the server version; a digest mismatch tells a client sooner than the TTL expires."""


class GetSkillParams(RequestParams):
    """Parameters of ``skills/get``."""

    uri: str


class SkillsExtension(Extension):
    """Serve the package's skill."""

    identifier = "io.modelcontextprotocol/skills"

    def __init__(self) -> None:
        self._skill = read_skill()

    def resources(self) -> Sequence[ResourceBinding]:
        """Return the skill's files; SKILL.md has the name and description of the skill."""
        return [
            ResourceBinding(
                TextResource(
                    uri=_uri(self._skill, path),
                    name=self._skill.name if path == "SKILL.md" else f"{self._skill.name}/{path}",
                    description=self._skill.frontmatter["description"] if path == "SKILL.md" else None,
                    mime_type=file.media_type,
                    text=file.content.decode(),
                )
            )
            for path, file in self._skill.files.items()
        ]

    def methods(self) -> Sequence[MethodBinding]:
        """Return ``skills/list`` and ``skills/get`` for the protocol versions that support extensions."""
        versions = frozenset(MODERN_PROTOCOL_VERSIONS)
        return [
            MethodBinding("skills/list", PaginatedRequestParams, self._list, versions),
            MethodBinding("skills/get", GetSkillParams, self._get, versions),
        ]

    async def _list(self, _context: ServerRequestContext[Any, Any], _params: PaginatedRequestParams) -> dict[str, Any]:
        return {"skills": [self._entry()], **_RESULT_FIELDS}

    async def _get(self, _context: ServerRequestContext[Any, Any], params: GetSkillParams) -> dict[str, Any]:
        if params.uri != SKILL_URI:
            raise MCPError(INVALID_PARAMS, f"Unknown skill: {params.uri!r}; the skill is {SKILL_URI}")
        return {"skill": self._entry(), **_RESULT_FIELDS}

    def _entry(self) -> dict[str, Any]:
        return {
            "uri": SKILL_URI,
            "frontmatter": self._skill.frontmatter,
            "resources": [
                {"uri": _uri(self._skill, path), "digest": file.digest, "size": len(file.content)}
                for path, file in self._skill.files.items()
            ],
        }


_RESULT_FIELDS = {"resultType": "complete", "ttlMs": _TTL_MS, "cacheScope": "public"}


def _uri(skill: Skill, path: str) -> str:
    return f"skill://{skill.name}/{path}"


def use_embeddings(task: Annotated[str, Field(description="The task to do.")]) -> list[UserMessage]:
    """Do a task with embeddings, guided by this server's skill: which tool, which model, what a score means."""
    text = read_skill().files["SKILL.md"].content.decode()
    skill = TextResourceContents(uri=SKILL_URI, mime_type="text/markdown", text=text)
    return [UserMessage(EmbeddedResource(resource=skill)), UserMessage(f"Follow this skill, and do this: {task}")]

"""Routes that describe the server: its published documents (OpenAPI, APIs.json, server card, ...) and its Agent Skill.

The skill's routes follow Naftiko's skill adapter; the index under ``/.well-known`` follows agentskills.io, version
0.2.0. Files are looked up in the skill loaded in memory, never by path on the disk.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache, partial
from http import HTTPStatus
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from embeddings_mcp.errors import InvalidRequest
from embeddings_mcp.faces.http.rest import error_response, http_error_response
from embeddings_mcp.operations import OPERATIONS
from embeddings_mcp.publish import identity
from embeddings_mcp.publish.documents import FORMATS
from embeddings_mcp.publish.skill import Skill, digest, read_skill

_DOCUMENTS: Mapping[str, identity.Format] = {
    "/openapi.json": "openapi",
    "/apis.json": "apis-json",
    "/mcp/server-card": "server-card",
}
"""Documents that clients look for at a path of their own; ``/manifest`` serves all of them."""


def routes() -> list[Route]:
    """The routes, all of them read-only."""
    return [
        *(Route(path, partial(_document, name)) for path, name in _DOCUMENTS.items()),
        Route("/manifest", _manifest),
        Route("/skills", _catalog),
        Route("/skills/{name}", _skill_endpoint(_detail)),
        Route("/skills/{name}/download", _skill_endpoint(_download)),
        Route("/skills/{name}/contents", _skill_endpoint(_contents)),
        Route("/skills/{name}/contents/{file:path}", _skill_endpoint(_file)),
        Route("/.well-known/agent-skills/index.json", _index),
    ]


# --- Documents -------------------------------------------------------------------------------------------------------


async def _document(name: identity.Format, request: Request) -> Response:
    return Response(_text(name, str(request.base_url).rstrip("/")), media_type=FORMATS[name].media_type)


@lru_cache(maxsize=32)
def _text(name: identity.Format, url: str) -> str:
    return FORMATS[name].text(url)


async def _manifest(request: Request) -> Response:
    """The document that the query parameter ``format`` names; by default the capability."""
    requested = request.query_params.get("format", "ikanos")
    for name in FORMATS:
        if name == requested:
            return await _document(name, request)
    message = f"`format` must be one of {', '.join(FORMATS)}, not {requested[:100]!r}"
    return error_response(InvalidRequest(message, param="format"))


# --- The skill -------------------------------------------------------------------------------------------------------


async def _catalog(_request: Request) -> Response:
    skill = read_skill()
    entry = {**_frontmatter(skill, "description", "license"), "tools": [operation.name for operation in OPERATIONS]}
    return _json({"count": 1, "skills": [entry]})


def _skill_endpoint(handler: Callable[[Skill, Request], Response]) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint of a route below ``/skills/{name}``: 404 for any name but that of the only skill."""

    async def endpoint(request: Request) -> Response:
        skill, name = read_skill(), request.path_params["name"]
        if name != skill.name:
            return _not_found(f"there is no skill {name[:100]!r}; GET /skills lists them")
        return handler(skill, request)

    return endpoint


def _detail(skill: Skill, _request: Request) -> Response:
    tools = [
        {
            "name": operation.name,
            "description": operation.description,
            "type": "derived",
            "invocationRef": {"targetNamespace": identity.NAME, "action": operation.name, "mode": "mcp"},
        }
        for operation in OPERATIONS
    ]
    return _json({**_frontmatter(skill, "description", "license", "compatibility", "metadata"), "tools": tools})


def _download(skill: Skill, _request: Request) -> Response:
    return Response(
        skill.archive,
        media_type="application/zip",
        headers={"Content-Disposition": f'attachment; filename="{skill.name}.zip"'},
    )


def _contents(skill: Skill, _request: Request) -> Response:
    files = [{"path": path, "size": len(file.content), "type": file.media_type} for path, file in skill.files.items()]
    return _json({"name": skill.name, "files": files})


def _file(skill: Skill, request: Request) -> Response:
    path = request.path_params["file"]
    if path not in skill.files:
        return _not_found(f"the skill has no file {path[:100]!r}; it has {', '.join(skill.files)}")
    file = skill.files[path]
    return Response(file.content, media_type=file.media_type)


async def _index(_request: Request) -> Response:
    skill = read_skill()
    entry = {
        **_frontmatter(skill, "description"),
        "type": "archive",
        "url": f"/skills/{skill.name}/download",
        "digest": digest(skill.archive),
        "version": skill.frontmatter["metadata"]["version"],
    }
    return _json({"$schema": "https://schemas.agentskills.io/discovery/0.2.0/schema.json", "skills": [entry]})


def _frontmatter(skill: Skill, *fields: str) -> dict[str, Any]:
    return {"name": skill.name, **{field: skill.frontmatter[field] for field in fields}}


def _not_found(message: str) -> Response:
    return http_error_response(HTTPStatus.NOT_FOUND, message)


def _json(content: object) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")

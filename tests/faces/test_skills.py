"""The Agent Skill over MCP: through the skills extension, and as resources and prompts for other clients."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import pytest
import yaml
from mcp import Client
from mcp.types import EmbeddedResource, TextContent, TextResourceContents

from embeddings_mcp.publish.skill import read_skill
from tests.support import ERAS, http_server, service_of

SKILL = "skill://embeddings/SKILL.md"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with http_server(service_of()) as url:
        yield url


def call(url: str, method: str, version: str = "2026-07-28", **params: Any) -> dict[str, Any]:
    """The response to one request of the stateless protocol."""
    meta = {
        "io.modelcontextprotocol/protocolVersion": version,
        "io.modelcontextprotocol/clientCapabilities": {"extensions": {"io.modelcontextprotocol/skills": {}}},
    }
    answer: dict[str, Any] = httpx.post(
        f"{url}/mcp",
        json={"jsonrpc": "2.0", "id": 1, "method": method, "params": {**params, "_meta": meta}},
        headers={
            "Accept": "application/json, text/event-stream",
            "MCP-Protocol-Version": version,
            "Mcp-Method": method,
            **({"Mcp-Name": params["uri"]} if method == "resources/read" else {}),
        },
    ).json()
    return answer


def test_the_server_announces_the_skills_extension(url: str) -> None:
    capabilities = call(url, "server/discover")["result"]["capabilities"]
    assert capabilities["extensions"] == {"io.modelcontextprotocol/skills": {}}
    assert "resources" in capabilities


def test_the_skill_is_listed_with_all_files_and_their_correct_digests(url: str) -> None:
    result = call(url, "skills/list")["result"]

    assert result["resultType"] == "complete"
    assert result["cacheScope"] == "public"
    assert result["ttlMs"] > 0
    (skill,) = result["skills"]
    assert skill["uri"] == SKILL
    assert len(skill["resources"]) == len(read_skill().files)
    for resource in skill["resources"]:
        (content,) = call(url, "resources/read", uri=resource["uri"])["result"]["contents"]
        raw = content["text"].encode()
        assert len(raw) == resource["size"]
        assert f"sha256:{hashlib.sha256(raw).hexdigest()}" == resource["digest"]
        if resource["uri"] == SKILL:
            assert yaml.safe_load(content["text"].split("---\n")[1]) == skill["frontmatter"]


def test_the_skill_is_returned_for_its_uri_and_other_uris_are_unknown(url: str) -> None:
    listed = call(url, "skills/list")["result"]["skills"]
    assert call(url, "skills/get", uri=SKILL)["result"]["skill"] == listed[0]

    for unknown in ("skill://other/SKILL.md", "skill://embeddings", "skill://embeddings/references/models.md"):
        error = call(url, "skills/get", uri=unknown)["error"]
        assert error["code"] == -32602
        assert SKILL in error["message"]


@pytest.mark.anyio
@pytest.mark.parametrize("era", sorted(ERAS))
async def test_a_client_without_the_extension_sees_the_files_as_resources(url: str, era: str) -> None:
    with anyio.fail_after(10):
        async with Client(f"{url}/mcp", mode=ERAS[era]) as client:
            listed = {resource.uri: resource for resource in (await client.list_resources()).resources}
            (content,) = (await client.read_resource(SKILL)).contents
    assert listed[SKILL].name == "embeddings"
    assert listed[SKILL].mime_type == "text/markdown"
    assert listed[SKILL].description == read_skill().frontmatter["description"]
    assert {uri for uri in listed if uri.startswith("skill://")} == {
        f"skill://embeddings/{path}" for path in read_skill().files
    }
    assert isinstance(content, TextResourceContents)
    assert content.text == read_skill().files["SKILL.md"].content.decode()


@pytest.mark.anyio
@pytest.mark.parametrize("era", sorted(ERAS))
async def test_a_prompt_embeds_the_skill_and_the_others_refer_to_it(url: str, era: str) -> None:
    with anyio.fail_after(10):
        async with Client(f"{url}/mcp", mode=ERAS[era]) as client:
            embedded, task = (await client.get_prompt("use_embeddings", {"task": "find duplicates"})).messages
            (question,) = (await client.get_prompt("answer_from_texts", {"question": "why?"})).messages
            assert SKILL in (client.instructions or "")
    assert isinstance(embedded.content, EmbeddedResource)
    assert isinstance(embedded.content.resource, TextResourceContents)
    assert embedded.content.resource.uri == SKILL
    assert "## Thresholds" in embedded.content.resource.text
    assert isinstance(task.content, TextContent)
    assert "find duplicates" in task.content.text
    assert isinstance(question.content, TextContent)
    assert SKILL in question.content.text

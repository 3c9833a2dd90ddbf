"""The routes that describe the server: published documents and the Agent Skill."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator

import httpx
import pytest
import yaml

from embeddings_mcp.operations import OPERATIONS
from embeddings_mcp.publish.capability import capability
from embeddings_mcp.publish.documents import FORMATS
from embeddings_mcp.publish.skill import read_skill
from tests.support import client_of


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with client_of() as client:
        yield client


def test_the_capability_has_the_address_of_the_request(client: httpx.Client) -> None:
    answer = client.get("/manifest")

    assert answer.headers["Content-Type"].startswith("application/yaml")
    assert yaml.safe_load(answer.text) == capability("ikanos", str(client.base_url).rstrip("/"))


@pytest.mark.parametrize("document", FORMATS)
def test_every_document_is_served_with_its_media_type(client: httpx.Client, document: str) -> None:
    answer = client.get("/manifest", params={"format": document})

    assert answer.headers["Content-Type"].startswith(FORMATS[document].media_type)  # type: ignore[index]
    assert answer.text == FORMATS[document].text(str(client.base_url).rstrip("/"))  # type: ignore[index]


@pytest.mark.parametrize(
    ("path", "document"),
    [("/openapi.json", "openapi"), ("/apis.json", "apis-json"), ("/mcp/server-card", "server-card")],
)
def test_documents_are_also_at_their_well_known_paths(client: httpx.Client, path: str, document: str) -> None:
    assert client.get(path).text == client.get("/manifest", params={"format": document}).text


def test_the_server_card_has_the_servers_address(client: httpx.Client) -> None:
    (remote,) = client.get("/mcp/server-card").json()["remotes"]
    assert remote["url"] == f"{str(client.base_url).rstrip('/')}/mcp"


def test_behind_a_proxy_with_tls_urls_are_https(client: httpx.Client) -> None:
    headers = {"host": "localhost", "x-forwarded-proto": "https"}
    (remote,) = client.get("/mcp/server-card", headers=headers).json()["remotes"]
    assert remote["url"] == "https://localhost/mcp"
    assert client.get("/mcp/", headers=headers).headers["location"] == "https://localhost/mcp"


def test_an_unknown_format_is_answered_with_the_known_ones(client: httpx.Client) -> None:
    answer = client.get("/manifest", params={"format": "wsdl"})
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": f"`format` must be one of {', '.join(FORMATS)}, not 'wsdl'",
        "type": "invalid_request_error",
        "param": "format",
        "code": "invalid_request",
    }


# --- The skill -------------------------------------------------------------------------------------------------------


def test_the_catalog_and_the_detail_have_the_shapes_of_naftikos_adapter(client: httpx.Client) -> None:
    catalog = client.get("/skills").json()
    assert list(catalog) == ["count", "skills"]
    (entry,) = catalog["skills"]
    assert list(entry) == ["name", "description", "license", "tools"]
    assert catalog["count"] == 1

    detail = client.get(f"/skills/{entry['name']}").json()
    assert [tool["name"] for tool in detail["tools"]] == entry["tools"] == [operation.name for operation in OPERATIONS]
    assert detail["compatibility"] == read_skill().frontmatter["compatibility"]
    for tool in detail["tools"]:
        assert tool["type"] == "derived"
        assert tool["invocationRef"] == {
            "targetNamespace": "embeddings-mcp",
            "action": tool["name"],
            "mode": "mcp",
        }


def test_every_file_of_the_skill_can_be_fetched(client: httpx.Client) -> None:
    contents = client.get("/skills/embeddings/contents").json()
    assert contents["name"] == "embeddings"
    for file in contents["files"]:
        answer = client.get(f"/skills/embeddings/contents/{file['path']}")
        assert answer.content == read_skill().files[file["path"]].content
        assert len(answer.content) == file["size"]
        assert answer.headers["Content-Type"].startswith(file["type"])


def test_the_index_links_to_an_archive_that_matches_its_digest(client: httpx.Client) -> None:
    index = client.get("/.well-known/agent-skills/index.json")
    assert index.headers["Content-Type"] == "application/json"
    assert index.json()["$schema"] == "https://schemas.agentskills.io/discovery/0.2.0/schema.json"
    (entry,) = index.json()["skills"]

    answer = client.get(entry["url"])
    assert answer.headers["Content-Type"] == "application/zip"
    assert entry["digest"] == f"sha256:{hashlib.sha256(answer.content).hexdigest()}"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert set(archive.namelist()) == set(read_skill().files)


@pytest.mark.parametrize(
    "path",
    [
        "/skills/other",
        "/skills/other/download",
        "/skills/other/contents",
        "/skills/other/contents/SKILL.md",
        "/skills/embeddings/contents/gone.md",
        "/skills/embeddings/contents/references",
        "/skills/embeddings/contents/..%2F..%2Fpyproject.toml",
        "/skills/embeddings/contents/%2Fetc%2Fpasswd",
        "/skills/..%2F..%2Fskills/contents",
    ],
)
def test_other_skills_and_files_are_not_found(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"
    assert "root:" not in answer.text


@pytest.mark.parametrize("path", ["/skills", "/skills/embeddings", "/manifest", "/.well-known/agent-skills/index.json"])
def test_all_of_these_routes_are_read_only(client: httpx.Client, path: str) -> None:
    assert client.head(path).status_code == 200
    assert client.post(path).status_code == 405


def test_a_server_with_a_key_requires_it_here_too() -> None:
    with client_of(api_key="key") as client:
        assert client.get("/skills").status_code == 401
        assert client.get("/skills", headers={"Authorization": "Bearer key"}).status_code == 200

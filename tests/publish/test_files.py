"""The generated files of the repository are up to date and agree with the package metadata."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from typing import get_args

import orjson
import pytest
import yaml
from typer.testing import CliRunner

from embeddings_mcp.faces.cli.commands import app
from embeddings_mcp.models import CardOverride
from embeddings_mcp.publish import identity
from embeddings_mcp.publish.documents import FORMATS
from embeddings_mcp.publish.files import FILES
from embeddings_mcp.settings import EndpointSettings
from tests.support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


@pytest.mark.parametrize("path", FILES)
def test_the_file_is_up_to_date(path: str) -> None:
    assert (ROOT / path).read_text("utf-8") == FILES[path](), f"{path} is out of date: run `make published`"


@pytest.mark.parametrize("document", FORMATS)
def test_the_command_prints_every_document(document: str) -> None:
    printed = CliRunner().invoke(app, ["manifest", "--format", document, "--url", "http://host:1/"]).stdout
    assert printed == FORMATS[document].text("http://host:1")  # type: ignore[index]
    parsed = yaml.safe_load(printed) if FORMATS[document].media_type.endswith("yaml") else orjson.loads(printed)  # type: ignore[index]
    assert isinstance(parsed, dict)


def test_every_format_has_a_document() -> None:
    assert list(FORMATS) == list(get_args(identity.Format))


def test_an_invalid_url_is_refused() -> None:
    command = [sys.executable, "-m", "embeddings_mcp", "manifest", "--url", "localhost"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == ("embeddings-mcp: --url must be a URL such as http://localhost:8000, not 'localhost'\n")


def test_the_identity_agrees_with_the_package_metadata() -> None:
    project = PROJECT["project"]
    assert project["name"] == identity.NAME
    assert project["license"] == identity.LICENSE
    assert tuple(project["keywords"]) == identity.KEYWORDS
    assert project["authors"] == [{"name": identity.AUTHOR}]
    assert project["urls"]["Documentation"] == f"{identity.REPOSITORY}#readme"
    assert set(identity.EXTRAS.split(",")) < set(project["optional-dependencies"])
    assert len(identity.DESCRIPTION) <= 100


def test_every_field_of_a_card_and_of_an_endpoint_is_explained() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    for section, names in (("Endpoints", EndpointSettings.model_fields), ("Cards", CardOverride.__dataclass_fields__)):
        _, _, after = page.partition(f"\n## {section}\n")
        rows = re.findall(r"^\| `(\w+)` \|.* \| (.*) \|$", after.partition("\n## ")[0], flags=re.MULTILINE)
        assert [name for name, _ in rows] == list(names)
        assert all(meaning for _, meaning in rows)

"""The hand-written pages agree with the tools, routes, models and settings, and their links resolve."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from embeddings_mcp.faces.cli.commands import serve
from embeddings_mcp.models import CARDS, ModelCard
from embeddings_mcp.operations import OPERATIONS
from embeddings_mcp.publish.install import environment_variable
from embeddings_mcp.publish.openapi import openapi_document
from embeddings_mcp.settings import Settings
from tests.support import ROOT

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("skills/embeddings/**/*.md")]
README = (ROOT / "README.md").read_text("utf-8")
VARIABLES = {environment_variable(name) for name in Settings.model_fields}


def table(head: str) -> list[list[str]]:
    """Return the cells of every row of the README table with this header."""
    _, _, after = README.partition(f"\n{head}")
    rows = after.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_the_tools_and_their_required_fields_are_complete() -> None:
    rows = {quoted(name)[0]: description for name, description, _ in table("| tool |")}
    assert rows.keys() == {operation.name for operation in OPERATIONS}
    for operation in OPERATIONS:
        description = rows[operation.name]
        if operation.name != "create_embedding":  # the table names none of its fields
            schema = operation.request.model_json_schema()
            assert set(re.findall(r"\*\*`(\w+)`\*\*", description)) == set(schema.get("required", []))
            assert set(quoted(description)) <= schema["properties"].keys()


def test_the_routes_are_complete() -> None:
    named = {path for cell, _ in table("| route |") for path in re.findall(r"/[\w/{}.]+", cell)}
    assert named - {"/openapi.json", "/manifest", "/skills"} == set(openapi_document()["paths"])


def test_the_models_are_those_of_the_cards() -> None:
    names = {name: card for card in CARDS for name in card.names}
    known: set[ModelCard] = set()
    for ids, others, dimensions, tokens, input_type in table("| model | also known as |"):
        for card in [names[name.lower()] for name in quoted(ids)]:
            known.add(card)
            assert all(names[name.lower()] is card for name in quoted(others))
            lengths = [int(number) for number in re.findall(r"\d+", dimensions)]
            assert lengths == [card.dimensions, *card.matryoshka]
            assert (int(tokens), input_type) == (card.max_tokens, card.input_type)
    assert known == set(CARDS)


def test_the_named_variables_and_flags_exist() -> None:
    flags = {f"--{name.replace('_', '-')}" for name in inspect.signature(serve).parameters}
    for names, given, _ in table("| variable | flag |"):
        assert set(quoted(names)) <= VARIABLES
        for variable, flag in zip(quoted(names), quoted(given), strict=False):
            assert flag in flags
            assert variable.removeprefix("EMBEDDINGS_MCP_").startswith(flag.strip("-").replace("-", "_").upper())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_only_existing_variables(page: Path) -> None:
    named = set(re.findall(r"EMBEDDINGS_MCP_[A-Z_]*[A-Z]", page.read_text("utf-8")))
    assert named <= VARIABLES | {"EMBEDDINGS_MCP_UPDATE_SNAPSHOTS", "EMBEDDINGS_MCP_SCHEMAS"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_resolves(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        if "://" not in target:
            path, _, section = target.partition("#")
            destination = page.parent / path if path else page
            assert destination.exists(), target
            assert not section or section in sections(destination), target


def sections(page: Path) -> set[str]:
    """Return the anchors of a page: its headings as GitHub converts them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}

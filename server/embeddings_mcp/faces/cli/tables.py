"""Answers as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from embeddings_mcp.schema import EmbeddingResponse, ModelsResponse, SearchResponse, SimilarityResponse
from embeddings_mcp.verification import Verdict

if TYPE_CHECKING:
    from embeddings_mcp.embedders.cache.maintenance import Contents
    from embeddings_mcp.faces.cli.doctor import Finding

_LONGEST_TEXT = 56
"""Characters of a text that are shown beside a column or two of numbers, on a terminal of 80."""

_NUMBERS_SHOWN = 3


def embeddings(answer: EmbeddingResponse, texts: Sequence[str]) -> RenderableType:
    """A row for each text, with the first numbers of its vector."""
    table = _table("text", "vector", "length")
    for item, text in zip(answer["data"], texts, strict=True):
        vector = item["embedding"]
        numbers = "  ".join(f"{float(number):+.4f}" for number in vector[:_NUMBERS_SHOWN])
        table.add_row(_short(text, 34), f"{numbers}  …", str(len(vector)))
    return _titled(_made_by(answer), table)


def similarity(answer: SimilarityResponse, texts: Sequence[str], others: Sequence[str]) -> RenderableType:
    """The matrix, its columns numbered as its rows where both are the same texts; or a row for each pair."""
    title = ", ".join([*([answer["metric"]] if "metric" in answer else []), _made_by(answer)])
    if "pairs" in answer:
        table = _table("score", "input", "other")
        for pair in answer["pairs"]:
            table.add_row(_score(pair["score"]), _short(texts[pair["input"]], 30), _short(others[pair["other"]], 30))
        return _titled(title, table)
    columns = map(str, range(len(texts))) if others is texts else (_short(other, 16).plain for other in others)
    table = _table("", "text", *columns)
    room = max(16, 66 - 9 * len(others))
    for index, (row, text) in enumerate(zip(answer.get("scores", []), texts, strict=True)):
        table.add_row(str(index), _short(text, room), *map(_score, row))
    return _titled(title, table)


def search(answer: SearchResponse, passages: Sequence[str]) -> RenderableType:
    """A row for each passage found, best first."""
    table = _table("score", "index", "passage")
    for hit in answer["results"]:
        table.add_row(_score(hit["score"]), str(hit["index"]), _short(passages[hit["index"]]))
    return _titled(_made_by(answer), table)


def models(answer: ModelsResponse) -> Table:
    """A row for each model."""
    table = _table("model", "length", "also", "tokens", "input_type", "from", "licence")
    for column in table.columns:  # on a terminal too narrow for all of it, names go on below
        column.no_wrap, column.overflow = False, "fold"
    for entry in answer["models"]:
        table.add_row(
            f"{entry['id']} (default)" if entry["default"] else entry["id"],
            str(entry.get("dimensions", "?")),
            ", ".join(map(str, entry["allowed_dimensions"])),
            str(entry.get("max_tokens", "?")),
            entry["input_type"],
            entry["served_from"],
            entry.get("licence", ""),
        )
    return table


def comparisons(verdict: Verdict) -> Table:
    """A row for each sample that two models embedded."""
    table = _table("sample", "as", "cosine")
    for comparison in verdict.comparisons:
        table.add_row(comparison.sample, comparison.input_type or "", f"{comparison.cosine:.6f}")
    return table


def finding(found: Finding) -> Text:
    """One line, and below it the next step where there is one."""
    mark, style = {"fine": ("ok", "green"), "note": ("note", "yellow"), "problem": ("PROBLEM", "bold red")}[found.state]
    text = Text.assemble((f"{mark:<9}", style), (found.subject, "bold"), f": {found.says}")
    return text.append(f"\n         {found.advice}", "italic") if found.advice else text


def cache(contents: Contents) -> RenderableType:
    """A row for each model that a cache holds vectors of."""
    if not contents.bytes:
        return Text(f"{contents.path}: nothing is remembered there yet")
    table = _table("model", "from", "vectors", "MiB", "last used")
    for holding in contents.holdings:
        used = datetime.fromtimestamp(holding.last_used).astimezone().date().isoformat()
        table.add_row(holding.model, holding.origin, f"{holding.vectors:,}", _mebibytes(holding.bytes), used)
    return _titled(f"{contents.path}, {_mebibytes(contents.bytes)} MiB", table)


def tools(names_and_titles: Sequence[tuple[str, str]]) -> Table:
    """A row for each tool."""
    table = _table("tool", "what it does")
    for name, title in names_and_titles:
        table.add_row(name, title)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(Text(column), no_wrap=True)
    return table


def _titled(title: str, table: Table) -> RenderableType:
    """The table under a line of its own, since a table's title is broken at the table's width."""
    return Group(Text(title, style="dim"), table)


def _mebibytes(count: int) -> str:
    return f"{count / (1 << 20):,.1f}"


def _made_by(answer: EmbeddingResponse | SimilarityResponse | SearchResponse) -> str:
    return f"{answer['model']}, {answer['usage']['prompt_tokens']} tokens"


def _score(score: float) -> str:
    return f"{score:.4f}"


def _short(text: str, longest: int = _LONGEST_TEXT) -> Text:
    """The text on one line; `Text`, so that brackets in it are not taken for markup."""
    line = " ".join(text.split())
    return Text(line if len(line) <= longest else line[: longest - 1] + "…")

"""Responses as tables for a terminal."""

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

_MAX_TEXT_WIDTH = 56
"""Characters shown of a text next to one or two columns of numbers, on an 80-column terminal."""

_COMPONENTS_SHOWN = 3


def embeddings(response: EmbeddingResponse, texts: Sequence[str]) -> RenderableType:
    """One row per text, with the first components of its vector."""
    table = _table("text", "vector", "length")
    for item, text in zip(response["data"], texts, strict=True):
        vector = item["embedding"]
        numbers = "  ".join(f"{float(number):+.4f}" for number in vector[:_COMPONENTS_SHOWN])
        table.add_row(_shorten(text, 34), f"{numbers}  …", str(len(vector)))
    return _with_title(_source(response), table)


def similarity(response: SimilarityResponse, texts: Sequence[str], others: Sequence[str]) -> RenderableType:
    """The score matrix, with columns numbered like the rows if both are the same texts; or one row per pair."""
    title = ", ".join([*([response["metric"]] if "metric" in response else []), _source(response)])
    if "pairs" in response:
        table = _table("score", "input", "other")
        for pair in response["pairs"]:
            table.add_row(
                _score(pair["score"]), _shorten(texts[pair["input"]], 30), _shorten(others[pair["other"]], 30)
            )
        return _with_title(title, table)
    columns = map(str, range(len(texts))) if others is texts else (_shorten(other, 16).plain for other in others)
    table = _table("", "text", *columns)
    text_width = max(16, 66 - 9 * len(others))
    for index, (row, text) in enumerate(zip(response.get("scores", []), texts, strict=True)):
        table.add_row(str(index), _shorten(text, text_width), *map(_score, row))
    return _with_title(title, table)


def search(response: SearchResponse, passages: Sequence[str]) -> RenderableType:
    """One row per passage found, best first."""
    table = _table("score", "index", "passage")
    for hit in response["results"]:
        table.add_row(_score(hit["score"]), str(hit["index"]), _shorten(passages[hit["index"]]))
    return _with_title(_source(response), table)


def models(response: ModelsResponse) -> Table:
    """One row per model."""
    table = _table("model", "length", "also", "tokens", "input_type", "from", "license")
    for column in table.columns:  # wrap names on a narrow terminal instead of cropping them
        column.no_wrap, column.overflow = False, "fold"
    for entry in response["models"]:
        table.add_row(
            f"{entry['id']} (default)" if entry["default"] else entry["id"],
            str(entry.get("dimensions", "?")),
            ", ".join(map(str, entry["allowed_dimensions"])),
            str(entry.get("max_tokens", "?")),
            entry["input_type"],
            entry["served_from"],
            entry.get("license", ""),
        )
    return table


def comparisons(verdict: Verdict) -> Table:
    """One row per sample that both models embedded."""
    table = _table("sample", "as", "cosine")
    for comparison in verdict.comparisons:
        table.add_row(comparison.sample, comparison.input_type or "", f"{comparison.cosine:.6f}")
    return table


def finding(found: Finding) -> Text:
    """One line, followed by a line with the advice if there is any."""
    mark, style = {"ok": ("ok", "green"), "note": ("note", "yellow"), "problem": ("PROBLEM", "bold red")}[found.state]
    text = Text.assemble((f"{mark:<9}", style), (found.subject, "bold"), f": {found.message}")
    return text.append(f"\n         {found.advice}", "italic") if found.advice else text


def cache(contents: Contents) -> RenderableType:
    """One row per model that has vectors in the cache."""
    if not contents.bytes:
        return Text(f"{contents.path}: no vectors are cached there yet")
    table = _table("model", "from", "vectors", "MiB", "last used")
    for holding in contents.holdings:
        used = datetime.fromtimestamp(holding.last_used).astimezone().date().isoformat()
        table.add_row(holding.model, holding.origin, f"{holding.vectors:,}", _mebibytes(holding.bytes), used)
    return _with_title(f"{contents.path}, {_mebibytes(contents.bytes)} MiB", table)


def tools(names_and_titles: Sequence[tuple[str, str]]) -> Table:
    """One row per tool."""
    table = _table("tool", "what it does")
    for name, title in names_and_titles:
        table.add_row(name, title)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(Text(column), no_wrap=True)
    return table


def _with_title(title: str, table: Table) -> RenderableType:
    """Put the title on a line of its own, since rich wraps a table title at the table's width."""
    return Group(Text(title, style="dim"), table)


def _mebibytes(count: int) -> str:
    return f"{count / (1 << 20):,.1f}"


def _source(response: EmbeddingResponse | SimilarityResponse | SearchResponse) -> str:
    return f"{response['model']}, {response['usage']['prompt_tokens']} tokens"


def _score(score: float) -> str:
    return f"{score:.4f}"


def _shorten(text: str, width: int = _MAX_TEXT_WIDTH) -> Text:
    """Return the text on one line, cut to `width` characters; a `Text`, so that brackets are not parsed as markup."""
    line = " ".join(text.split())
    return Text(line if len(line) <= width else line[: width - 1] + "…")

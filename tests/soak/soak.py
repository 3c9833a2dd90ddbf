"""A soak test: a real server with a real model, under concurrent load from good, impatient, faulty and hostile callers.

It checks that every accepted request gets exactly one response, with its own vectors; that every bad request is refused
with the right status; that nothing hangs; that kill -9 loses only the requests in flight; and that the idle server ends
with no more memory, files and threads than it had halfway. All load is on loopback.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import anyio
import httpx
import httpx2
import numpy as np
from benchmarks.process import process_tree, resident_megabytes
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from embeddings_mcp.models import ModelCard
from tests.nim.standin import Fault, StandIn, answering, cut, overstated, stand_in, truncated
from tests.support import ROOT, START_SECONDS

LOCAL = "sentence-transformers/all-MiniLM-L6-v2"
UPSTREAM = ModelCard(id="test/symmetric", dimensions=8, max_tokens=64)
KEY = "soak-key"
MAX_BODY = 200_000
MAX_INPUTS = 64
PATIENCE = 60.0
"""Seconds without a response that count as a hang."""

_WORDS = [
    "river",
    "invoice",
    "galaxy",
    "oven",
    "treaty",
    "violin",
    "password",
    "harvest",
    "engine",
    "coral",
    "ledger",
    "monsoon",
    "quartz",
]
TEXTS = [" ".join(random.Random(seed).choices(_WORDS, k=1 + seed % 40)) for seed in range(160)]

_BAD_JSON = (b"", b"[", b'{"model": "default"', b'"text"', b'{"model": 1, "input": [[1]]}', b"\xff\xfe", b"[" * 5000)


@dataclass
class Findings:
    """The outcome of a soak test.

    Attributes:
        answered: number of requests by kind and outcome.
        wrong: violated expectations.
        lost: requests that were in flight when the server was killed.
        kills: times that the server was killed.
        vectors: number of vectors compared with the expected ones.
        largest_error: largest difference between them.
        resources: MiB resident, open files and threads after each round since the last start, with all callers paused.
    """

    answered: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lost: int = 0
    kills: int = 0
    vectors: int = 0
    largest_error: float = 0.0
    resources: list[tuple[float, int, int]] = field(default_factory=list)

    def expect(self, kind: str, outcome: object, *accepted: object) -> None:
        """Record an outcome, which is wrong unless it is one of those accepted."""
        self.answered[f"{kind}: {outcome}"] += 1
        if outcome not in accepted:
            self.wrong.append(f"{kind}: {outcome}, not {' or '.join(map(str, accepted))}")


class Server:
    """The server process, which is killed and restarted with the same cache."""

    def __init__(self, folder: Path, upstream: str) -> None:
        self.log = folder / "log"
        self.generation = 0
        self.model_ended_at = 0.0
        self.url = ""
        endpoint = {"url": upstream, "models": [UPSTREAM.id], "deadline": 10, "timeout": 2}
        self._environment = os.environ | {
            "EMBEDDINGS_MCP_API_KEY": KEY,
            "EMBEDDINGS_MCP_ENDPOINTS": json.dumps([endpoint]),
            "EMBEDDINGS_MCP_MAX_BODY_BYTES": str(MAX_BODY),
            "EMBEDDINGS_MCP_MAX_INPUTS": str(MAX_INPUTS),
            "EMBEDDINGS_MCP_CACHE_MEMORY_MB": "1",
            "EMBEDDINGS_MCP_LOG_LEVEL": "error",
        }
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_raised: object) -> None:
        """Kill the process, if an error has left it running."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    async def start(self, *, cached: bool) -> None:
        """Start the process, and wait until the model is ready."""
        self.generation += 1
        environment = {**self._environment, "EMBEDDINGS_MCP_CACHE": str(self._folder / "cache") if cached else "off"}
        command = [sys.executable, "-m", "embeddings_mcp", "serve", "--transport", "http", "--port", "0"]
        with self.log.open("ab") as log:
            before = self.log.stat().st_size
            self._process = subprocess.Popen(  # noqa: ASYNC220 - nothing else is running yet
                command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=log
            )
        with anyio.fail_after(START_SECONDS):
            while "/v1" not in (output := self.log.read_bytes()[before:].decode()):
                await anyio.sleep(0.05)
                assert self._process.poll() is None, output
            self.url = output.partition("REST at ")[2].partition("/v1")[0]
            async with httpx.AsyncClient(timeout=START_SECONDS) as client:
                while (await client.get(f"{self.url}/v1/health/ready")).status_code != 200:  # noqa: ASYNC110 - by HTTP
                    await anyio.sleep(0.1)

    def end(self, signal_: signal.Signals) -> int:
        """Send a signal and wait for the exit; returns the exit code."""
        assert self._process is not None
        self._process.send_signal(signal_)
        return self._process.wait(30)

    def end_model(self) -> None:
        """Kill the model's process, but not the server."""
        assert self._process is not None
        for process in process_tree(self._process.pid)[1:]:
            self.model_ended_at = time.monotonic()
            os.kill(process, signal.SIGKILL)

    def resources(self) -> tuple[float, int, int]:
        """MiB resident, open files and threads of the server and the model's process."""
        assert self._process is not None
        processes = process_tree(self._process.pid)
        files = sum(len([*Path(f"/proc/{process}/fd").iterdir()]) for process in processes)
        threads = sum(len([*Path(f"/proc/{process}/task").iterdir()]) for process in processes)
        return resident_megabytes(self._process.pid), files, threads


@dataclass
class Callers:
    """All kinds of callers of a server."""

    server: Server
    findings: Findings
    expected: dict[str, np.ndarray[Any, Any]]
    endpoint: StandIn
    rng: random.Random
    paused: bool = True
    active: int = 0

    async def run(self, *actions: Callable[[], Awaitable[None]]) -> None:
        """Repeat randomly chosen actions forever, except while paused."""
        while True:
            if self.paused:
                await anyio.sleep(0.02)
                continue
            action = self.rng.choice(actions)
            generation = self.server.generation
            self.active += 1
            try:
                with anyio.fail_after(PATIENCE):
                    await action()
            except TimeoutError:
                self.findings.wrong.append(f"{action.__name__}: no response within {PATIENCE:.0f} s")
            except (OSError, httpx.TransportError, httpx2.TransportError, ExceptionGroup) as error:
                if self.server.generation == generation and not self.paused:
                    await anyio.sleep(0.5)  # the server may have been killed just before `generation` changes
                if self.server.generation == generation and self.server.url:
                    self.findings.wrong.append(f"{action.__name__}: {error!r}")
                else:
                    self.findings.lost += 1
                await anyio.sleep(0.1)
            finally:
                self.active -= 1

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """A REST client."""
        async with httpx.AsyncClient(
            base_url=self.server.url, headers={"authorization": f"Bearer {KEY}"}, timeout=PATIENCE
        ) as client:
            yield client

    def texts(self, most: int) -> list[str]:
        """Up to `most` random texts, possibly with repetitions."""
        return self.rng.choices(TEXTS, k=self.rng.randint(1, most))

    def check(self, kind: str, texts: list[str], vectors: list[Any], model: str = LOCAL) -> None:
        """Compare vectors with the expected ones."""
        if len(vectors) != len(texts):
            self.findings.wrong.append(f"{kind}: {len(vectors)} vectors of {len(texts)} texts")
            return
        for text, vector in zip(texts, vectors, strict=True):
            actual = np.frombuffer(base64.b64decode(vector), "<f4") if isinstance(vector, str) else np.array(vector)
            expected = self.expected[text] if model == LOCAL else self.endpoint.vector(text, UPSTREAM.id)
            error = float(np.abs(actual - expected).max())
            self.findings.vectors += 1
            self.findings.largest_error = max(self.findings.largest_error, error)
            if error > 1e-5:
                self.findings.wrong.append(f"{kind}: a vector is off by {error:.2e}")

    # --- Good callers ------------------------------------------------------------------------------------------------

    def model_killed_since(self, since: float) -> bool:
        """Whether the model was killed since then, or up to a second earlier, so that a request may have failed."""
        return self.server.model_ended_at > since - 1

    async def rest(self) -> None:
        """Request vectors over REST, for one text or many."""
        began = time.monotonic()
        texts = self.texts(1 if self.rng.random() < 0.5 else MAX_INPUTS)
        request_id = f"{self.rng.getrandbits(64):x}"
        encoding_format = self.rng.choice(["float", "base64"])
        async with self.client() as client:
            body = {"model": LOCAL, "input": texts, "encoding_format": encoding_format}
            answer = await client.post("/v1/embeddings", json=body, headers={"x-request-id": request_id})
        self.findings.expect("rest", answer.status_code, 200, *([503] if self.model_killed_since(began) else []))
        if answer.headers.get("x-request-id") != request_id:
            self.findings.wrong.append("rest: the response to another request")
        if answer.status_code == 200:
            self.check("rest", texts, [entry["embedding"] for entry in answer.json()["data"]])

    async def upstream(self) -> None:
        """Request vectors from an endpoint that sometimes fails."""
        texts = [text for text in self.texts(8) if len(text.split()) <= 40]
        async with self.client() as client:
            answer = await client.post("/v1/embeddings", json={"model": UPSTREAM.id, "input": texts})
        self.findings.expect("upstream", answer.status_code, 200, 429, 502, 503, 504)
        if answer.status_code == 200:
            self.check("upstream", texts, [entry["embedding"] for entry in answer.json()["data"]], UPSTREAM.id)

    async def mcp(self) -> None:
        """Open an MCP session: request vectors and scores, and make an invalid call."""
        headers = {"authorization": f"Bearer {KEY}"}
        mode: Any = self.rng.choice(["legacy", "auto"])
        async with httpx2.AsyncClient(headers=headers, timeout=PATIENCE) as http:
            transport = streamable_http_client(f"{self.server.url}/mcp", http_client=http)
            async with Client(transport, mode=mode) as client:
                texts = self.texts(8)
                began = time.monotonic()
                embedded = await client.call_tool("create_embedding", {"model": LOCAL, "input": texts})
                self.findings.expect(
                    "mcp", embedded.is_error, False, *([True] if self.model_killed_since(began) else [])
                )
                if not embedded.is_error:
                    data = (embedded.structured_content or {})["data"]
                    self.check("mcp", texts, [entry["embedding"] for entry in data])
                found = await client.call_tool("search", {"model": "default", "query": texts[0], "input": texts})
                self.findings.expect(
                    "mcp search", found.is_error, False, *([True] if self.model_killed_since(began) else [])
                )
                wrong = await client.call_tool("create_embedding", {"model": "none", "input": texts, "more": 1})
                self.findings.expect("mcp wrong", wrong.is_error, True)

    # --- Impatient callers -------------------------------------------------------------------------------------------

    async def cancelled(self) -> None:
        """Disconnect before the response."""
        async with self.client() as client:
            with anyio.move_on_after(self.rng.uniform(0, 0.05)) as scope:
                await client.post("/v1/embeddings", json={"model": LOCAL, "input": self.texts(MAX_INPUTS)})
        self.findings.answered[f"cancelled: {'disconnected' if scope.cancelled_caught else 'answered'}"] += 1

    async def cancelled_tool(self) -> None:
        """Cancel a tool call, and continue the session."""
        async with httpx2.AsyncClient(headers={"authorization": f"Bearer {KEY}"}, timeout=PATIENCE) as http:
            transport = streamable_http_client(f"{self.server.url}/mcp", http_client=http)
            async with Client(transport, mode="legacy") as client:
                with anyio.move_on_after(self.rng.uniform(0, 0.05)):
                    await client.call_tool("create_embedding", {"model": LOCAL, "input": self.texts(MAX_INPUTS)})
                again = await client.call_tool("list_models", {})
                self.findings.expect("mcp after cancellation", again.is_error, False)

    async def disconnected(self) -> None:
        """Close the connection in the middle of a request."""
        body = json.dumps({"model": LOCAL, "input": self.texts(MAX_INPUTS)}).encode()
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        request = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        url = httpx.URL(self.server.url)
        _, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(request[: self.rng.randint(1, len(request))])
        await writer.drain()
        if self.rng.random() < 0.5:
            writer.transport.abort()
        writer.close()
        self.findings.answered["disconnected"] += 1

    # --- Faulty and hostile callers ----------------------------------------------------------------------------------

    async def bad(self) -> None:
        """Send requests that must be refused, each with its own status."""
        as_json = {"content-type": "application/json"}
        many = json.dumps({"model": LOCAL, "input": ["a"] * (MAX_INPUTS + 1)}).encode()
        large = b"x" * (MAX_BODY + 1)
        path = self.rng.choice(["/v1/embeddings", "/v1/search", "/v1/similarity"])
        kinds: list[tuple[str, bytes | AsyncIterator[bytes], dict[str, str], int]] = [
            *(("bad JSON", body, as_json, 400) for body in _BAD_JSON),
            ("too many", many, as_json, 400),
            ("too large", large, as_json, 413),
            ("too large, chunked", _chunks(large), as_json, 413),
            ("no JSON", b"a=1", {}, 415),
            ("another key", many, as_json | {"authorization": "Bearer no"}, 401),
            ("another host", many, as_json | {"host": "evil.example"}, 421),
            ("another origin", many, as_json | {"origin": "https://evil.example"}, 403),
        ]
        async with self.client() as client:
            for kind, content, headers, status in self.rng.sample(kinds, 3):
                target = "/v1/embeddings" if kind == "too many" else path
                answer = await client.post(target, content=content, headers=headers)
                self.findings.expect(kind, answer.status_code, status)


async def _chunks(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 50_000):
        yield body[start : start + 50_000]


def _faults(rng: random.Random) -> Iterator[Fault | None]:
    """Endless sequence in which half of the responses are correct, and half have a random fault."""
    faults: list[Fault] = [cut, truncated, overstated, answering(500), answering(503), answering(429, Retry_After="1")]
    while True:
        yield rng.choice(faults) if rng.random() < 0.5 else None


async def soak(folder: Path, *, rounds: int, seconds: float, kills: int, seed: int = 0) -> Findings:
    """Put a server under load.

    Args:
        folder: for the server's log and cache.
        rounds: number of rounds of load on the last server, with a pause after each.
        seconds: duration of each round.
        kills: number of servers before the last one, each killed at the end of a round, and its model halfway.
        seed: of the callers' random choices.
    """
    rng = random.Random(seed)
    findings = Findings()
    async with (
        stand_in(models={UPSTREAM.id: UPSTREAM}, faults=_faults(rng)) as endpoint,
        Server(folder, endpoint.url) as server,
    ):
        await server.start(cached=True)
        callers = Callers(server, findings, await _expected_vectors(server), endpoint, rng)
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(callers.run, callers.rest)
                tasks.start_soon(callers.run, callers.mcp, callers.cancelled_tool)
            tasks.start_soon(callers.run, callers.upstream)
            tasks.start_soon(callers.run, callers.cancelled, callers.disconnected)
            tasks.start_soon(callers.run, callers.bad)
            for kill in range(kills):
                callers.paused = False
                await anyio.sleep(seconds / 2)
                server.end_model()
                await anyio.sleep(seconds / 2)
                server.url = ""
                server.end(signal.SIGKILL)
                findings.kills += 1
                callers.paused = True
                await server.start(cached=(kills - kill) % 2 == 0)  # without a cache, the last server has to compute
            for _ in range(rounds):
                callers.paused = False
                await anyio.sleep(seconds)
                callers.paused = True
                with anyio.fail_after(2 * PATIENCE):
                    while callers.active:  # noqa: ASYNC110 - there is no event for it
                        await anyio.sleep(0.05)
                await anyio.sleep(1)  # cancelled requests still have to end in the server
                findings.resources.append(server.resources())
            tasks.cancel_scope.cancel()
        code = server.end(signal.SIGTERM)
        findings.expect("SIGTERM", code, 0, -signal.SIGTERM)
    log = server.log.read_text()
    if "Traceback" in log or "never retrieved" in log:
        findings.wrong.append(f"the log has a traceback: {log[-3000:]}")
    return findings


async def _expected_vectors(server: Server) -> dict[str, np.ndarray[Any, Any]]:
    """The vector of every text, each embedded in its own request."""
    vectors = {}
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {KEY}"}, timeout=PATIENCE) as client:
        for text in TEXTS:
            answer = await client.post(f"{server.url}/v1/embeddings", json={"model": LOCAL, "input": text})
            vectors[text] = np.array(answer.raise_for_status().json()["data"][0]["embedding"])
    return vectors


def report(findings: Findings, began: float) -> str:
    """A readable report of the findings."""
    requests = sum(findings.answered.values())
    lines = [
        f"{time.monotonic() - began:.0f} s, {requests:,} requests, {findings.kills} kills, {findings.lost} lost",
        f"{findings.vectors:,} vectors compared, largest difference {findings.largest_error:.1e}",
        *(f"idle: {memory:.0f} MiB, {files} files, {threads} threads" for memory, files, threads in findings.resources),
        *(f"  {count:>7,}  {outcome}" for outcome, count in sorted(findings.answered.items())),
        f"{len(findings.wrong)} wrong",
        *(f"  {wrong}" for wrong in findings.wrong[:20]),
    ]
    return "\n".join(lines)


def leaks(findings: Findings, *, settled: bool) -> list[str]:
    """Resources of which the server uses more at the end than in the first half of the rounds, beyond normal variation.

    Args:
        findings: of the soak test.
        settled: whether the rounds were long enough for memory use to level off.
    """
    samples = findings.resources
    before = [max(values) for values in zip(*samples[: (len(samples) + 1) // 2], strict=True)]
    tolerances = (0.1 * before[0] if settled else float("inf"), 4, 4)
    return [
        f"{name}: {most:.0f}, then {last:.0f}"
        for name, most, last, tolerance in zip(
            ("MiB", "files", "threads"), before, samples[-1], tolerances, strict=True
        )
        if last > most + tolerance
    ]

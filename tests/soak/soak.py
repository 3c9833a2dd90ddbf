"""A real server with a real model, and callers of every kind at once: good, impatient, broken and hostile ones.

What is claimed: every request that was accepted is answered once and with its own vectors; every bad one is refused as
it should be; nobody waits for ever; a kill -9 costs no more than what was in flight; and when all callers are silent
again the server holds no more memory, files and threads than it did halfway. Load is put on loopback only.
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
from typing import Any

import anyio
import httpx
import httpx2
import numpy as np
from benchmarks.process import family, resident_megabytes
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
"""Seconds without an answer that count as a hang."""

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
    """What has happened.

    Attributes:
        answered: requests by kind and outcome.
        wrong: what should not have been.
        lost: requests that were in flight when the server was killed.
        vectors: those that were compared with the true one.
        resources: after each round since the last start, with all callers silent: MiB resident, files, threads.
    """

    answered: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lost: int = 0
    kills: int = 0
    vectors: int = 0
    largest_error: float = 0.0
    resources: list[tuple[float, int, int]] = field(default_factory=list)

    def expect(self, kind: str, outcome: object, *accepted: object) -> None:
        """Note an outcome, which is wrong if it is none of those accepted."""
        self.answered[f"{kind}: {outcome}"] += 1
        if outcome not in accepted:
            self.wrong.append(f"{kind}: {outcome}, not {' or '.join(map(str, accepted))}")


class Server:
    """The process, which is killed and started again on the same cache."""

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

    async def start(self, *, cached: bool) -> None:
        """Start, and wait until the model answers."""
        self.generation += 1
        environment = {**self._environment, "EMBEDDINGS_MCP_CACHE": str(self._folder / "cache") if cached else "off"}
        command = [sys.executable, "-m", "embeddings_mcp", "serve", "--transport", "http", "--port", "0"]
        with self.log.open("ab") as log:
            before = self.log.stat().st_size
            self._process = subprocess.Popen(  # noqa: ASYNC220 - nothing else goes on yet
                command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=log
            )
        with anyio.fail_after(START_SECONDS):
            while "/v1" not in (said := self.log.read_bytes()[before:].decode()):
                await anyio.sleep(0.05)
                assert self._process.poll() is None, said
            self.url = said.partition("REST at ")[2].partition("/v1")[0]
            async with httpx.AsyncClient(timeout=START_SECONDS) as client:
                while (await client.get(f"{self.url}/v1/health/ready")).status_code != 200:  # noqa: ASYNC110 - by HTTP
                    await anyio.sleep(0.1)

    def end(self, how: signal.Signals) -> int:
        """Send a signal, and wait for the end."""
        assert self._process is not None
        self._process.send_signal(how)
        return self._process.wait(30)

    def end_model(self) -> None:
        """Kill the process that computes, and leave the server to it."""
        assert self._process is not None
        for process in family(self._process.pid)[1:]:
            self.model_ended_at = time.monotonic()
            os.kill(process, signal.SIGKILL)

    def resources(self) -> tuple[float, int, int]:
        """MiB resident, open files, threads, of the server and the process that computes for it."""
        assert self._process is not None
        processes = family(self._process.pid)
        files = sum(len([*Path(f"/proc/{process}/fd").iterdir()]) for process in processes)
        threads = sum(len([*Path(f"/proc/{process}/task").iterdir()]) for process in processes)
        return resident_megabytes(self._process.pid), files, threads


@dataclass
class Fire:
    """The callers."""

    server: Server
    findings: Findings
    truth: dict[str, np.ndarray[Any, Any]]
    standing: StandIn
    chance: random.Random
    calm: bool = True
    active: int = 0

    async def caller(self, *deeds: Callable[[], Awaitable[None]]) -> None:
        """Do one deed after the other, for ever, except when all are to be silent."""
        while True:
            if self.calm:
                await anyio.sleep(0.02)
                continue
            deed = self.chance.choice(deeds)
            generation = self.server.generation
            self.active += 1
            try:
                with anyio.fail_after(PATIENCE):
                    await deed()
            except TimeoutError:
                self.findings.wrong.append(f"{deed.__name__}: no answer within {PATIENCE:.0f} s")
            except (OSError, httpx.TransportError, httpx2.TransportError, ExceptionGroup) as error:
                if self.server.generation == generation and not self.calm:
                    await anyio.sleep(0.5)  # a kill may have come before anybody could say so
                if self.server.generation == generation and self.server.url:
                    self.findings.wrong.append(f"{deed.__name__}: {error!r}")
                else:
                    self.findings.lost += 1
                await anyio.sleep(0.1)
            finally:
                self.active -= 1

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """A connection of REST."""
        async with httpx.AsyncClient(
            base_url=self.server.url, headers={"authorization": f"Bearer {KEY}"}, timeout=PATIENCE
        ) as client:
            yield client

    def texts(self, most: int) -> list[str]:
        """Some of the texts, any of them several times."""
        return self.chance.choices(TEXTS, k=self.chance.randint(1, most))

    def check(self, kind: str, texts: list[str], vectors: list[Any], model: str = LOCAL) -> None:
        """Compare vectors with the true ones."""
        if len(vectors) != len(texts):
            self.findings.wrong.append(f"{kind}: {len(vectors)} vectors of {len(texts)} texts")
            return
        for text, vector in zip(texts, vectors, strict=True):
            made = np.frombuffer(base64.b64decode(vector), "<f4") if isinstance(vector, str) else np.array(vector)
            true = self.truth[text] if model == LOCAL else self.standing.vector(text, UPSTREAM.id)
            error = float(np.abs(made - true).max())
            self.findings.vectors += 1
            self.findings.largest_error = max(self.findings.largest_error, error)
            if error > 1e-5:
                self.findings.wrong.append(f"{kind}: a vector is off by {error:.2e}")

    # --- Good callers ------------------------------------------------------------------------------------------------

    def may_fail(self, since: float) -> bool:
        """Whether the model was killed while what was asked for since then may have been computed."""
        return self.server.model_ended_at > since - 1

    async def rest(self) -> None:
        """Vectors over REST, of one text or many."""
        began = time.monotonic()
        texts = self.texts(1 if self.chance.random() < 0.5 else MAX_INPUTS)
        name = f"{self.chance.getrandbits(64):x}"
        form = self.chance.choice(["float", "base64"])
        async with self.client() as client:
            ask = {"model": LOCAL, "input": texts, "encoding_format": form}
            answer = await client.post("/v1/embeddings", json=ask, headers={"x-request-id": name})
        self.findings.expect("rest", answer.status_code, 200, *([503] if self.may_fail(began) else []))
        if answer.headers.get("x-request-id") != name:
            self.findings.wrong.append("rest: the answer to another request")
        if answer.status_code == 200:
            self.check("rest", texts, [entry["embedding"] for entry in answer.json()["data"]])

    async def upstream(self) -> None:
        """Vectors of an endpoint that fails now and then."""
        texts = [text for text in self.texts(8) if len(text.split()) <= 40]
        async with self.client() as client:
            answer = await client.post("/v1/embeddings", json={"model": UPSTREAM.id, "input": texts})
        self.findings.expect("upstream", answer.status_code, 200, 429, 502, 503, 504)
        if answer.status_code == 200:
            self.check("upstream", texts, [entry["embedding"] for entry in answer.json()["data"]], UPSTREAM.id)

    async def mcp(self) -> None:
        """A session over MCP: vectors, scores, and a call that is wrong."""
        headers = {"authorization": f"Bearer {KEY}"}
        mode: Any = self.chance.choice(["legacy", "auto"])
        async with httpx2.AsyncClient(headers=headers, timeout=PATIENCE) as http:
            transport = streamable_http_client(f"{self.server.url}/mcp", http_client=http)
            async with Client(transport, mode=mode) as client:
                texts = self.texts(8)
                began = time.monotonic()
                made = await client.call_tool("create_embedding", {"model": LOCAL, "input": texts})
                self.findings.expect("mcp", made.is_error, False, *([True] if self.may_fail(began) else []))
                if not made.is_error:
                    data = (made.structured_content or {})["data"]
                    self.check("mcp", texts, [entry["embedding"] for entry in data])
                found = await client.call_tool("search", {"model": "default", "query": texts[0], "input": texts})
                self.findings.expect("mcp search", found.is_error, False, *([True] if self.may_fail(began) else []))
                wrong = await client.call_tool("create_embedding", {"model": "none", "input": texts, "more": 1})
                self.findings.expect("mcp wrong", wrong.is_error, True)

    # --- Impatient ones ----------------------------------------------------------------------------------------------

    async def cancelled(self) -> None:
        """A request that is given up."""
        async with self.client() as client:
            with anyio.move_on_after(self.chance.uniform(0, 0.05)) as scope:
                await client.post("/v1/embeddings", json={"model": LOCAL, "input": self.texts(MAX_INPUTS)})
        self.findings.answered[f"given up: {'left' if scope.cancelled_caught else 'answered'}"] += 1

    async def cancelled_tool(self) -> None:
        """A tool call that is given up, in a session that goes on."""
        async with httpx2.AsyncClient(headers={"authorization": f"Bearer {KEY}"}, timeout=PATIENCE) as http:
            transport = streamable_http_client(f"{self.server.url}/mcp", http_client=http)
            async with Client(transport, mode="legacy") as client:
                with anyio.move_on_after(self.chance.uniform(0, 0.05)):
                    await client.call_tool("create_embedding", {"model": LOCAL, "input": self.texts(MAX_INPUTS)})
                again = await client.call_tool("list_models", {})
                self.findings.expect("mcp after giving up", again.is_error, False)

    async def broken_off(self) -> None:
        """A connection that ends in the middle of a request."""
        body = json.dumps({"model": LOCAL, "input": self.texts(MAX_INPUTS)}).encode()
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        whole = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        url = httpx.URL(self.server.url)
        _, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(whole[: self.chance.randint(1, len(whole))])
        await writer.drain()
        if self.chance.random() < 0.5:
            writer.transport.abort()
        writer.close()
        self.findings.answered["broken off"] += 1

    # --- Broken and hostile ones -------------------------------------------------------------------------------------

    async def bad(self) -> None:
        """Requests that must be refused, each in its own way."""
        as_json = {"content-type": "application/json"}
        many = json.dumps({"model": LOCAL, "input": ["a"] * (MAX_INPUTS + 1)}).encode()
        large = b"x" * (MAX_BODY + 1)
        path = self.chance.choice(["/v1/embeddings", "/v1/search", "/v1/similarity"])
        kinds: list[tuple[str, bytes | AsyncIterator[bytes], dict[str, str], int]] = [
            *(("bad JSON", body, as_json, 400) for body in _BAD_JSON),
            ("too many", many, as_json, 400),
            ("too large", large, as_json, 413),
            ("too large, in pieces", _pieces(large), as_json, 413),
            ("no JSON", b"a=1", {}, 415),
            ("another key", many, as_json | {"authorization": "Bearer no"}, 401),
            ("another host", many, as_json | {"host": "evil.example"}, 421),
            ("another origin", many, as_json | {"origin": "https://evil.example"}, 403),
        ]
        async with self.client() as client:
            for kind, content, headers, status in self.chance.sample(kinds, 3):
                place = "/v1/embeddings" if kind == "too many" else path
                answer = await client.post(place, content=content, headers=headers)
                self.findings.expect(kind, answer.status_code, status)


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 50_000):
        yield body[start : start + 50_000]


def _faults(chance: random.Random) -> Iterator[Fault | None]:
    """Half of the answers in order, half broken in one of many ways."""
    faults: list[Fault] = [cut, truncated, overstated, answering(500), answering(503), answering(429, Retry_After="1")]
    while True:
        yield chance.choice(faults) if chance.random() < 0.5 else None


async def soak(folder: Path, *, rounds: int, seconds: float, kills: int, seed: int = 0) -> Findings:
    """Hold a server under fire.

    Args:
        folder: for the server's log and cache.
        rounds: of fire on the last server, with a silence after each.
        seconds: of each round.
        kills: how many servers before it are killed, each in the middle of a round, and their models before them.
        seed: of what the callers do.
    """
    chance = random.Random(seed)
    findings = Findings()
    async with stand_in(models={UPSTREAM.id: UPSTREAM}, faults=_faults(chance)) as standing:
        server = Server(folder, standing.url)
        await server.start(cached=True)
        fire = Fire(server, findings, await _truth(server), standing, chance)
        async with anyio.create_task_group() as callers:
            for _ in range(3):
                callers.start_soon(fire.caller, fire.rest)
                callers.start_soon(fire.caller, fire.mcp, fire.cancelled_tool)
            callers.start_soon(fire.caller, fire.upstream)
            callers.start_soon(fire.caller, fire.cancelled, fire.broken_off)
            callers.start_soon(fire.caller, fire.bad)
            for kill in range(kills):
                fire.calm = False
                await anyio.sleep(seconds / 2)
                server.end_model()
                await anyio.sleep(seconds / 2)
                server.url = ""
                server.end(signal.SIGKILL)
                findings.kills += 1
                fire.calm = True
                await server.start(cached=(kills - kill) % 2 == 0)  # the last one has to compute
            for _ in range(rounds):
                fire.calm = False
                await anyio.sleep(seconds)
                fire.calm = True
                with anyio.fail_after(2 * PATIENCE):
                    while fire.active:  # noqa: ASYNC110 - the callers are many, and this is no hurry
                        await anyio.sleep(0.05)
                await anyio.sleep(1)  # what was given up ends behind the callers' backs
                findings.resources.append(server.resources())
            callers.cancel_scope.cancel()
        code = server.end(signal.SIGTERM)
        findings.expect("SIGTERM", code, 0, -signal.SIGTERM)
    log = server.log.read_text()
    if "Traceback" in log or "never retrieved" in log:
        findings.wrong.append(f"the log has a traceback: {log[-3000:]}")
    return findings


async def _truth(server: Server) -> dict[str, np.ndarray[Any, Any]]:
    """The vector of every text, made one text at a time."""
    truth = {}
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {KEY}"}, timeout=PATIENCE) as client:
        for text in TEXTS:
            answer = await client.post(f"{server.url}/v1/embeddings", json={"model": LOCAL, "input": text})
            truth[text] = np.array(answer.raise_for_status().json()["data"][0]["embedding"])
    return truth


def report(findings: Findings, began: float) -> str:
    """The figures, for people."""
    held, requests = findings.resources, sum(findings.answered.values())
    lines = [
        f"{time.monotonic() - began:.0f} s, {requests:,} requests, {findings.kills} kills, {findings.lost} lost",
        f"{findings.vectors:,} vectors compared, largest difference {findings.largest_error:.1e}",
        *(f"silent again: {memory:.0f} MiB, {files} files, {threads} threads" for memory, files, threads in held),
        *(f"  {count:>7,}  {outcome}" for outcome, count in sorted(findings.answered.items())),
        f"{len(findings.wrong)} wrong",
        *(f"  {wrong}" for wrong in findings.wrong[:20]),
    ]
    return "\n".join(lines)


def leaks(findings: Findings, *, settled: bool) -> list[str]:
    """What the server holds more of at the end than in the first half of its rounds, beyond what comes and goes.

    Args:
        findings: what has happened.
        settled: whether the rounds were long enough for the memory to have its final size.
    """
    held = findings.resources
    before = [max(values) for values in zip(*held[: (len(held) + 1) // 2], strict=True)]
    allowed = (0.1 * before[0] if settled else float("inf"), 4, 4)
    return [
        f"{name}: {most:.0f}, then {last:.0f}"
        for name, most, last, more in zip(("MiB", "files", "threads"), before, held[-1], allowed, strict=True)
        if last > most + more
    ]

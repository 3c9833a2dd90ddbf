"""A stand-in for a NIM endpoint: a real HTTP server on loopback that responds like NIM, with configurable faults.

HTTP is implemented by hand, since a proper server would refuse to cut a body off or to send a wrong Content-Length.
Vectors are derived from a text's hash (see `tests.support.HashEmbedder`), so that a swapped row is noticed.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import anyio

from embeddings_mcp.models import InputType, ModelCard
from tests.support import HashEmbedder

ASYMMETRIC = ModelCard(
    id="test/asymmetric",
    dimensions=8,
    max_tokens=64,
    input_type="required",
    query_prompt="query: ",
    passage_prompt="passage: ",
)
SYMMETRIC = ModelCard(id="test/symmetric", dimensions=8, max_tokens=64)


@dataclass(frozen=True)
class Seen:
    """A request that the stand-in received.

    Attributes:
        at: `time.monotonic` at its arrival.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    at: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Reply:
    """A response, correct or faulty.

    Attributes:
        headers: sent in UTF-8; ``surrogateescape`` stands for bytes that are not UTF-8.
        length: value of Content-Length; the true length if None.
        cut_after: close the connection after this many bytes of the body.
        held_by: send nothing before this event.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    length: int | None = None
    cut_after: int | None = None
    held_by: anyio.Event | None = None


Fault = Callable[[Reply], Reply]
"""Turns the correct response into the one that is sent."""


def answering(status: int, body: object = b"", **headers: str) -> Fault:
    """Send another response instead; bytes are sent as they are, anything else as JSON."""
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _: Reply(status, encoded, named)


def changing(change: Callable[[dict[str, Any]], object]) -> Fault:
    """Change the JSON of the response in place."""

    def fault(reply: Reply) -> Reply:
        payload = json.loads(reply.body)
        change(payload)
        return replace(reply, body=json.dumps(payload).encode())

    return fault


def zipped(reply: Reply) -> Reply:
    """Compress the body."""
    return replace(reply, body=gzip.compress(reply.body), headers={**reply.headers, "Content-Encoding": "gzip"})


def cut(reply: Reply) -> Reply:
    """Close the connection after half of the body."""
    return replace(reply, cut_after=len(reply.body) // 2)


def truncated(reply: Reply) -> Reply:
    """Send half of the JSON, with a correct Content-Length."""
    return replace(reply, body=reply.body[: len(reply.body) // 2])


def overstated(reply: Reply) -> Reply:
    """Send a Content-Length larger than the body."""
    return replace(reply, length=len(reply.body) + 10)


def understated(reply: Reply) -> Reply:
    """Send a Content-Length smaller than the body."""
    return replace(reply, length=len(reply.body) - 10)


def held(event: anyio.Event) -> Fault:
    """Delay the response until the event is set."""
    return lambda reply: replace(reply, held_by=event)


@dataclass
class StandIn:
    """The server.

    Attributes:
        models: the models it serves, by name.
        base64: whether it supports ``encoding_format``; some servers always send numbers.
        prompts: whether it prepends a model's prompts to the texts, as NIM does and plain OpenAI servers do not.
        served_as: the model id in its responses; the requested one if None.
        faults: the fault of each embedding request in turn; None for a correct response.
        route_faults: permanent faults of other routes, by path.
        seen: all requests received so far.
        max_in_flight: largest number of requests in flight at the same time.
        client_disconnected: set when a client has closed its connection before the response.
    """

    models: Mapping[str, ModelCard] = field(default_factory=lambda: {c.id: c for c in (ASYMMETRIC, SYMMETRIC)})
    base64: bool = True
    prompts: bool = True
    served_as: str | None = None
    faults: Iterator[Fault | None] = field(default_factory=lambda: itertools.repeat(None))
    route_faults: Mapping[str, Fault] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    max_in_flight: int = 0
    client_disconnected: anyio.Event = field(default_factory=anyio.Event)
    url: str = ""
    _at_once: int = 0
    _arrival: anyio.Event = field(default_factory=anyio.Event)
    _pending: dict[str, Reply] = field(default_factory=dict)
    _connections: dict[asyncio.Task[Any], asyncio.StreamWriter] = field(default_factory=dict)

    async def received(self, requests: int) -> None:
        """Return when this many requests have arrived in total."""
        while len(self.seen) < requests:
            self._arrival = anyio.Event()
            await self._arrival.wait()

    def vector(self, text: str, model: str, input_type: InputType | None = None) -> Any:
        """Return the model's vector for this text."""
        return HashEmbedder(self.models[model]).vector(text, input_type)

    def accepting(self, polls: int) -> Fault:
        """Respond with 202 Accepted, and with the real response at the nth poll."""

        def fault(reply: Reply) -> Reply:
            for poll in range(polls):
                self._pending[f"ticket-{poll + 1}"] = (
                    reply if poll == polls - 1 else Reply(202, headers={"NVCF-REQID": f"ticket-{poll + 2}"})
                )
            return Reply(202, headers={"NVCF-REQID": "ticket-1"})

        return fault

    # --- Responses ---------------------------------------------------------------------------------------------------

    def _reply_to(self, seen: Seen) -> Reply:
        fault = next(self.faults, None) if seen.path == "/v1/embeddings" else self.route_faults.get(seen.path)
        reply = self._correct_reply(seen)
        return reply if fault is None else fault(reply)

    def _correct_reply(self, seen: Seen) -> Reply:
        match seen.method, seen.path:
            case "POST", "/v1/embeddings":
                return self._embed(seen.json)
            case "GET", "/v1/models":
                return _json({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})
            case "GET", "/v1/health/ready":
                return _json({"object": "health.response", "message": "ready", "ready": True})
            case "GET", path if path.startswith("/status/"):
                return self._pending[path.removeprefix("/status/")]
        return Reply(404, b"404 page not found", {"Content-Type": "text/plain"})

    def _embed(self, body: dict[str, Any]) -> Reply:
        card = self.models.get(body["model"])
        if card is None:
            return Reply(404, b"404 page not found", {"Content-Type": "text/plain"})
        if unknown := set(body) - {"model", "input", "input_type", "encoding_format", "truncate", "user"}:
            return _json({"detail": f"Extra inputs are not permitted: {unknown}"}, 400)
        if any(value is None for value in body.values()):
            return _json({"detail": "Input should be 'float' or 'base64'"}, 422)
        input_type = body.get("input_type")
        if self.prompts and card.input_type == "required" and input_type is None:
            return _json({"error": "'input_type' parameter is required for asymmetric models"}, 400)
        lengths = [len(text.split()) for text in body["input"]]
        if card.max_tokens and max(lengths) > card.max_tokens and body.get("truncate", "NONE") == "NONE":
            message = f"Input length {max(lengths)} exceeds maximum allowed token size {card.max_tokens}"
            return _json({"error": message}, 400)
        vectors = [HashEmbedder(card).vector(text, input_type if self.prompts else None) for text in body["input"]]
        as_base64 = self.base64 and body.get("encoding_format") == "base64"
        return _json(
            {
                "object": "list",
                "data": [
                    {
                        "object": "embedding",
                        "index": index,
                        "embedding": base64.b64encode(vector.tobytes()).decode() if as_base64 else vector.tolist(),
                    }
                    for index, vector in enumerate(vectors)
                ],
                "model": self.served_as or body["model"],
                "usage": {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)},
            }
        )

    # --- HTTP --------------------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = writer
        try:
            while (seen := await _read_request(reader)) is not None:
                self.seen.append(seen)
                self._arrival.set()
                self._at_once += 1
                self.max_in_flight = max(self.max_in_flight, self._at_once)
                try:
                    keep_alive = await self._send(self._reply_to(seen), reader, writer)
                finally:
                    self._at_once -= 1
                if not keep_alive:
                    return
        except ConnectionError:
            self.client_disconnected.set()
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            del self._connections[task]

    async def hang_up(self) -> None:
        """Close all connections, which ends the tasks that read from them."""
        for writer in self._connections.values():
            writer.close()
        await asyncio.gather(*self._connections)

    async def _send(self, reply: Reply, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Send a reply; return whether the connection can be reused."""
        if reply.held_by is not None:
            released = asyncio.ensure_future(reply.held_by.wait())
            closed = asyncio.ensure_future(reader.read(1))  # completes only when the client closes the connection
            try:
                await asyncio.wait({released, closed}, return_when=asyncio.FIRST_COMPLETED)
                if closed.done():
                    self.client_disconnected.set()
                    return False
            finally:
                for task in (released, closed):
                    task.cancel()
                await asyncio.gather(released, closed, return_exceptions=True)
        length = len(reply.body) if reply.length is None else reply.length
        head = [f"HTTP/1.1 {reply.status} ", f"Content-Length: {length}"]
        head += [f"{name}: {value}" for name, value in reply.headers.items()]
        writer.write("\r\n".join([*head, "", ""]).encode(errors="surrogateescape") + reply.body[: reply.cut_after])
        await writer.drain()
        return reply.cut_after is None and length == len(reply.body)


@asynccontextmanager
async def stand_in(**attributes: Any) -> AsyncIterator[StandIn]:
    """Run a stand-in for the duration of the block."""
    nim = StandIn(**attributes)
    server = await asyncio.start_server(nim._serve, "127.0.0.1", 0)
    nim.url = "http://{}:{}".format(*server.sockets[0].getsockname())
    try:
        yield nim
    finally:
        # A connection accepted while the server closes would never be closed (CPython 3.11).
        for _ in range(3):
            await asyncio.sleep(0)
        await anyio.wait_all_tasks_blocked()
        server.close()
        await nim.hang_up()


async def _read_request(reader: asyncio.StreamReader) -> Seen | None:
    """Read the next request of a connection; None if the client has closed it."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        request_line, *lines = head.strip().split("\r\n")
        method, path, _ = request_line.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
    except asyncio.IncompleteReadError:  # the request may be incomplete too
        return None
    return Seen(method, path, headers, body, time.monotonic())


def _json(payload: object, status: int = 200) -> Reply:
    return Reply(status, json.dumps(payload).encode())

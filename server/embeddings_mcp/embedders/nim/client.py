"""The way to an endpoint: one HTTP client, one throttle and one manner of trying again, shared by all its models."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import anyio
import httpx
import stamina

from embeddings_mcp import __version__, telemetry
from embeddings_mcp.caller import caller_key
from embeddings_mcp.embedders.nim.endpoint import Endpoint
from embeddings_mcp.embedders.nim.failures import Asked, Failure, understand, understand_silence, unusable
from embeddings_mcp.embedders.nim.throttle import Throttle
from embeddings_mcp.embedders.nim.wire import AnswerInvalid
from embeddings_mcp.errors import ServerStopped

logger = logging.getLogger(__name__)

LONGEST_PAUSE = 30.0
"""Seconds. An endpoint that asks for a longer pause (a model that is offline asks for 10,800) is not asked again."""

MOST_CALLERS = 1000
"""Callers with keys of their own whose recent requests are counted; the one not heard of for longest is forgotten."""

MAX_ANSWER_BYTES = 256 * 1024 * 1024
"""Longest answer, unpacked: ten times that of a thousand texts in 2,048 dimensions. A few bytes can unpack to more."""

_CODINGS = ("gzip", "deflate")
"""How an answer may be packed: the 64 KiB that are read at a time unpack to 64 MiB at most, before they are counted.

httpx asks for more where it finds their packages (zstd, br), in which a piece can be of any length, as it can in two
codings one within the other.
"""

_MOST_CONNECTIONS = 100  # of all callers together, where they bring keys; else as many as the endpoint takes requests
_CONNECT_TIMEOUT = 10.0
_POLL_PAUSES = (0.1, 0.5, 2.0, 5.0)  # the last one again and again; the deadline ends it

_TICKET = re.compile(r"[\w-]{1,100}", re.ASCII)
"""What an answer is fetched by that was not ready: an id, which becomes a part of an address."""

_Read = TypeVar("_Read")

# How often is decided by each failure, how long in all by the caller's cancel scope.
_call = stamina.AsyncRetryingCaller(attempts=None, timeout=None, wait_initial=0.5, wait_max=LONGEST_PAUSE)


@dataclass(frozen=True, slots=True)
class Account:
    """In whose name requests go out.

    Attributes:
        endpoint: with that account's key.
        throttle: what all of its requests pass, for an endpoint's limits are those of a key.
        caller: tells callers with keys of their own apart, without holding a key; empty for this server's account.
    """

    endpoint: Endpoint
    throttle: Throttle
    caller: str = ""

    @property
    def lacks_key(self) -> bool:
        """Whether the key is one that callers bring, and none has."""
        return self.endpoint.caller_keys and self.endpoint.api_key is None


class EndpointClient:
    """Sends requests to one endpoint, within its limits, and again where that can help.

    Args:
        endpoint: where to, with which key.
        throttle: what all requests with that key pass; made from the endpoint's limits where it is not given.
    """

    def __init__(self, endpoint: Endpoint, *, throttle: Throttle | None = None) -> None:
        self.endpoint = endpoint
        self._own = Account(endpoint, throttle or _throttle(endpoint))
        self._throttles: OrderedDict[str, Throttle] = OrderedDict()  # of callers, by the digests of their keys
        self._http: httpx.AsyncClient | None = None
        self._in_flight: set[anyio.CancelScope] = set()
        self._closed = False

    @property
    def account(self) -> Account:
        """The caller's own, where he has brought a key and the endpoint takes those of callers; else this server's."""
        key = caller_key()
        if key is None or not self.endpoint.caller_keys:
            return self._own
        caller = hashlib.sha256(key.get_secret_value().encode()).hexdigest()
        throttle = self._throttles.setdefault(caller, _throttle(self.endpoint))
        self._throttles.move_to_end(caller)
        if len(self._throttles) > MOST_CALLERS:
            self._throttles.popitem(last=False)
        return Account(self.endpoint.with_key_of_caller(key), throttle, caller)

    async def fetch(
        self,
        path: str,
        read: Callable[[httpx.Response], _Read],
        *,
        body: bytes | None = None,
        asked: Asked | None = None,
        once: bool = False,
    ) -> _Read:
        """Send a request and read its answer.

        Args:
            path: after the endpoint's address.
            read: takes an answer with status 200, and raises `AnswerInvalid` when it cannot be used.
            body: JSON, which is posted; without one, the path is read.
            asked: what the body asks for, where it asks for embeddings; only then is it done in the caller's name.
            once: do not try again.

        Raises:
            Failure: the last attempt's.
            Overloaded: the endpoint's limits leave no room before the caller's deadline.
            ServerStopped: the client was closed.
        """
        account = self._own if asked is None else self.account
        made = 0

        def again(error: Exception) -> bool | float:
            nonlocal made
            made += 1
            if not isinstance(error, Failure) or once or made >= error.attempts:
                return False
            if error.pause is not None:
                left = anyio.current_effective_deadline() - anyio.current_time()
                if error.pause > min(LONGEST_PAUSE, left):
                    return False
                account.throttle.close_for(error.pause)
            telemetry.UPSTREAM_RETRIES.inc()
            logger.warning("attempt %d failed, another follows: %s", made, error)
            return True if error.pause is None else error.pause

        with anyio.CancelScope() as scope:
            self._in_flight.add(scope)
            try:
                return await _call(again, self._attempt, account, path, read, body=body, asked=asked)
            finally:
                self._in_flight.discard(scope)
        raise ServerStopped

    async def check(self) -> None:
        """Return once the endpoint says on its own route that it is ready; on the hosted API, which has none, at once.

        The status is what counts: the words differ from release to release.

        Raises:
            EmbeddingsError: it is not, or cannot be reached.
        """
        if self.endpoint.ready_path is None:
            return
        try:
            await self.fetch(self.endpoint.ready_path, lambda _: None, once=True)
        except Failure as error:
            failure = error
        else:
            return
        raise failure.error

    async def aclose(self) -> None:
        """Give up what is in flight and close the connections; what comes later is refused."""
        self._closed = True
        for scope in self._in_flight:
            scope.cancel()
        if self._http is not None:
            await self._http.aclose()

    async def _attempt(
        self,
        account: Account,
        path: str,
        read: Callable[[httpx.Response], _Read],
        *,
        body: bytes | None,
        asked: Asked | None,
    ) -> _Read:
        """One attempt. What fails is raised outside of every ``except``, lest the request and its key hang on to it."""
        endpoint = account.endpoint
        async with account.throttle.turn():
            try:
                response = await self._send(path, body, endpoint.headers)
                if response.status_code == httpx.codes.OK:
                    return read(response)
                failure = understand(response, endpoint=endpoint, asked=asked)
            except httpx.RequestError as error:
                failure = understand_silence(error, endpoint=endpoint)
            except AnswerInvalid as error:
                failure = unusable(str(error), endpoint=endpoint, damaged=error.damaged)
        raise failure

    async def _send(self, path: str, body: bytes | None, headers: dict[str, str]) -> httpx.Response:
        """Send, and where the hosted API says "accepted", fetch the answer when it is ready."""
        http = self._client()
        content_type = {} if body is None else {"Content-Type": "application/json"}
        response = await _ask(http, self.endpoint.url + path, {**headers, **content_type}, body)
        polls = 0
        while response.status_code == httpx.codes.ACCEPTED and self.endpoint.status_url is not None:
            ticket = response.headers.get("NVCF-REQID", "")
            if not _TICKET.fullmatch(ticket):
                break
            await anyio.sleep(_POLL_PAUSES[min(polls, len(_POLL_PAUSES) - 1)])
            polls += 1
            response = await _ask(http, f"{self.endpoint.status_url}/{ticket}", headers)
        return response

    def _client(self) -> httpx.AsyncClient:
        """Made at the first request: loading the certificates takes a while."""
        if self._closed:
            raise ServerStopped
        if self._http is None:
            connections = _MOST_CONNECTIONS if self.endpoint.caller_keys else self.endpoint.concurrency
            self._http = httpx.AsyncClient(
                timeout=httpx.Timeout(self.endpoint.timeout, connect=_CONNECT_TIMEOUT, pool=None),
                limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
                follow_redirects=False,  # a redirect could carry the key to another host
                trust_env=not self.endpoint.loopback,  # a proxy for the outside world has no way to this machine
                headers={
                    "User-Agent": f"embeddings-mcp/{__version__}",
                    "Accept": "application/json",
                    "Accept-Encoding": ", ".join(_CODINGS),
                },
            )
        return self._http


async def _ask(http: httpx.AsyncClient, url: str, headers: dict[str, str], body: bytes | None = None) -> httpx.Response:
    """The whole answer, as long as it is not longer than any can be.

    Raises:
        AnswerInvalid: it is, or it is packed in a way that was not asked for.
        httpx.RequestError: there is none.
    """
    method = "GET" if body is None else "POST"
    async with http.stream(method, url, content=body, headers=headers) as answer:
        if (answer.headers.get("Content-Encoding") or "identity").lower() not in {"identity", *_CODINGS}:
            raise AnswerInvalid(f"its Content-Encoding is none of those that were asked for ({', '.join(_CODINGS)})")
        content = bytearray()
        async for piece in answer.aiter_bytes():
            content += piece
            if len(content) > MAX_ANSWER_BYTES:
                raise AnswerInvalid(f"it is longer than {MAX_ANSWER_BYTES:,} bytes")
        # As bytes, for what is not ASCII can be read and not written.
        unpacked = [(name, value) for name, value in answer.headers.raw if name.lower() not in _OF_TRANSFER]
        return httpx.Response(answer.status_code, headers=unpacked, content=bytes(content), request=answer.request)


_OF_TRANSFER = frozenset({b"content-encoding", b"content-length", b"transfer-encoding"})


def _throttle(endpoint: Endpoint) -> Throttle:
    return Throttle(f"the endpoint {endpoint.url}", concurrency=endpoint.concurrency, requests=endpoint.rate)

"""The HTTP client of an endpoint: connection pool, throttle and retries, shared by all of its models."""

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

from embeddings_mcp import __version__, content_encoding, telemetry
from embeddings_mcp.caller import caller_key
from embeddings_mcp.embedders.nim.endpoint import Endpoint
from embeddings_mcp.embedders.nim.failures import (
    Failure,
    RequestContext,
    failure_from_invalid_response,
    failure_from_response,
    failure_from_transport_error,
)
from embeddings_mcp.embedders.nim.throttle import Throttle
from embeddings_mcp.embedders.nim.wire import InvalidResponse
from embeddings_mcp.errors import ServerStopped

logger = logging.getLogger(__name__)

MAX_RETRY_PAUSE_SECONDS = 30.0
"""There is no retry if the endpoint asks for a longer pause (for an offline model it asks for 10,800)."""

MAX_CALLER_THROTTLES = 1000
"""Throttles kept for callers with keys of their own; the least recently used one is evicted."""

MAX_RESPONSE_BYTES = 256 * 1024 * 1024
"""Longest decompressed response body: ten times that of a thousand texts in 2,048 dimensions.

Without a limit, a few compressed bytes could fill the memory.
"""

_TRANSFER_HEADERS = frozenset({b"content-encoding", b"content-length", b"transfer-encoding"})
"""Headers that describe the body as it was sent, not as it is once it has been read and decompressed."""

_MAX_CONNECTIONS = 100  # of all callers together, if they bring keys; otherwise the endpoint's concurrency
_CONNECT_TIMEOUT_SECONDS = 10.0
_POLL_INTERVAL_SECONDS = (0.1, 0.5, 2.0, 5.0)  # the last one repeats until the deadline

_REQUEST_ID = re.compile(r"[\w-]{1,100}", re.ASCII)
"""Valid id of a pending response; the id becomes part of a URL."""

_Result = TypeVar("_Result")

# Each failure limits its own attempts; the caller's cancel scope limits the total time.
_retrying = stamina.AsyncRetryingCaller(attempts=None, timeout=None, wait_initial=0.5, wait_max=MAX_RETRY_PAUSE_SECONDS)


@dataclass(frozen=True, slots=True)
class Account:
    """The account that requests are made with.

    Attributes:
        endpoint: the endpoint with that account's key.
        throttle: shared by all of the account's requests, since endpoints limit requests per key.
        caller: a digest that identifies a caller with a key of its own; empty for this server's account.
    """

    endpoint: Endpoint
    throttle: Throttle
    caller: str = ""

    @property
    def lacks_key(self) -> bool:
        """Whether the endpoint expects keys from callers and this request has none."""
        return self.endpoint.caller_keys and self.endpoint.api_key is None


class EndpointClient:
    """Sends requests to one endpoint within its rate limits, and retries failures that may be transient.

    Args:
        endpoint: the endpoint and its key.
        throttle: for requests with that key; made from the endpoint's limits if not given.
    """

    def __init__(self, endpoint: Endpoint, *, throttle: Throttle | None = None) -> None:
        self.endpoint = endpoint
        self._server_account = Account(endpoint, throttle or _throttle_for(endpoint))
        self._caller_throttles: OrderedDict[str, Throttle] = OrderedDict()  # by the digest of the caller's key
        self._http: httpx.AsyncClient | None = None
        self._in_flight: set[anyio.CancelScope] = set()
        self._closed = False

    @property
    def account(self) -> Account:
        """The caller's own account if it sent a key and the endpoint accepts callers' keys; otherwise this server's."""
        key = caller_key()
        if key is None or not self.endpoint.caller_keys:
            return self._server_account
        caller = hashlib.sha256(key.get_secret_value().encode()).hexdigest()
        throttle = self._caller_throttles.setdefault(caller, _throttle_for(self.endpoint))
        self._caller_throttles.move_to_end(caller)
        if len(self._caller_throttles) > MAX_CALLER_THROTTLES:
            self._caller_throttles.popitem(last=False)
        return Account(self.endpoint.with_caller_key(key), throttle, caller)

    async def fetch(
        self,
        path: str,
        parse: Callable[[httpx.Response], _Result],
        *,
        body: bytes | None = None,
        context: RequestContext | None = None,
        retry: bool = True,
    ) -> _Result:
        """Send a request and return its parsed response.

        Args:
            path: relative to the endpoint's URL.
            parse: parses a response with status 200; raises `InvalidResponse` if it cannot be used.
            body: JSON to POST; a GET request if None.
            context: describes a request for embeddings; only such a request is made with the caller's account.
            retry: whether to retry transient failures.

        Raises:
            Failure: of the last attempt.
            Overloaded: the endpoint's limits do not allow the request before the caller's deadline.
            ServerStopped: the client was closed.
        """
        account = self._server_account if context is None else self.account
        attempts = 0

        def should_retry(error: Exception) -> bool | float:
            nonlocal attempts
            attempts += 1
            if not isinstance(error, Failure) or not retry or attempts >= error.attempts:
                return False
            if error.pause is not None:
                left = anyio.current_effective_deadline() - anyio.current_time()
                if error.pause > min(MAX_RETRY_PAUSE_SECONDS, left):
                    return False
                account.throttle.pause_for(error.pause)
            telemetry.UPSTREAM_RETRIES.inc()
            logger.warning("attempt %d failed, retrying: %s", attempts, error)
            return True if error.pause is None else error.pause

        with anyio.CancelScope() as scope:
            self._in_flight.add(scope)
            try:
                return await _retrying(should_retry, self._attempt, account, path, parse, body=body, context=context)
            finally:
                self._in_flight.discard(scope)
        raise ServerStopped

    async def check(self) -> None:
        """Return once the endpoint's readiness route reports that it is ready; at once if it has none (hosted API).

        Only the status counts: the body differs between releases.

        Raises:
            EmbeddingsError: the endpoint is not ready, or cannot be reached.
        """
        if self.endpoint.ready_path is None:
            return
        try:
            await self.fetch(self.endpoint.ready_path, lambda _: None, retry=False)
        except Failure as error:
            failure = error
        else:
            return
        raise failure.error

    async def aclose(self) -> None:
        """Cancel requests in flight and close the connections; later requests are refused."""
        self._closed = True
        for scope in self._in_flight:
            scope.cancel()
        if self._http is not None:
            await self._http.aclose()

    async def _attempt(
        self,
        account: Account,
        path: str,
        parse: Callable[[httpx.Response], _Result],
        *,
        body: bytes | None,
        context: RequestContext | None,
    ) -> _Result:
        """Make one attempt.

        Failures are raised outside of every ``except``, so that their context does not hold the request and its key.
        """
        endpoint = account.endpoint
        async with account.throttle.acquire():
            try:
                response = await self._send(path, body, endpoint.headers)
                if response.status_code == httpx.codes.OK:
                    return parse(response)
                failure = failure_from_response(response, endpoint=endpoint, context=context)
            except httpx.RequestError as error:
                failure = failure_from_transport_error(error, endpoint=endpoint)
            except InvalidResponse as error:
                failure = failure_from_invalid_response(error, endpoint=endpoint)
        raise failure

    async def _send(self, path: str, body: bytes | None, headers: dict[str, str]) -> httpx.Response:
        """Send a request; if the hosted API responds with 202 Accepted, poll until the response is ready."""
        http = self._client()
        content_type = {} if body is None else {"Content-Type": "application/json"}
        response = await _request(http, self.endpoint.url + path, {**headers, **content_type}, body)
        polls = 0
        while response.status_code == httpx.codes.ACCEPTED and self.endpoint.status_url is not None:
            request_id = response.headers.get("NVCF-REQID", "")
            if not _REQUEST_ID.fullmatch(request_id):
                break
            await anyio.sleep(_POLL_INTERVAL_SECONDS[min(polls, len(_POLL_INTERVAL_SECONDS) - 1)])
            polls += 1
            response = await _request(http, f"{self.endpoint.status_url}/{request_id}", headers)
        return response

    def _client(self) -> httpx.AsyncClient:
        """Return the HTTP client, created at the first request since loading the certificates takes a while."""
        if self._closed:
            raise ServerStopped
        if self._http is None:
            connections = _MAX_CONNECTIONS if self.endpoint.caller_keys else self.endpoint.concurrency
            self._http = httpx.AsyncClient(
                timeout=httpx.Timeout(self.endpoint.timeout, connect=_CONNECT_TIMEOUT_SECONDS, pool=None),
                limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
                follow_redirects=False,  # a redirect could send the key to another host
                trust_env=not self.endpoint.loopback,  # a proxy for the internet cannot reach this machine's loopback
                headers={
                    "User-Agent": f"embeddings-mcp/{__version__}",
                    "Accept": "application/json",
                    "Accept-Encoding": content_encoding.ACCEPT_ENCODING,
                },
            )
        return self._http


async def _request(
    http: httpx.AsyncClient, url: str, headers: dict[str, str], body: bytes | None = None
) -> httpx.Response:
    """Send one HTTP request and read the whole response, up to `MAX_RESPONSE_BYTES`.

    Raises:
        InvalidResponse: the body is longer, or compressed in a way that was not accepted.
        httpx.RequestError: there is no complete response.
    """
    method = "GET" if body is None else "POST"
    async with http.stream(method, url, content=body, headers=headers) as response:
        if not content_encoding.is_accepted(response.headers):
            raise InvalidResponse(
                f"its Content-Encoding is none of those that were asked for ({content_encoding.ACCEPT_ENCODING})"
            )
        content = bytearray()
        async for chunk in response.aiter_bytes():
            content += chunk
            if len(content) > MAX_RESPONSE_BYTES:
                raise InvalidResponse(f"it is longer than {MAX_RESPONSE_BYTES:,} bytes")
        # Raw bytes, since httpx can decode header values that are not ASCII but not encode them again.
        kept_headers = [(name, value) for name, value in response.headers.raw if name.lower() not in _TRANSFER_HEADERS]
        return httpx.Response(
            response.status_code, headers=kept_headers, content=bytes(content), request=response.request
        )


def _throttle_for(endpoint: Endpoint) -> Throttle:
    return Throttle(f"the endpoint {endpoint.url}", concurrency=endpoint.concurrency, max_requests=endpoint.rate)

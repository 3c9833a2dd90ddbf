"""Mapping of failed requests to errors and retry policies, in two tables by status code and error message.

NVIDIA calls the wording of its errors unstable, so the status code decides first, and the message only where one status
has several meanings. An endpoint's error message is quoted in one short line, with keys masked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx
import orjson

from embeddings_mcp.caller import CALLER_KEY_HEADER
from embeddings_mcp.embedders.nim.endpoint import HOSTED_DEFAULT_MODEL, KEYS_URL, Endpoint
from embeddings_mcp.embedders.nim.wire import InvalidResponse
from embeddings_mcp.errors import (
    AuthenticationFailed,
    EmbeddingsError,
    InputTooLong,
    InvalidRequest,
    ModelRetired,
    Overloaded,
    PayloadTooLarge,
    UnknownModel,
    UpstreamFailed,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from embeddings_mcp.models import ModelCard

# Attempts in total. The backoff between them is 0.5, 1, 2 ... 30 s, plus jitter.
_CONNECT_ATTEMPTS = 3  # nothing listens at the URL: if it is mistyped, the user should learn it soon
_TRANSIENT_ATTEMPTS = 6  # a failure of the endpoint or the network
_RATE_LIMIT_ATTEMPTS = 8  # the pauses add up to just over a minute, the usual window of a rate limit

_RATE_WINDOW_SECONDS = 60.0
_MAX_RETRY_AFTER_SECONDS = 86_400.0  # beyond a day, no endpoint can predict its availability
_MAX_QUOTE_CHARS = 300


class Failure(Exception):
    """A failed attempt. Internal to this package: callers get its `error`.

    Attributes:
        error: raised to the caller if there is no further attempt.
        attempts: maximum number of attempts in total; 1 if a retry cannot help.
        pause: seconds to wait before the next attempt, as requested by the endpoint; None if it requests none.
        splittable: the same texts may be accepted in smaller requests.
    """

    def __init__(
        self, error: EmbeddingsError, *, attempts: int = 1, pause: float | None = None, splittable: bool = False
    ) -> None:
        super().__init__(error.message)
        self.error = error
        self.attempts = attempts
        self.pause = pause
        self.splittable = splittable


@dataclass(frozen=True, slots=True)
class RequestContext:
    """The model and texts of a request for embeddings.

    Attributes:
        model: the model's name at the endpoint.
        card: of the model.
        texts: in the request.
    """

    model: str
    card: ModelCard
    texts: Sequence[str]


@dataclass(frozen=True, slots=True)
class ErrorResponse:
    """A response other than 200, reduced to what the tables below need.

    Attributes:
        endpoint: that sent it.
        status: the status code.
        message: the endpoint's error message in one line, with keys masked; empty if there is none.
        retry_after: seconds to wait, as requested by the endpoint; None if it requests none.
        location: target of a redirect.
    """

    endpoint: Endpoint
    status: int
    message: str
    retry_after: float | None
    location: str | None

    @property
    def quote(self) -> str:
        """Status code and message."""
        return f"{self.status}: {self.message}" if self.message else str(self.status)

    @property
    def account(self) -> str:
        """The account of the request, described by what holds its key."""
        return f"the account of the key in {self.endpoint.key_name}"

    @property
    def sender(self) -> str:
        """The endpoint, as error messages name it."""
        return f"the endpoint {self.endpoint.url}"


def failure_from_response(response: httpx.Response, *, endpoint: Endpoint, context: RequestContext | None) -> Failure:
    """Map a response other than 200 to a failure; `context` is None if the request was not for embeddings."""
    message = error_message(response.content)
    error = ErrorResponse(
        endpoint=endpoint,
        status=response.status_code,
        message=endpoint.redact(message)[:_MAX_QUOTE_CHARS],
        # With 0, or a date that has passed by this machine's clock, all retries would be made, and fail, at once.
        retry_after=parse_retry_after(response.headers.get("Retry-After")) or None,
        location=response.headers.get("Location"),
    )
    if context is not None:
        # Matched before masking: a key of few letters, such as vLLM's users make up, may be part of any word.
        unmasked = message[:_MAX_QUOTE_CHARS]
        for statuses, pattern, request_failure in _REQUEST_FAILURES:
            if error.status in statuses and (match := re.search(pattern, unmasked, re.IGNORECASE)):
                return request_failure(error, context, match)
    for statuses, endpoint_failure in _ENDPOINT_FAILURES:
        if error.status in statuses:
            return endpoint_failure(error)
    return _unexpected(error)


def failure_from_transport_error(error: httpx.RequestError, *, endpoint: Endpoint) -> Failure:
    """Map a missing or incomplete response to a failure."""
    detail = endpoint.redact(str(error)) or type(error).__name__
    match error:
        case httpx.ConnectTimeout() | httpx.ConnectError() | httpx.ProxyError():
            question = "is this machine online" if endpoint.hosted else "is it running, is the URL right"
            message = f"cannot connect to the endpoint {endpoint.url} ({detail}): {question}, is a proxy in between?"
            return Failure(UpstreamUnavailable(message), attempts=_CONNECT_ATTEMPTS)
        case httpx.TimeoutException():
            message = f"the endpoint {endpoint.url} sent nothing for {endpoint.timeout:g} s"
            return Failure(UpstreamTimeout(message), attempts=_TRANSIENT_ATTEMPTS)
        case _:
            message = f"the connection to the endpoint {endpoint.url} broke before its response was complete ({detail})"
            return Failure(UpstreamFailed(message), attempts=_TRANSIENT_ATTEMPTS)


def failure_from_invalid_response(error: InvalidResponse, *, endpoint: Endpoint) -> Failure:
    """Map an invalid response with status 200 to a failure; a damaged one is worth a retry."""
    failed = UpstreamFailed(f"the response of the endpoint {endpoint.url} cannot be used: {error}")
    return Failure(failed, attempts=_TRANSIENT_ATTEMPTS if error.damaged else 1)


# --- Failures caused by the request ----------------------------------------------------------------------------------


def _too_long(_response: ErrorResponse, context: RequestContext, match: re.Match[str]) -> Failure:
    groups = match.groupdict()
    tokens, max_tokens, index = (_parse_int(groups.get(name)) for name in ("tokens", "max_tokens", "index"))
    if index is not None and index < len(context.texts):
        return Failure(InputTooLong(index=index, tokens=tokens, max_tokens=max_tokens))
    lengths = [len(text) for text in context.texts]
    return Failure(
        InputTooLong(index=lengths.index(max(lengths)), tokens=tokens, max_tokens=max_tokens, certain=len(lengths) == 1)
    )


def _too_large(response: ErrorResponse, context: RequestContext, _match: re.Match[str]) -> Failure:
    texts = "the text is" if len(context.texts) == 1 else f"{len(context.texts)} texts are"
    error = PayloadTooLarge(f"{texts} too much for one request to {response.sender} ({response.quote})", param="input")
    return Failure(error, splittable=True)


def _degraded(response: ErrorResponse, context: RequestContext, _match: re.Match[str]) -> Failure:
    error = UpstreamUnavailable(
        f"{response.sender} says that {context.model} is degraded at the moment; try again later"
    )
    return Failure(error, attempts=_TRANSIENT_ATTEMPTS)


def _input_type(response: ErrorResponse, context: RequestContext, _match: re.Match[str]) -> Failure:
    if response.endpoint.dialect == "openai":
        return Failure(
            UpstreamFailed(
                f"{response.sender} asks for `input_type`, which is sent only to a NIM or a server like it: set the "
                f"endpoint's `dialect` to 'nim' (it responded with {response.quote})"
            )
        )
    return Failure(
        InvalidRequest(
            f"`input_type` is not as {context.model} wants it: 'query' for what is searched with, 'passage' for what "
            f"is searched ({response.sender} responded with {response.quote})",
            param="input_type",
        )
    )


def _invalid(response: ErrorResponse, _context: RequestContext, _match: re.Match[str]) -> Failure:
    return Failure(InvalidRequest(f"{response.sender} does not accept the request ({response.quote})"))


def _not_entitled(response: ErrorResponse, context: RequestContext, _match: re.Match[str]) -> Failure:
    return Failure(
        UnknownModel(
            f"{response.account} may not use {context.model} at {response.endpoint.url}, which lists more models than "
            "an account can call (404): choose another model",
            param="model",
        )
    )


def _unknown_model(response: ErrorResponse, context: RequestContext, _match: re.Match[str]) -> Failure:
    return Failure(
        UnknownModel(
            f"{response.sender} serves no model {context.model} ({response.quote}): choose another one", param="model"
        )
    )


def _retired(response: ErrorResponse, context: RequestContext, match: re.Match[str]) -> Failure:
    card = context.card
    date = match.groupdict().get("date") or card.hosted_until
    when = f" on {date}" if date else ""
    replacement = "produces the same vectors on your own machine"
    if card.repository is not None:
        advice = f"`--model {card.id}` {replacement}"
    else:
        advice = (
            f"with its files in a folder, `--model {card.id}=FOLDER` {replacement}; without them, stored "
            f"vectors must be recomputed with another model, such as {HOSTED_DEFAULT_MODEL}"
        )
    return Failure(ModelRetired(f"{response.sender} switched {context.model} off{when} (410): {advice}", param="model"))


_INVALID = frozenset({400, 413, 422})
_ANY = ""

_REQUEST_FAILURES: tuple[
    tuple[Collection[int], str, Callable[[ErrorResponse, RequestContext, re.Match[str]], Failure]], ...
] = (
    # By status and message; the first match counts. The patterns match messages of NIM, this server's own REST API,
    # text-embeddings-inference, vLLM and Ollama.
    (_INVALID, r"Input length (?P<tokens>\d+) exceeds maximum allowed token size (?P<max_tokens>\d+)", _too_long),
    (_INVALID, r"exceeds maximum allowed token size", _too_long),
    (
        _INVALID,
        r"`input\[(?P<index>\d+)\]` has (?P<tokens>\d[\d,]*) tokens, .* takes (?P<max_tokens>\d[\d,]*)",
        _too_long,
    ),
    (_INVALID, r"must have less than (?P<max_tokens>\d+) tokens\. Given: (?P<tokens>\d+)", _too_long),
    (_INVALID, r"maximum context length is (?P<max_tokens>\d+) tokens(.*?(?P<tokens>\d+) (input )?tokens)?", _too_long),
    (_INVALID | {500}, r"input length exceeds the context length", _too_long),  # Ollama reports it as a server error
    # The hosted gateway limits the bytes, other servers the number of texts.
    (_INVALID, r"payload is below|batch size|less than \d+ elements", _too_large),
    ({413}, _ANY, _too_large),
    ({400}, r"DEGRADED", _degraded),
    (_INVALID, r"input_type", _input_type),
    (_INVALID, _ANY, _invalid),
    ({404}, r"not found for account", _not_entitled),
    ({404}, _ANY, _unknown_model),
    ({410}, r"end of life on (?P<date>\d{4}-\d\d-\d\d)", _retired),
    ({410}, _ANY, _retired),
)

# --- Failures of the endpoint, its authentication, or its URL --------------------------------------------------------


def _key_refused(response: ErrorResponse) -> Failure:
    endpoint = response.endpoint
    source = f"keys come from {KEYS_URL}" if endpoint.hosted else "ask its operator for one"
    if endpoint.caller_keys and (endpoint.for_caller or endpoint.api_key is None):
        # Only the caller can fix this.
        found = f"does not accept the key ({response.status})" if endpoint.for_caller else "asks for a key"
        return Failure(
            AuthenticationFailed(f"{response.sender} {found}: send yours in the header {CALLER_KEY_HEADER}; {source}")
        )
    if endpoint.api_key is None:
        message = f"{response.sender} asks for an API key, and none is set: set {endpoint.key_name}; {source}"
    else:
        message = (
            f"{response.sender} does not accept the API key in {endpoint.key_name} ({response.status}): it is "
            f"mistyped, revoked or not meant for this; {source}"
        )
    return Failure(UpstreamRefused(message))


def _no_credits(response: ErrorResponse) -> Failure:
    where = f"; see {KEYS_URL}" if response.endpoint.hosted else ""
    return Failure(UpstreamRefused(f"{response.account} has no credits left at {response.endpoint.url} (402){where}"))


def _no_route(response: ErrorResponse) -> Failure:
    return Failure(UpstreamFailed(f"{response.sender} has no such route (404): is its URL right?"))


def _rate_limited(response: ErrorResponse) -> Failure:
    retry_after = response.retry_after or _RATE_WINDOW_SECONDS
    error = Overloaded(
        f"{response.sender} takes no more requests for now ({response.quote}): try again in {retry_after:,.0f} s, with "
        "fewer texts at once",
        retry_after=retry_after,
    )
    return Failure(error, attempts=_RATE_LIMIT_ATTEMPTS, pause=response.retry_after)


def _timed_out(response: ErrorResponse) -> Failure:
    return Failure(UpstreamTimeout(f"{response.sender} timed out ({response.quote})"), attempts=_TRANSIENT_ATTEMPTS)


def _unavailable(response: ErrorResponse) -> Failure:
    retry_after = response.retry_after
    when = "later" if retry_after is None else f"in {retry_after:,.0f} s"
    error = UpstreamUnavailable(
        f"{response.sender} takes no work now ({response.quote}): try again {when}", retry_after=retry_after
    )
    return Failure(error, attempts=_TRANSIENT_ATTEMPTS, pause=retry_after)


def _broken(response: ErrorResponse) -> Failure:
    return Failure(UpstreamFailed(f"{response.sender} failed ({response.quote})"), attempts=_TRANSIENT_ATTEMPTS)


def _redirected(response: ErrorResponse) -> Failure:
    target = response.endpoint.redact(response.location or "nowhere")[:_MAX_QUOTE_CHARS]
    return Failure(
        UpstreamFailed(
            f"{response.sender} redirects to {target} ({response.status}), which is not followed, since "
            "the key would go with it: if that URL is the right one, set it as the endpoint's `url`"
        )
    )


def _unexpected(response: ErrorResponse) -> Failure:
    return Failure(UpstreamFailed(f"{response.sender} sent an unexpected response ({response.quote})"))


_ENDPOINT_FAILURES: tuple[tuple[Collection[int], Callable[[ErrorResponse], Failure]], ...] = (
    ({401, 403}, _key_refused),
    ({402}, _no_credits),
    ({404}, _no_route),
    ({408, 504}, _timed_out),
    ({429}, _rate_limited),
    ({503}, _unavailable),
    ({500, 502}, _broken),
    (range(300, 400), _redirected),
)


# --- Parsing an error response ---------------------------------------------------------------------------------------


def error_message(body: bytes) -> str:
    """Extract the error message from a response body, as one line.

    Known forms are ``{"error": text}``, ``{"error": {"message": text}}``, ``{"detail": text | object | array}``,
    ``{"message": text, "detail": ...}``, problem+json and plain text. HTML gives an empty message.
    """
    try:
        message = _message_in(orjson.loads(body))
    except orjson.JSONDecodeError:
        message = body.decode(errors="replace")
        if message.lstrip().startswith("<"):
            return ""
    except RecursionError:
        return ""
    return " ".join(message.split())


def _message_in(value: object) -> str:
    match value:
        case str():
            return value
        case {"error": (str() | dict()) as error}:
            return _message_in(error)
        case {"loc": [*location], "msg": str(message)}:
            return f"{'.'.join(map(str, location))}: {message}"
        case [*items]:
            return "; ".join(filter(None, map(_message_in, items)))
        case dict():
            # A title only names the status, so it is used if there is nothing else.
            parts = [_message_in(value[key]) for key in ("message", "msg", "detail") if value.get(key)]
            return " ".join(filter(None, parts)) or _message_in(value.get("title"))
        case _:
            return ""


def parse_retry_after(header: str | None) -> float | None:
    """Parse a ``Retry-After`` header, a number of seconds or a date (RFC 9110, section 10.2.3); at most one day."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
            seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
        except (ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER_SECONDS) if math.isfinite(seconds) else None


def _parse_int(digits: str | None) -> int | None:
    return None if digits is None else int(digits.replace(",", ""))

"""What an endpoint's refusal means: two tables from status and words to our errors, and to whether asking again helps.

NVIDIA calls the wording of its errors unstable, so the status decides first, and the words only where one status has
several meanings. What an endpoint said is repeated in one short line, and never with the key in it.
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

# Attempts in all. The pauses between them are 0.5, 1, 2 ... 30 s, with some chance added.
_NOT_THERE = 3  # an address where nothing listens: whoever mistyped it should not wait long
_TRANSIENT = 6  # a failure inside the endpoint or on the way
_RATE_LIMITED = 8  # the pauses last just over the minute by which such limits count

_RATE_WINDOW = 60.0  # seconds
_LONGEST_WAIT = 86_400.0  # seconds; a day on, nobody can know any more, whatever an endpoint says
_LONGEST_QUOTE = 300


class Failure(Exception):
    """An attempt that failed. It does not leave this package: its `error` does.

    Attributes:
        error: what the caller is told if nothing more is tried.
        attempts: how many attempts in all are worth making; 1 where asking again cannot help.
        pause: seconds that the endpoint asks to wait before the next; None where it does not say.
        divisible: the same texts may go through in smaller requests.
    """

    def __init__(
        self, error: EmbeddingsError, *, attempts: int = 1, pause: float | None = None, divisible: bool = False
    ) -> None:
        super().__init__(error.message)
        self.error = error
        self.attempts = attempts
        self.pause = pause
        self.divisible = divisible


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request for embeddings asked for.

    Attributes:
        model: the model's name at the endpoint.
        card: the same model's card.
        texts: the texts in the request.
    """

    model: str
    card: ModelCard
    texts: Sequence[str]


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that is no success, with all that the tables' rows look at.

    Attributes:
        endpoint: who refused.
        status: of the answer.
        said: the endpoint's own words in one line, without the key; empty where it had none.
        retry_after: seconds it asks to wait; None where it does not say.
        location: where a redirect leads.
    """

    endpoint: Endpoint
    status: int
    said: str
    retry_after: float | None
    location: str | None

    @property
    def quote(self) -> str:
        """Status and words."""
        return f"{self.status}: {self.said}" if self.said else str(self.status)

    @property
    def account(self) -> str:
        """Whose account it was, by the name of what holds the key."""
        return f"the account of the key in {self.endpoint.key_name}"

    def __str__(self) -> str:
        return f"the endpoint {self.endpoint.url}"


def understand(response: httpx.Response, *, endpoint: Endpoint, asked: Asked | None) -> Failure:
    """What an answer that is no success means; `asked` is None for a request that is not for embeddings."""
    told = words(response.content)
    refusal = Refusal(
        endpoint=endpoint,
        status=response.status_code,
        said=endpoint.redact(told)[:_LONGEST_QUOTE],
        retry_after=retry_after(response.headers.get("Retry-After")),
        location=response.headers.get("Location"),
    )
    if asked is not None:
        read = told[:_LONGEST_QUOTE]  # a key of few letters, such as vLLM's users make up, may be part of any word
        for statuses, pattern, about_request in _ABOUT_REQUESTS:
            if refusal.status in statuses and (found := re.search(pattern, read, re.IGNORECASE)):
                return about_request(refusal, asked, found)
    for statuses, about_endpoint in _ABOUT_ENDPOINTS:
        if refusal.status in statuses:
            return about_endpoint(refusal)
    return _failed(refusal)


def understand_silence(error: httpx.RequestError, *, endpoint: Endpoint) -> Failure:
    """What it means that no answer came, or not a whole one."""
    detail = endpoint.redact(str(error)) or type(error).__name__
    match error:
        case httpx.ConnectTimeout() | httpx.ConnectError() | httpx.ProxyError():
            question = "is there a way to the internet" if endpoint.hosted else "is it running, is the address right"
            away = f"cannot connect to the endpoint {endpoint.url} ({detail}): {question}, does a proxy stand between?"
            return Failure(UpstreamUnavailable(away), attempts=_NOT_THERE)
        case httpx.TimeoutException():
            silent = f"the endpoint {endpoint.url} was silent for {endpoint.timeout:g} s"
            return Failure(UpstreamTimeout(silent), attempts=_TRANSIENT)
        case _:
            broken = (
                f"the connection to the endpoint {endpoint.url} broke off before its answer was complete ({detail})"
            )
            return Failure(UpstreamFailed(broken), attempts=_TRANSIENT)


def unusable(reason: str, *, endpoint: Endpoint, damaged: bool) -> Failure:
    """An answer with status 200 that cannot be believed; a damaged one may be whole the next time."""
    error = UpstreamFailed(f"the answer of the endpoint {endpoint.url} cannot be used: {reason}")
    return Failure(error, attempts=_TRANSIENT if damaged else 1)


# --- What an endpoint says of what it was asked for ------------------------------------------------------------------


def _too_long(_refusal: Refusal, asked: Asked, found: re.Match[str]) -> Failure:
    groups = found.groupdict()
    tokens, allowed, index = (_number(groups.get(name)) for name in ("tokens", "allowed", "index"))
    if index is not None and index < len(asked.texts):
        return Failure(InputTooLong(index=index, tokens=tokens, allowed=allowed))
    lengths = [len(text) for text in asked.texts]
    return Failure(
        InputTooLong(index=lengths.index(max(lengths)), tokens=tokens, allowed=allowed, certain=len(lengths) == 1)
    )


def _too_large(refusal: Refusal, asked: Asked, _found: re.Match[str]) -> Failure:
    texts = "the text is" if len(asked.texts) == 1 else f"{len(asked.texts)} texts are"
    error = PayloadTooLarge(f"{texts} too much for one request to {refusal} ({refusal.quote})", param="input")
    return Failure(error, divisible=True)


def _degraded(refusal: Refusal, asked: Asked, _found: re.Match[str]) -> Failure:
    error = UpstreamUnavailable(f"{refusal} says that {asked.model} is degraded at the moment; try again later")
    return Failure(error, attempts=_TRANSIENT)


def _input_type(refusal: Refusal, asked: Asked, _found: re.Match[str]) -> Failure:
    return Failure(
        InvalidRequest(
            f"`input_type` is not as {asked.model} wants it: 'query' for what is searched with, 'passage' for what is "
            f"searched ({refusal} answered {refusal.quote})",
            param="input_type",
        )
    )


def _invalid(refusal: Refusal, _asked: Asked, _found: re.Match[str]) -> Failure:
    return Failure(InvalidRequest(f"{refusal} does not accept the request ({refusal.quote})"))


def _not_entitled(refusal: Refusal, asked: Asked, _found: re.Match[str]) -> Failure:
    return Failure(
        UnknownModel(
            f"{refusal.account} may not use {asked.model} at {refusal.endpoint.url}, which lists more models than an "
            "account can call (404): choose another model",
            param="model",
        )
    )


def _unknown_model(refusal: Refusal, asked: Asked, _found: re.Match[str]) -> Failure:
    return Failure(
        UnknownModel(f"{refusal} serves no model {asked.model} ({refusal.quote}): choose another one", param="model")
    )


def _retired(refusal: Refusal, asked: Asked, found: re.Match[str]) -> Failure:
    card = asked.card
    date = found.groupdict().get("date") or card.hosted_until
    when = f" on {date}" if date else ""
    heir = "goes on making the same vectors on your own machine"
    if card.repository is not None:
        advice = f"`--model {card.id}` {heir}"
    else:
        advice = (
            f"with its files in a folder, `--model {card.id}=FOLDER` {heir}; without them, what was stored must be "
            f"embedded anew with another model, such as {HOSTED_DEFAULT_MODEL}"
        )
    return Failure(ModelRetired(f"{refusal} switched {asked.model} off{when} (410): {advice}", param="model"))


_INVALID = frozenset({400, 413, 422})
_ANY = ""

_ABOUT_REQUESTS: tuple[tuple[Collection[int], str, Callable[[Refusal, Asked, re.Match[str]], Failure]], ...] = (
    # By status and words; the first row that fits. The words are those of NIM, of this server's own REST face, of
    # text-embeddings-inference, of vLLM and of Ollama.
    (_INVALID, r"Input length (?P<tokens>\d+) exceeds maximum allowed token size (?P<allowed>\d+)", _too_long),
    (_INVALID, r"exceeds maximum allowed token size", _too_long),
    (_INVALID, r"`input\[(?P<index>\d+)\]` has (?P<tokens>\d[\d,]*) tokens, .* takes (?P<allowed>\d[\d,]*)", _too_long),
    (_INVALID, r"must have less than (?P<allowed>\d+) tokens\. Given: (?P<tokens>\d+)", _too_long),
    (_INVALID, r"maximum context length is (?P<allowed>\d+) tokens(.*?(?P<tokens>\d+) (input )?tokens)?", _too_long),
    (_INVALID | {500}, r"input length exceeds the context length", _too_long),  # Ollama takes the blame for it
    # The hosted gateway's limit is on bytes, other servers have one on texts.
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

# --- What an endpoint says of itself, of its callers, or of the way to it --------------------------------------------


def _key_refused(refusal: Refusal) -> Failure:
    endpoint = refusal.endpoint
    source = f"keys come from {KEYS_URL}" if endpoint.hosted else "ask whoever runs it for one"
    if endpoint.caller_keys and (endpoint.for_caller or endpoint.api_key is None):
        # Here it is the caller who has to put it right.
        found = f"does not accept the key ({refusal.status})" if endpoint.for_caller else "asks for a key"
        return Failure(
            AuthenticationFailed(f"{refusal} {found}: send yours in the header {CALLER_KEY_HEADER}; {source}")
        )
    if endpoint.api_key is None:
        message = f"{refusal} asks for an API key, and none is set: set {endpoint.key_name}; {source}"
    else:
        message = (
            f"{refusal} does not accept the API key in {endpoint.key_name} ({refusal.status}): it is mistyped, revoked "
            f"or not meant for this; {source}"
        )
    return Failure(UpstreamRefused(message))


def _no_credits(refusal: Refusal) -> Failure:
    where = f"; see {KEYS_URL}" if refusal.endpoint.hosted else ""
    return Failure(UpstreamRefused(f"{refusal.account} has no credits left at {refusal.endpoint.url} (402){where}"))


def _no_route(refusal: Refusal) -> Failure:
    return Failure(UpstreamFailed(f"{refusal} has no such route (404): is its address right?"))


def _rate_limited(refusal: Refusal) -> Failure:
    wait = refusal.retry_after or _RATE_WINDOW
    error = Overloaded(
        f"{refusal} takes no more requests for now ({refusal.quote}): try again in {wait:,.0f} s, with fewer texts at "
        "once",
        retry_after=wait,
    )
    return Failure(error, attempts=_RATE_LIMITED, pause=refusal.retry_after)


def _timed_out(refusal: Refusal) -> Failure:
    return Failure(UpstreamTimeout(f"{refusal} did not finish in its own time ({refusal.quote})"), attempts=_TRANSIENT)


def _unavailable(refusal: Refusal) -> Failure:
    wait = refusal.retry_after
    when = "later" if wait is None else f"in {wait:,.0f} s"
    error = UpstreamUnavailable(f"{refusal} takes no work now ({refusal.quote}): try again {when}", retry_after=wait)
    return Failure(error, attempts=_TRANSIENT, pause=wait)


def _broken(refusal: Refusal) -> Failure:
    return Failure(UpstreamFailed(f"{refusal} failed ({refusal.quote})"), attempts=_TRANSIENT)


def _redirected(refusal: Refusal) -> Failure:
    leads = refusal.endpoint.redact(refusal.location or "nowhere")[:_LONGEST_QUOTE]
    return Failure(
        UpstreamFailed(
            f"{refusal} redirects to {leads} ({refusal.status}), which is not followed, since the key would go with "
            "it: if that address is the right one, set it as the endpoint's"
        )
    )


def _failed(refusal: Refusal) -> Failure:
    return Failure(UpstreamFailed(f"{refusal} answered what embeddings have no use for ({refusal.quote})"))


_ABOUT_ENDPOINTS: tuple[tuple[Collection[int], Callable[[Refusal], Failure]], ...] = (
    ({401, 403}, _key_refused),
    ({402}, _no_credits),
    ({404}, _no_route),
    ({408, 504}, _timed_out),
    ({429}, _rate_limited),
    ({503}, _unavailable),
    ({500, 502}, _broken),
    (range(300, 400), _redirected),
)


# --- Reading an answer -----------------------------------------------------------------------------------------------


def words(body: bytes) -> str:
    """What the body of a refusal says, in one line, whichever of the known forms it has.

    ``{"error": text}``, ``{"error": {"message": text}}``, ``{"detail": text | object | array}``,
    ``{"message": text, "detail": ...}``, problem+json, plain text. A page of HTML says nothing.
    """
    try:
        said = _said(orjson.loads(body))
    except orjson.JSONDecodeError:
        said = body.decode(errors="replace")
        if said.lstrip().startswith("<"):
            return ""
    except RecursionError:
        return ""
    return " ".join(said.split())


def _said(value: object) -> str:
    match value:
        case str():
            return value
        case {"error": (str() | dict()) as error}:
            return _said(error)
        case {"loc": [*place], "msg": str(message)}:
            return f"{'.'.join(map(str, place))}: {message}"
        case [*several]:
            return "; ".join(filter(None, map(_said, several)))
        case dict():
            # A title is only a name for the status, so it speaks where nothing else does.
            parts = [_said(value[key]) for key in ("message", "msg", "detail") if value.get(key)]
            return " ".join(filter(None, parts)) or _said(value.get("title"))
        case _:
            return ""


def retry_after(header: str | None) -> float | None:
    """Seconds, a day at most, from a ``Retry-After`` header: a number or a date (RFC 9110, section 10.2.3)."""
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
    return min(max(seconds, 0.0), _LONGEST_WAIT) if math.isfinite(seconds) else None


def _number(digits: str | None) -> int | None:
    return None if digits is None else int(digits.replace(",", ""))

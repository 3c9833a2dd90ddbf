"""The exception tree, and the one table that says how each error looks on the wire.

    EmbeddingsError
    |-- InvalidSetting            the server was told something that cannot be: says which setting to change
    |-- InvalidRequest            the request breaks a rule: names the field and says what is accepted
    |   |-- InputUnusable         one of the texts cannot be embedded: says which
    |   |   `-- InputTooLong      more tokens than the model takes, and truncate is NONE
    |   |-- TooManyInputs         more texts than one request may have
    |   `-- InputTooLarge         more characters than one text may have
    |-- AuthenticationFailed      no API key and no access token, or a wrong one
    |   `-- InsufficientScope     the access token does not allow this
    |-- IssuerUnavailable         whether an access token is good cannot be told now
    |-- UnknownModel              no such model here: lists those that are
    |-- PayloadTooLarge           the body is over the limit
    |-- Overloaded                no room in the queue now: says when to come back
    |-- RateLimited               the caller has asked too often: says when to come back
    |-- TooBusy                   too many requests are in flight: says when to come back
    |-- RequestTimeout            the request took longer than one may
    |-- ServerStopped             the server is shutting down
    `-- ModelUnavailable          the model is known, but cannot answer here and now
        |-- MissingDependency     a package is not installed: says which extra brings it
        |-- CheckpointInvalid     the model's files are wrong: names file and reason
        |-- ModelRetired          its endpoint has switched it off: says when, and what goes on making its vectors
        |-- UpstreamRefused       its endpoint turns this server's key or account down: says which key
        |-- UpstreamFailed        its endpoint failed, or answered what cannot be used
        |-- UpstreamUnavailable   its endpoint cannot be reached, or takes no work now
        `-- UpstreamTimeout       its endpoint did not answer in time

Messages are written for whoever has to act on them, a model included: what was wrong, what is accepted, what to do
next. They never hold a key or a caller's whole text. This module imports nothing of ours, so that every layer can use
it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus

_MOST_NAMED = 20
"""Texts besides the first that a message names: enough to put right at once what a caller can hold in mind."""


def _same(index: int) -> int:
    return index


class EmbeddingsError(Exception):
    """Base of every error this package raises on purpose.

    Attributes:
        message: the whole text for the caller.
        param: the request field it is about, as in ``input[3]``; None where no single field is to blame.
        retry_after: seconds after which it is worth trying again; None where nobody knows, or waiting does not help.
    """

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class InvalidSetting(EmbeddingsError):
    """The server was told something that cannot be, so it does not start."""


class InvalidRequest(EmbeddingsError):
    """The request breaks a rule of the schema or of the model it names."""


class InputUnusable(InvalidRequest):
    """A text cannot be embedded as it is.

    An embedder knows the text by its position in a list only; `about` puts the error where the text stands for others.

    Attributes:
        reason: what is wrong with the text, as a sentence without its subject.
        index: position of the text in the list that was to be embedded.
        certain: False where an endpoint refused several texts at once without a word about which, and `index` is that
            of the longest.
    """

    def __init__(
        self, reason: str, *, index: int, name: Callable[[int], str] | None = None, certain: bool = True
    ) -> None:
        text = _named(index, name)
        subject = text if certain else f"a text (probably {text}, the longest of those sent together)"
        super().__init__(f"{subject} {reason}", param=None if name is None else name(index))
        self.reason, self.index, self.certain = reason, index, certain

    def about(self, place: Callable[[int], int] = _same, name: Callable[[int], str] | None = None) -> InputUnusable:
        """The same error for whoever has the texts in another list.

        Args:
            place: the position there of the text at a position here.
            name: the request's field, and the position in it, of the text at a position there; if that is known.
        """
        return InputUnusable(self.reason, index=place(self.index), name=name, certain=self.certain)


class InputTooLong(InputUnusable):
    """A text has more tokens than the model takes, and the request does not allow truncation.

    Attributes:
        tokens: its length as the model counts it, special tokens and prompt included; None where an endpoint did not
            say.
        allowed: the model's limit; None where it is not known.
        others: positions of further texts that are too long, as far as they were looked at.
    """

    def __init__(
        self,
        *,
        index: int,
        tokens: int | None,
        allowed: int | None,
        others: Sequence[int] = (),
        name: Callable[[int], str] | None = None,
        certain: bool = True,
    ) -> None:
        if tokens is not None:
            length = f"{tokens:,} tokens{'' if allowed is None else f', and the model takes {allowed:,}'}"
        elif allowed is not None:
            length = f"more than the {allowed:,} tokens that the model takes"
        else:
            length = "more tokens than the model takes"
        if others:
            named = [_named(other, name) for other in others[:_MOST_NAMED]]
            if len(others) > _MOST_NAMED:
                named.append(f"and {len(others) - _MOST_NAMED} more")
            length += f" (too long as well: {', '.join(named)})"
        super().__init__(
            f"has {length}: shorten {'them' if others else 'it'}, or set `truncate` to 'END' or 'START' to drop what "
            "is too much",
            index=index,
            name=name,
            certain=certain,
        )
        self.tokens, self.allowed, self.others = tokens, allowed, others

    def about(self, place: Callable[[int], int] = _same, name: Callable[[int], str] | None = None) -> InputTooLong:
        """See `InputUnusable.about`."""
        return InputTooLong(
            index=place(self.index),
            tokens=self.tokens,
            allowed=self.allowed,
            others=[*map(place, self.others)],
            name=name,
            certain=self.certain,
        )


def _named(index: int, name: Callable[[int], str] | None) -> str:
    return f"`text {index}`" if name is None else f"`{name(index)}`"


class TooManyInputs(InvalidRequest):
    """The request has more texts than one request may have here."""


class InputTooLarge(InvalidRequest):
    """A text has more characters than one text may have here, whatever is truncated."""


class AuthenticationFailed(EmbeddingsError):
    """The caller gave no API key and no access token, or one that this server does not accept.

    Attributes:
        challenge: what the header WWW-Authenticate is to say.
    """

    def __init__(self, message: str, *, challenge: str = "Bearer") -> None:
        super().__init__(message)
        self.challenge = challenge


class InsufficientScope(AuthenticationFailed):
    """The caller's access token does not have the scopes that this server asks for."""


class IssuerUnavailable(EmbeddingsError):
    """Whether the caller's access token is good cannot be told: its issuer does not answer."""


class UnknownModel(EmbeddingsError):
    """The request names a model that is not served here."""


class PayloadTooLarge(EmbeddingsError):
    """The request body is over the size limit."""


class Overloaded(EmbeddingsError):
    """The queue has no room for this request; `Retry-After` is always sent."""

    retry_after: float

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message, retry_after=retry_after)


class RateLimited(EmbeddingsError):
    """The caller has sent more requests than the server takes from one in a minute; `Retry-After` is always sent."""


class TooBusy(EmbeddingsError):
    """The server has as many requests in flight as it takes; `Retry-After` is always sent."""


class RequestTimeout(EmbeddingsError):
    """The request took longer than the server lets one take."""


class ServerStopped(EmbeddingsError):
    """The server is shutting down and takes no more work."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class ModelUnavailable(EmbeddingsError):
    """The model is known here but cannot answer now."""


class MissingDependency(ModelUnavailable):
    """An optional package that the model needs is not installed."""


class CheckpointInvalid(ModelUnavailable):
    """The model's files are missing, damaged or of an unsupported kind."""


class ModelRetired(ModelUnavailable):
    """The model's endpoint has switched it off for good."""


class UpstreamRefused(ModelUnavailable):
    """The model's endpoint does not accept this server's key, or its account may not do this.

    The caller's own key was fine, so this is no `AuthenticationFailed`.
    """


class UpstreamFailed(ModelUnavailable):
    """The model's endpoint failed, or its answer cannot be used."""


class UpstreamUnavailable(ModelUnavailable):
    """The model's endpoint cannot be reached, or says that it takes no work now."""


class UpstreamTimeout(ModelUnavailable):
    """The model's endpoint did not answer in time."""


@dataclass(frozen=True, slots=True)
class WireForm:
    """How a class of errors appears to a REST caller: HTTP status, and ``type`` and ``code`` of the OpenAI envelope."""

    status: int
    type: str
    code: str


WIRE_FORMS: dict[type[EmbeddingsError], WireForm] = {
    InvalidRequest: WireForm(400, "invalid_request_error", "invalid_request"),
    InputUnusable: WireForm(400, "invalid_request_error", "input_unusable"),
    InputTooLong: WireForm(400, "invalid_request_error", "input_too_long"),
    TooManyInputs: WireForm(400, "invalid_request_error", "too_many_inputs"),
    InputTooLarge: WireForm(400, "invalid_request_error", "input_too_large"),
    AuthenticationFailed: WireForm(401, "authentication_error", "invalid_api_key"),
    InsufficientScope: WireForm(403, "permission_error", "insufficient_scope"),
    IssuerUnavailable: WireForm(503, "server_error", "issuer_unavailable"),
    UnknownModel: WireForm(404, "invalid_request_error", "model_not_found"),
    PayloadTooLarge: WireForm(413, "invalid_request_error", "payload_too_large"),
    Overloaded: WireForm(429, "rate_limit_error", "overloaded"),
    RateLimited: WireForm(429, "rate_limit_error", "rate_limited"),
    TooBusy: WireForm(503, "server_error", "too_busy"),
    RequestTimeout: WireForm(503, "server_error", "request_timeout"),
    ServerStopped: WireForm(503, "server_error", "server_stopped"),
    ModelUnavailable: WireForm(503, "server_error", "model_unavailable"),
    MissingDependency: WireForm(503, "server_error", "missing_dependency"),
    CheckpointInvalid: WireForm(503, "server_error", "checkpoint_invalid"),
    ModelRetired: WireForm(410, "invalid_request_error", "model_retired"),
    UpstreamRefused: WireForm(502, "server_error", "upstream_refused"),
    UpstreamFailed: WireForm(502, "server_error", "upstream_failed"),
    UpstreamUnavailable: WireForm(503, "server_error", "upstream_unavailable"),
    UpstreamTimeout: WireForm(504, "server_error", "upstream_timeout"),
    EmbeddingsError: WireForm(500, "server_error", "internal_server_error"),
}
"""The one table; an error that is not in it looks like its nearest ancestor that is."""

HTTP_ERRORS = {
    400: "The request has both a Content-Length and a Transfer-Encoding.",
    403: "A browser sent it from a page that may not use this server.",
    404: "Nothing is served at this address.",
    405: "The address does not take this method; the header `Allow` says which it does.",
    408: "The request's body did not arrive in time.",
    415: "The body is not JSON, or not said to be, or it is compressed.",
    421: "The request is addressed to another server.",
    500: "An error inside the server; its log says more.",
}
"""The errors of HTTP itself, by status, with their meanings; their codes are the status's own names."""


def http_form(status: int) -> WireForm:
    """The wire form of an error of HTTP itself, as with the code ``not_found``."""
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    return WireForm(status, kind, HTTPStatus(status).name.lower())


def wire_form(error: EmbeddingsError) -> WireForm:
    """The wire form of `error`: that of the nearest class in its ancestry which the table names."""
    return next(WIRE_FORMS[cls] for cls in type(error).__mro__ if cls in WIRE_FORMS)

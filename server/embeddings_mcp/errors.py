"""The exception tree, and the table that maps each error to its form on the wire.

    EmbeddingsError
    |-- InvalidSetting            a setting is invalid: says which to change
    |-- InvalidRequest            the request breaks a rule: names the field and says what is accepted
    |   |-- InputUnusable         one of the texts cannot be embedded: says which
    |   |   `-- InputTooLong      more tokens than the model takes, and truncate is NONE
    |   |-- TooManyInputs         more texts than one request may have
    |   `-- InputTooLarge         more characters than one text may have
    |-- AuthenticationFailed      no API key or access token, or an invalid one
    |   `-- InsufficientScope     the access token lacks a scope
    |-- IssuerUnavailable         the access token cannot be validated now
    |-- UnknownModel              no such model here: lists those that are served
    |-- PayloadTooLarge           the body is over the limit
    |-- Overloaded                the queue is full: says when to retry
    |-- RateLimited               the caller is over its rate limit: says when to retry
    |-- TooBusy                   too many requests, or bytes, are in flight: says when to retry
    |-- RequestTimeout            the request took longer than allowed
    |-- ServerStopped             the server is shutting down
    `-- ModelUnavailable          the model is known, but not available now
        |-- MissingDependency     a package is not installed: says which extra installs it
        |-- CheckpointInvalid     the model's files are invalid: names file and reason
        |-- ModelRetired          its endpoint has retired it: says when, and how to compute its vectors locally
        |-- UpstreamRefused       its endpoint rejects this server's key or account: says which key
        |-- UpstreamFailed        its endpoint failed, or its response is unusable
        |-- UpstreamUnavailable   its endpoint cannot be reached, or does not accept requests now
        `-- UpstreamTimeout       its endpoint did not respond in time

Messages are written for the reader that has to act on them, which may be a language model: what was wrong, what is
accepted, what to do next. They never contain a key or the whole text of a caller. This module imports nothing else of
the package, so that every layer can use it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus

_MAX_NAMED = 20
"""How many texts besides the first a message names: enough to fix at once, without an overlong message."""


def _unchanged(index: int) -> Sequence[int]:
    return (index,)


class EmbeddingsError(Exception):
    """Base class of all errors that this package raises deliberately.

    Attributes:
        message: the full message for the caller.
        param: the request field at fault, such as ``input[3]``; None if it is not a single field.
        retry_after: seconds after which to retry; None if that is unknown, or waiting does not help.
    """

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class InvalidSetting(EmbeddingsError):
    """A setting is invalid, so the server does not start."""


class InvalidRequest(EmbeddingsError):
    """The request breaks a rule of the schema or of the model it names."""


class InputUnusable(InvalidRequest):
    """A text cannot be embedded as it is.

    An embedder knows a text only by its index in a list; `reindexed` adapts the error for the layers above.

    Attributes:
        reason: what is wrong with the text, as a sentence without its subject.
        index: index of the text in the list to embed.
        certain: False if an endpoint refused several texts together without saying which one; `index` is then that of
            the longest.
    """

    def __init__(
        self, reason: str, *, index: int, name: Callable[[int], str] | None = None, certain: bool = True
    ) -> None:
        text = _named(index, name)
        subject = text if certain else f"a text (probably {text}, the longest of those sent together)"
        super().__init__(f"{subject} {reason}", param=None if name is None else name(index))
        self.reason, self.index, self.certain = reason, index, certain

    def reindexed(
        self, map_index: Callable[[int], Sequence[int]] = _unchanged, name: Callable[[int], str] | None = None
    ) -> InputUnusable:
        """Return the same error for another list of the texts.

        Args:
            map_index: maps a text's index in this list to its indices in the other, where it may occur more than once.
            name: maps a text's index in the other list to its request field and its index there, if they are known.
        """
        return InputUnusable(self.reason, index=map_index(self.index)[0], name=name, certain=self.certain)


class InputTooLong(InputUnusable):
    """A text has more tokens than the model takes, and the request does not allow truncation.

    Attributes:
        tokens: its length as the model counts it, with special tokens and prompt; None if an endpoint did not say.
        max_tokens: the model's limit; None if it is not known.
        others: indices of further texts that are too long, among those that were checked.
    """

    def __init__(
        self,
        *,
        index: int,
        tokens: int | None,
        max_tokens: int | None,
        others: Sequence[int] = (),
        name: Callable[[int], str] | None = None,
        certain: bool = True,
    ) -> None:
        if tokens is not None:
            length = f"{tokens:,} tokens{'' if max_tokens is None else f', and the model takes {max_tokens:,}'}"
        elif max_tokens is not None:
            length = f"more than the {max_tokens:,} tokens that the model takes"
        else:
            length = "more tokens than the model takes"
        if others:
            named = [_named(other, name) for other in others[:_MAX_NAMED]]
            if len(others) > _MAX_NAMED:
                named.append(f"and {len(others) - _MAX_NAMED} more")
            length += f" (too long as well: {', '.join(named)})"
        super().__init__(
            f"has {length}: shorten {'them' if others else 'it'}, or set `truncate` to 'END' or 'START' to drop the "
            "excess",
            index=index,
            name=name,
            certain=certain,
        )
        self.tokens, self.max_tokens, self.others = tokens, max_tokens, others

    def reindexed(
        self, map_index: Callable[[int], Sequence[int]] = _unchanged, name: Callable[[int], str] | None = None
    ) -> InputTooLong:
        """See `InputUnusable.reindexed`."""
        index, *repeated = map_index(self.index)
        return InputTooLong(
            index=index,
            tokens=self.tokens,
            max_tokens=self.max_tokens,
            others=sorted({*repeated, *itertools.chain.from_iterable(map(map_index, self.others))}),
            name=name,
            certain=self.certain,
        )


def _named(index: int, name: Callable[[int], str] | None) -> str:
    return f"`text {index}`" if name is None else f"`{name(index)}`"


class TooManyInputs(InvalidRequest):
    """The request has more texts than the server allows."""


class InputTooLarge(InvalidRequest):
    """A text has more characters than the server allows, even with truncation."""


class AuthenticationFailed(EmbeddingsError):
    """The request has no API key or access token, or one that this server does not accept.

    Attributes:
        challenge: value of the WWW-Authenticate header.
    """

    def __init__(self, message: str, *, challenge: str = "Bearer") -> None:
        super().__init__(message)
        self.challenge = challenge


class InsufficientScope(AuthenticationFailed):
    """The access token lacks a scope that this server requires."""


class IssuerUnavailable(EmbeddingsError):
    """The access token cannot be validated: its issuer does not respond."""


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
    """The caller has exceeded the limit of requests per minute; `Retry-After` is always sent."""


class TooBusy(EmbeddingsError):
    """The server has too many requests, or too many bytes of them, in flight; `Retry-After` is always sent."""


class RequestTimeout(EmbeddingsError):
    """The request took longer than the server allows."""


class ServerStopped(EmbeddingsError):
    """The server is shutting down and takes no more work."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class ModelUnavailable(EmbeddingsError):
    """The model is known here but not available now."""


class MissingDependency(ModelUnavailable):
    """An optional package that the model needs is not installed."""


class CheckpointInvalid(ModelUnavailable):
    """The model's files are missing, damaged or of an unsupported kind."""


class ModelRetired(ModelUnavailable):
    """The model's endpoint has retired it."""


class UpstreamRefused(ModelUnavailable):
    """The model's endpoint rejects this server's key or account.

    The caller's own key was accepted, so this is not an `AuthenticationFailed`.
    """


class UpstreamFailed(ModelUnavailable):
    """The model's endpoint failed, or its response is unusable."""


class UpstreamUnavailable(ModelUnavailable):
    """The model's endpoint cannot be reached, or does not accept requests now."""


class UpstreamTimeout(ModelUnavailable):
    """The model's endpoint did not respond in time."""


@dataclass(frozen=True, slots=True)
class WireForm:
    """How an error appears to a REST caller: HTTP status, and ``type`` and ``code`` of the OpenAI error object."""

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
"""The wire form of each error class; a class that is not listed has the form of its nearest listed ancestor."""

HTTP_ERRORS = {
    400: "The request has both a Content-Length and a Transfer-Encoding.",
    403: "A web page sent it from an origin that is not allowed.",
    404: "Nothing is served at this path.",
    405: "The path does not support this method; the `Allow` header lists those it does.",
    408: "The request body did not arrive in time.",
    415: "The body is not JSON, not declared as JSON, or compressed.",
    421: "The request is addressed to another server.",
    500: "An internal error; the server's log has details.",
}
"""Errors of the HTTP layer and their meanings, by status; the code is the name of the status."""


def first_error(error: BaseException) -> BaseException:
    """Return the first error within an exception group, in which task groups wrap it; any other error as it is."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def http_form(status: int) -> WireForm:
    """Return the wire form of an error of the HTTP layer, such as the one with code ``not_found``."""
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    return WireForm(status, kind, HTTPStatus(status).name.lower())


def wire_form(error: EmbeddingsError) -> WireForm:
    """Return the wire form of `error`: that of its class, or of its nearest ancestor in the table."""
    return next(WIRE_FORMS[cls] for cls in type(error).__mro__ if cls in WIRE_FORMS)

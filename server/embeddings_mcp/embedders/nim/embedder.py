"""`NimEmbedder`: embeds with one model of an endpoint."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import anyio
import httpx
import numpy as np

from embeddings_mcp.embedders.base import Embeddings, OnProgress, OnRows
from embeddings_mcp.embedders.nim.batched_call import BatchedCall
from embeddings_mcp.embedders.nim.client import EndpointClient
from embeddings_mcp.embedders.nim.failures import Failure, RequestContext
from embeddings_mcp.embedders.nim.wire import parse_json, parse_response, request_body
from embeddings_mcp.errors import EmbeddingsError, InputUnusable, InvalidRequest, UpstreamFailed, UpstreamTimeout
from embeddings_mcp.models import InputType, ModelCard, Truncate

logger = logging.getLogger(__name__)

_MAX_WARNINGS = 100
"""Distinct warnings logged per model: an endpoint's messages may contain a timestamp or a request id."""


class NimEmbedder:
    """Embeds with one model of an endpoint; follows `embedders.base.Embedder`.

    A call is split into batches. It queues no more of them at a time than the endpoint's concurrency, so that a long
    call does not starve a short one. A batch that fails after its retries fails the call and cancels the other batches.

    Args:
        client: of the endpoint, shared by all of its models. Closing the embedder closes it.
        card: of the model; unknown dimensions are taken from the first response.
        model: the model's name at the endpoint; the card's id if not given.
    """

    def __init__(self, client: EndpointClient, card: ModelCard, *, model: str | None = None) -> None:
        self._client = client
        self._endpoint = client.endpoint
        self._card = card
        self._model = model or card.id
        self._has_embedded = False
        self._warnings: set[str] = set()

    @property
    def card(self) -> ModelCard:
        """See `Embedder.card`."""
        return self._card

    @property
    def origin(self) -> str:
        """The endpoint's URL."""
        return self._endpoint.url

    async def identify(self) -> str:
        """Return the endpoint's URL, its dialect, the model's name there, and the caller if it sent a key of its own.

        The model behind a name can change unnoticed: only the model id in the responses may reveal it. Vectors made on
        a caller's account are for that caller only: others must neither get them nor learn that they were made.
        """
        return f"{self._endpoint.url} {self._endpoint.dialect} {self._model} {self._client.account.caller}".rstrip()

    async def embed(
        self,
        texts: Sequence[str],
        *,
        input_type: InputType | None,
        truncate: Truncate,
        on_progress: OnProgress | None = None,
        on_rows: OnRows | None = None,
    ) -> Embeddings:
        """Embed `texts`; row i is the vector of text i.

        Raises:
            InvalidRequest: the model or the endpoint does not support the request.
            InputTooLong: a text is too long and `truncate` is NONE.
            UnknownModel: the endpoint does not serve the model, or not to this account.
            Overloaded: the endpoint's limits do not allow the call within its deadline, or it responded that it takes
                no more requests for now.
            ModelUnavailable: the endpoint failed, cannot be reached, or refused this server's key; the subclass says
                which.
        """
        if self._endpoint.dialect == "openai" and truncate != "NONE":
            raise InvalidRequest(
                f"`truncate` must be 'NONE' with {self._card.id}: {self.origin} cannot be asked to truncate",
                param="truncate",
            )
        call = BatchedCall(
            texts,
            self._endpoint.batch_size,
            partial(self._embed_batch, input_type=input_type, truncate=truncate),
            on_progress,
            on_rows,
        )
        self._check_feasible(call.requests)
        with anyio.move_on_after(self._endpoint.deadline):
            self._client.account.throttle.admit(call.requests)
            embeddings = _concatenate(await call.run(min(self._endpoint.concurrency, call.requests)), self.origin)
            self._record(embeddings)
            return embeddings
        raise UpstreamTimeout(
            f"the endpoint {self.origin} had embedded {call.done:,} of {len(texts):,} texts after "
            f"{self._endpoint.deadline:g} s, the longest that a call may take: send fewer texts at once, or raise its "
            "`deadline`"
        )

    async def check(self) -> None:
        """Return once the model is ready.

        Most endpoints have a readiness route. The hosted API has none, so one text is embedded instead, unless one was
        embedded before. One is also embedded if the model's dimensions are unknown. Without a key, where only callers
        have keys, none is embedded.

        Raises:
            EmbeddingsError: the model is not ready.
        """
        with anyio.move_on_after(self._endpoint.timeout):
            must_embed = self._card.dimensions is None or (self._endpoint.ready_path is None and not self._has_embedded)
            if must_embed and not self._client.account.lacks_key:
                self._record(await self._embed_batch(["ready?"], 0, input_type="passage", truncate="NONE", retry=False))
            else:
                await self._client.check()
            return
        raise UpstreamTimeout(f"the endpoint {self.origin} did not respond within {self._endpoint.timeout:g} s")

    async def aclose(self) -> None:
        """Cancel requests in flight for all models of the endpoint, and close its connections."""
        await self._client.aclose()

    async def _embed_batch(
        self,
        texts: Sequence[str],
        start: int,
        *,
        input_type: InputType | None,
        truncate: Truncate,
        retry: bool = True,
    ) -> Embeddings:
        """Embed a batch in one request; split it in half if the endpoint refuses it as too large.

        Args:
            texts: the batch.
            start: index of its first text in the call.
            input_type: as in `embed`.
            truncate: as in `embed`.
            retry: whether to retry transient failures.
        """
        redact = self._client.account.endpoint.redact

        def parse(response: httpx.Response) -> Embeddings:
            if end_of_life := response.headers.get("Deprecation"):
                self._warn_once(f"{self._model} reaches its end of life at {self.origin} on {redact(end_of_life)}")
            parsed = parse_response(parse_json(response.content), count=len(texts), dimensions=self._card.dimensions)
            served_model = parsed.model
            if served_model is not None and served_model != self._model:  # the requested name needs no masking
                served_model = redact(served_model)
            return Embeddings(parsed.vectors, _distribute_tokens(parsed.prompt_tokens, texts), served_model)

        body = request_body(
            texts,
            model=self._model,
            card=self._card,
            dialect=self._endpoint.dialect,
            input_type=input_type,
            truncate=truncate,
        )
        try:
            context = RequestContext(self._model, self._card, texts)
            return await self._client.fetch("/embeddings", parse, body=body, context=context, retry=retry)
        except Failure as error:
            failure = error
        if not failure.splittable or len(texts) == 1:
            raise _with_offset(failure.error, start)
        self._warn_once(
            f"{failure.error.message}; sending smaller requests, which a lower `batch_size` would do at once"
        )
        middle = len(texts) // 2
        halves = [
            await self._embed_batch(half, begin, input_type=input_type, truncate=truncate)
            for half, begin in ((texts[:middle], start), (texts[middle:], start + middle))
        ]
        return _concatenate(halves, self.origin)

    def _check_feasible(self, requests: int) -> None:
        """Refuse a call that even an idle endpoint could not complete in time, for which a retry would not help."""
        max_requests = self._client.account.throttle.capacity(self._endpoint.deadline)
        if requests > max_requests:
            raise InvalidRequest(
                f"`input` has too many texts for one call: {self.origin} takes {self._endpoint.rate:g} requests a "
                f"minute and a call may last {self._endpoint.deadline:g} s; send at most "
                f"{max_requests * self._endpoint.batch_size:,.0f} texts at once",
                param="input",
            )

    def _record(self, embeddings: Embeddings) -> None:
        """Take unknown dimensions from a response, and warn if the endpoint served another model."""
        self._has_embedded = True
        if self._card.dimensions is None:
            self._card = replace(self._card, dimensions=embeddings.vectors.shape[1])
        served_model = embeddings.served_model
        if served_model is not None and served_model.lower() not in self._card.names | {self._model.lower()}:
            self._warn_once(f"{self.origin} was asked for {self._model} and says that it serves {served_model}")

    def _warn_once(self, message: str) -> None:
        """Log a warning unless it was logged before; no more than `_MAX_WARNINGS` in total."""
        if message not in self._warnings and len(self._warnings) < _MAX_WARNINGS:
            self._warnings.add(message)
            logger.warning(message)


def _concatenate(parts: Sequence[Embeddings], origin: str) -> Embeddings:
    """Concatenate the results of several batches.

    Raises:
        UpstreamFailed: they come from different models.
    """
    if len(parts) == 1:
        return parts[0]
    models = {part.served_model for part in parts}
    dimensions = {part.vectors.shape[1] for part in parts}
    if len(models) > 1 or len(dimensions) > 1:
        # The server is switching models: vectors of two spaces in one response would be worse than an error.
        names = " and ".join(sorted(f"{model} ({length} dimensions)" for model in models for length in dimensions))
        raise UpstreamFailed(f"the endpoint {origin} served one call with different models ({names}): try again")
    return Embeddings(
        np.concatenate([part.vectors for part in parts]),
        [tokens for part in parts for tokens in part.tokens],
        parts[0].served_model,
    )


def _distribute_tokens(tokens: int, texts: Sequence[str]) -> list[int]:
    """Distribute a request's token count over its texts in proportion to their lengths; the sum stays exact."""
    lengths = list(itertools.accumulate(len(text) + 1 for text in texts))
    cumulative = [tokens * length // lengths[-1] for length in lengths]
    return [end - start for start, end in itertools.pairwise([0, *cumulative])]


def _with_offset(error: EmbeddingsError, start: int) -> EmbeddingsError:
    """Translate an error about a text of a batch to the text's index in the call."""
    return error.reindexed(lambda index: [start + index]) if isinstance(error, InputUnusable) else error

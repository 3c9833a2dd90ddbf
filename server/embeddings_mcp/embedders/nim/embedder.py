"""The embedder of one model at an endpoint."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import add

import anyio
import httpx
import numpy as np

from embeddings_mcp.embedders.base import Embeddings, OnProgress, OnRows
from embeddings_mcp.embedders.nim.client import EndpointClient
from embeddings_mcp.embedders.nim.failures import Asked, Failure
from embeddings_mcp.embedders.nim.wire import read_answer, read_json, request_body
from embeddings_mcp.errors import EmbeddingsError, InputUnusable, InvalidRequest, UpstreamFailed, UpstreamTimeout
from embeddings_mcp.models import InputType, ModelCard, Truncate

logger = logging.getLogger(__name__)

SIGN_OF_LIFE = 5.0
"""Seconds between two reports of progress while nothing gets done: clients give up on a call that says nothing."""

_MOST_TOLD = 100
"""Different warnings about a model: what an endpoint says may hold the time, or a number of the request."""


class NimEmbedder:
    """Embeds with one model of an endpoint; follows `embedders.base.Embedder`.

    A call's texts go out in sub-batches, several at a time, and a call has no more of them waiting than the endpoint
    takes at once, so that a short call gets its turn beside a long one. The first sub-batch that fails for good fails
    the call and cancels the others.

    Args:
        client: the way to the endpoint, which its other models share. Closing the embedder closes it.
        card: what the model takes and gives; a length that it does not know is learnt from the first answer.
        model: the model's name at the endpoint; the card's id where it is not given.
    """

    def __init__(self, client: EndpointClient, card: ModelCard, *, model: str | None = None) -> None:
        self._client = client
        self._endpoint = client.endpoint
        self._card = card
        self._model = model or card.id
        self._answered = False
        self._told: set[str] = set()

    @property
    def card(self) -> ModelCard:
        """What the model takes and gives."""
        return self._card

    @property
    def origin(self) -> str:
        """The endpoint's address."""
        return self._endpoint.url

    async def identify(self) -> str:
        """The endpoint's address, its dialect, the model's name there, and the caller where he has a key of his own.

        What stands behind that name can be exchanged unseen: the id in the answers is all that may tell. What was made
        on a caller's account is for nobody else: who has no key must not get it, nor learn that it was made.
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
        """Embed `texts`, row i for text i.

        Raises:
            InvalidRequest: the model or the endpoint cannot do what is asked.
            InputTooLong: a text is too long and `truncate` is NONE.
            UnknownModel: the endpoint does not serve the model, or not to this account.
            Overloaded: the endpoint's limits leave no room within the deadline, or it said so itself.
            ModelUnavailable: one of its kinds says what is wrong with the endpoint.
        """
        if self._endpoint.dialect == "openai" and truncate != "NONE":
            raise InvalidRequest(
                f"`truncate` must be 'NONE' with {self._card.id}: {self.origin} cannot be asked to truncate",
                param="truncate",
            )
        call = _Call(
            texts,
            self._endpoint.batch_size,
            partial(self._embed_batch, input_type=input_type, truncate=truncate),
            on_progress,
            on_rows,
        )
        self._check_feasible(call.requests)
        with anyio.move_on_after(self._endpoint.deadline):
            self._client.account.throttle.admit(call.requests)
            made = _joined(await call.run(min(self._endpoint.concurrency, call.requests)), self.origin)
            self._learn(made)
            return made
        raise UpstreamTimeout(
            f"the endpoint {self.origin} had embedded {call.done:,} of {len(texts):,} texts after "
            f"{self._endpoint.deadline:g} s, the longest that a call may take: send fewer texts at once, or raise its "
            "`deadline`"
        )

    async def check(self) -> None:
        """Return once the model can answer.

        Most endpoints have a route that tells. The hosted API has none: all that can be known is whether the model
        answers, so it is asked for one vector, and never again once it has given any. Where only callers have keys, not
        even that can be asked.

        Raises:
            EmbeddingsError: it cannot, and why.
        """
        with anyio.move_on_after(self._endpoint.timeout):
            unknown = self._card.dimensions is None or (self._endpoint.ready_path is None and not self._answered)
            if unknown and not self._client.account.lacks_key:
                self._learn(await self._embed_batch(["ready?"], 0, input_type="passage", truncate="NONE", once=True))
            else:
                await self._client.check()
            return
        raise UpstreamTimeout(f"the endpoint {self.origin} did not answer within {self._endpoint.timeout:g} s")

    async def aclose(self) -> None:
        """Give up what is in flight, for all models of the endpoint, and close its connections."""
        await self._client.aclose()

    # --- The steps ---------------------------------------------------------------------------------------------------

    async def _embed_batch(
        self,
        texts: Sequence[str],
        start: int,
        *,
        input_type: InputType | None,
        truncate: Truncate,
        once: bool = False,
    ) -> Embeddings:
        """Embed in one request, or, should the endpoint find them too much for one, in halves.

        Args:
            texts: a sub-batch.
            start: position of its first text in the call.
            input_type: as in `embed`.
            truncate: as in `embed`.
            once: do not try again.
        """
        redact = self._client.account.endpoint.redact

        def read(response: httpx.Response) -> Embeddings:
            if retires := response.headers.get("Deprecation"):
                self._tell(f"{self._model} reaches its end of life at {self.origin} on {redact(retires)}")
            answer = read_answer(read_json(response.content), count=len(texts), dimensions=self._card.dimensions)
            served = answer.model
            if served is not None and served != self._model:  # what was asked for is no secret
                served = redact(served)
            return Embeddings(answer.vectors, _shared_out(answer.prompt_tokens, texts), served)

        body = request_body(
            texts,
            model=self._model,
            card=self._card,
            dialect=self._endpoint.dialect,
            input_type=input_type,
            truncate=truncate,
        )
        try:
            asked = Asked(self._model, self._card, texts)
            return await self._client.fetch("/embeddings", read, body=body, asked=asked, once=once)
        except Failure as error:
            failure = error
        if not failure.divisible or len(texts) == 1:
            raise _shifted(failure.error, start)
        self._tell(f"{failure.error.message}; smaller requests are sent, which `batch_size` could say at once")
        middle = len(texts) // 2
        halves = [
            await self._embed_batch(half, begin, input_type=input_type, truncate=truncate)
            for half, begin in ((texts[:middle], start), (texts[middle:], start + middle))
        ]
        return _joined(halves, self.origin)

    def _check_feasible(self, requests: int) -> None:
        """Refuse at once what even an idle endpoint could not do: waiting and trying again would not help."""
        most = self._client.account.throttle.capacity(self._endpoint.deadline)
        if requests > most:
            raise InvalidRequest(
                f"`input` has too many texts for one call: {self.origin} takes {self._endpoint.rate:g} requests a "
                f"minute and a call may last {self._endpoint.deadline:g} s; send at most "
                f"{most * self._endpoint.batch_size:,.0f} texts at once",
                param="input",
            )

    def _learn(self, made: Embeddings) -> None:
        """Keep what an answer tells about the model."""
        self._answered = True
        if self._card.dimensions is None:
            self._card = replace(self._card, dimensions=made.vectors.shape[1])
        served = made.served_model
        if served is not None and served.lower() not in self._card.names | {self._model.lower()}:
            self._tell(f"{self.origin} was asked for {self._model} and says that it serves {served}")

    def _tell(self, message: str) -> None:
        """Log a warning, but the same one only once, and not new ones without end."""
        if message not in self._told and len(self._told) < _MOST_TOLD:
            self._told.add(message)
            logger.warning(message)


class _Call:
    """One call's sub-batches: several under way at a time, and the first that fails for good ends the others.

    Args:
        texts: of the whole call.
        size: most texts in a sub-batch.
        embed: embeds a sub-batch, given with the position of its first text.
        on_progress: told how many texts are done.
        on_rows: given each sub-batch as it is done.
    """

    def __init__(
        self,
        texts: Sequence[str],
        size: int,
        embed: Callable[[Sequence[str], int], Awaitable[Embeddings]],
        on_progress: OnProgress | None,
        on_rows: OnRows | None,
    ) -> None:
        self._texts = texts
        self._size = size
        self._embed = embed
        self._on_progress = on_progress
        self._on_rows = on_rows
        self._made: dict[int, Embeddings] = {}
        self._failures: list[EmbeddingsError] = []
        starts = range(0, len(texts), size)
        self._waiting = iter(starts)
        self.requests = len(starts)
        self.done = 0

    async def run(self, workers: int) -> list[Embeddings]:
        """What was made of the sub-batches, in the order of the texts."""
        async with anyio.create_task_group() as company:
            company.start_soon(self._keep_telling)
            async with anyio.create_task_group() as group:
                for _ in range(workers):
                    group.start_soon(self._work, group.cancel_scope)
            company.cancel_scope.cancel()
        if self._failures:
            raise self._failures[0]
        return [self._made[start] for start in sorted(self._made)]

    async def _work(self, all_workers: anyio.CancelScope) -> None:
        for start in self._waiting:
            batch = self._texts[start : start + self._size]
            try:
                made = self._made[start] = await self._embed(batch, start)
            except EmbeddingsError as error:
                self._failures.append(error)
                all_workers.cancel()
                return
            if self._on_rows is not None:
                self._on_rows(range(start, start + len(batch)), made)
            self.done += len(batch)
            await self._tell()

    async def _keep_telling(self) -> None:
        while True:
            await anyio.sleep(SIGN_OF_LIFE)
            await self._tell()

    async def _tell(self) -> None:
        if self._on_progress is not None:
            await self._on_progress(self.done)


def _joined(parts: Sequence[Embeddings], origin: str) -> Embeddings:
    """What was made of several lists of texts as if it were one list, in their order."""
    if len(parts) == 1:
        return parts[0]
    models = {part.served_model for part in parts}
    lengths = {part.vectors.shape[1] for part in parts}
    if len(models) > 1 or len(lengths) > 1:
        # A server in the middle of an exchange: vectors of two spaces in one answer would be worse than none.
        names = " and ".join(sorted(f"{model} ({length} dimensions)" for model in models for length in lengths))
        raise UpstreamFailed(f"the endpoint {origin} served one call with different models ({names}): try again")
    return Embeddings(
        np.concatenate([part.vectors for part in parts]),
        [tokens for part in parts for tokens in part.tokens],
        parts[0].served_model,
    )


def _shared_out(tokens: int, texts: Sequence[str]) -> list[int]:
    """The tokens of a request as those of each of its texts, by their length; the sum is exact."""
    ends = list(itertools.accumulate(len(text) + 1 for text in texts))
    shares = [tokens * end // ends[-1] for end in ends]
    return [share - before for before, share in itertools.pairwise([0, *shares])]


def _shifted(error: EmbeddingsError, start: int) -> EmbeddingsError:
    """The error about a text of a sub-batch as one about a text of the call."""
    return error.about(partial(add, start)) if isinstance(error, InputUnusable) else error

"""What one request may ask for and how long it may take, over HTTP or MCP; the command line has no limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import anyio
from pydantic import BaseModel

from embeddings_mcp import telemetry
from embeddings_mcp.embedders.base import OnProgress
from embeddings_mcp.errors import InputTooLarge, RequestTimeout, TooManyInputs
from embeddings_mcp.operations import Operation
from embeddings_mcp.schema import texts_of
from embeddings_mcp.service import EmbeddingService
from embeddings_mcp.settings import Settings


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one request.

    Attributes:
        inputs: texts in all of its arrays together; one alone, like a query, is not counted.
        characters: characters in one text.
        seconds: from its reading to its answer.
        mcp_answer_bytes: of its answer over MCP where that travels over HTTP (see `faces.answer_size`).
    """

    inputs: int
    characters: int
    seconds: float
    mcp_answer_bytes: int

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """Those that the settings say."""
        return cls(
            settings.max_inputs,
            settings.max_input_characters,
            settings.request_seconds,
            settings.max_mcp_answer_bytes,
        )

    async def answer(
        self, service: EmbeddingService, operation: Operation, request: BaseModel, on_progress: OnProgress | None = None
    ) -> Mapping[str, Any]:
        """What the service answers within these limits.

        Raises:
            TooManyInputs: the request has more texts.
            InputTooLarge: one of them has more characters.
            RequestTimeout: the time is over; the work has been cancelled.
            EmbeddingsError: whatever the service refuses or fails with.
        """
        with telemetry.call(operation.name):
            self._check(request)
            with anyio.move_on_after(self.seconds):
                response = await operation.call(service, request, on_progress)
                if "usage" in response:
                    telemetry.TOKENS.labels(operation.name).inc(response["usage"]["prompt_tokens"])
                return response
            raise RequestTimeout(
                f"the request took longer than the {self.seconds:g} s that one may take here: send fewer texts at "
                "once, or have whoever runs the server set EMBEDDINGS_MCP_REQUEST_SECONDS"
            )

    def _check(self, request: BaseModel) -> None:
        fields = texts_of(request)
        count = sum(len(texts) for texts in fields.values() if not isinstance(texts, str))
        if count > self.inputs:
            raise TooManyInputs(
                f"the request has {count:,} texts, and one may have {self.inputs:,} here: send several requests",
                param="input",
            )
        for name, texts in fields.items():
            for index, text in enumerate([texts] if isinstance(texts, str) else texts):
                if len(text) > self.characters:
                    place = name if isinstance(texts, str) else f"{name}[{index}]"
                    raise InputTooLarge(
                        f"`{place}` has {len(text):,} characters, and one text may have {self.characters:,} here: "
                        "split it, or send less of it",
                        param=place,
                    )


DEFAULT_LIMITS = Limits.of(Settings.model_construct())
"""Those of a server that was told nothing about them."""

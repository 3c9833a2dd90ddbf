"""Limits on the size and duration of one request, over HTTP or MCP; the command line has no limits."""

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
        max_inputs: maximum number of texts in all arrays together; a text outside an array, like a query, is not
            counted.
        max_characters: maximum number of characters in one text.
        timeout: in seconds, from the parsed request to the response.
        max_mcp_response_bytes: maximum size of the response to an MCP call over HTTP (see `faces.mcp.response_size`).
    """

    max_inputs: int
    max_characters: int
    timeout: float
    max_mcp_response_bytes: int

    @classmethod
    def from_settings(cls, settings: Settings) -> Limits:
        """Read the limits from the settings."""
        return cls(
            settings.max_inputs,
            settings.max_input_characters,
            settings.request_seconds,
            settings.max_mcp_response_bytes,
        )

    async def run(
        self, service: EmbeddingService, operation: Operation, request: BaseModel, on_progress: OnProgress | None = None
    ) -> Mapping[str, Any]:
        """Run the operation within these limits.

        Raises:
            TooManyInputs: the request has too many texts.
            InputTooLarge: a text has too many characters.
            RequestTimeout: the request timed out; its work was cancelled.
            EmbeddingsError: any other error of the service.
        """
        with telemetry.call(operation.name):
            self._check(request)
            with anyio.move_on_after(self.timeout):
                response = await operation.call(service, request, on_progress)
                if "usage" in response:
                    telemetry.TOKENS.labels(operation.name).inc(response["usage"]["prompt_tokens"])
                return response
            raise RequestTimeout(
                f"the request took longer than the {self.timeout:g} s allowed here: send fewer texts at once, or "
                "have the server's operator raise EMBEDDINGS_MCP_REQUEST_SECONDS"
            )

    def _check(self, request: BaseModel) -> None:
        fields = texts_of(request)
        count = sum(len(texts) for texts in fields.values() if not isinstance(texts, str))
        if count > self.max_inputs:
            raise TooManyInputs(
                f"the request has {count:,} texts, and one may have {self.max_inputs:,} here: send several requests",
                param="input",
            )
        for name, texts in fields.items():
            for index, text in enumerate([texts] if isinstance(texts, str) else texts):
                if len(text) > self.max_characters:
                    field = name if isinstance(texts, str) else f"{name}[{index}]"
                    raise InputTooLarge(
                        f"`{field}` has {len(text):,} characters, and one text may have {self.max_characters:,} here: "
                        "split it, or send less of it",
                        param=field,
                    )


DEFAULT_LIMITS = Limits.from_settings(Settings.model_construct())
"""The limits with default settings."""

"""Log formatting: plain text or one JSON object per line, with the id of the request.

Control characters in a message are escaped, so that no caller can forge a log line or send escape sequences to a
terminal.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

from embeddings_mcp.settings import Settings

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the current request."""

ACCESS_LOGGER = "embeddings_mcp.access"
"""The logger that writes an INFO record for every HTTP request."""

# Includes lone surrogates, which cannot be encoded: file names that are not UTF-8 contain them.
_ESCAPED_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_FIELDS = "fields"


def configure(settings: Settings) -> None:
    """Log to stderr in the format and at the level given by the settings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)


def log_access(**fields: str | float) -> None:
    """Log a completed HTTP request."""
    logger = logging.getLogger(ACCESS_LOGGER)
    if logger.isEnabledFor(logging.INFO):
        logger.info(" ".join(f"{name}={value}" for name, value in fields.items()), extra={_FIELDS: fields})


class TextFormatter(logging.Formatter):
    """Formats ``LEVEL logger: message``; a traceback follows on separate lines."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - overrides logging.Formatter.formatMessage
        """Format the record as one line."""
        current = request_id.get()
        return _escaped(super().formatMessage(record)) + (f" [{current}]" if current else "")


class JsonFormatter(logging.Formatter):
    """Formats one JSON object per record, including tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        """Format the record as one line."""
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if current := request_id.get():
            entry["request_id"] = current
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        entry |= getattr(record, _FIELDS, {})
        line = json.dumps(entry, ensure_ascii=False, separators=(",", ":"), default=str)
        # json.dumps escapes C0 controls only; of the rest, JSON allows only this form of escape.
        return _ESCAPED_CHARACTERS.sub(lambda match: f"\\u{ord(match[0]):04x}", line)


def _escaped(text: str) -> str:
    return _ESCAPED_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)

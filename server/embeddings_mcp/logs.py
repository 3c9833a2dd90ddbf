"""Log records as lines: for people, or one JSON object each for machines; with the id of the request they belong to.

Whatever a caller sends, a record stays one record: control characters of a message are written as escapes, so that
nobody can forge a line or speak to a terminal.
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
"""Of the request in flight."""

ACCESS = "embeddings_mcp.access"
"""The logger that has a record, of level INFO, for every HTTP request."""

# And halves of characters, which cannot be written: a file's name that is no UTF-8 has them.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_FIELDS = "fields"


def configure(settings: Settings) -> None:
    """Write the records of this process to stderr as the settings say."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if settings.log_format == "json" else TextLines())
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)


def access(**fields: str | float) -> None:
    """Log a request that has been answered."""
    logger = logging.getLogger(ACCESS)
    if logger.isEnabledFor(logging.INFO):
        logger.info(" ".join(f"{name}={value}" for name, value in fields.items()), extra={_FIELDS: fields})


class TextLines(logging.Formatter):
    """``LEVEL logger: message``; the traceback, where there is one, follows on lines of its own."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name that logging calls
        """The record's one line."""
        current = request_id.get()
        return _escaped(super().formatMessage(record)) + (f" [{current}]" if current else "")


class JsonLines(logging.Formatter):
    """One JSON object a record, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's one line."""
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
        # The others are escaped already; JSON knows no escape but this one for those that it need not escape.
        return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", line)


def _escaped(text: str) -> str:
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)

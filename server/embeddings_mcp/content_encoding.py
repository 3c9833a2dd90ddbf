"""The compressions of responses that this server, as a client, asks for and accepts.

With these, the 64 KiB read at a time decompress to at most 64 MiB before they are counted. By default httpx also
accepts zstd and br where their packages are installed; a chunk of those can decompress to any length, as can a body
with two encodings applied one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping

_ACCEPTED = ("gzip", "deflate")

ACCEPT_ENCODING = ", ".join(_ACCEPTED)
"""Value of the Accept-Encoding header."""


def is_accepted(headers: Mapping[str, str]) -> bool:
    """Return whether a response with these headers is uncompressed, or compressed as it was asked for."""
    encoding = headers.get("Content-Encoding") or "identity"
    return encoding.lower() in {"identity", *_ACCEPTED}

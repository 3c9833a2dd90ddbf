"""API keys for the HTTP server: generating them, loading them, and finding the owner of a given one.

Only the SHA-256 of a key is kept. A slow password hash would add nothing: keys are not short passwords, and those from
`new_key` have 256 random bits. A given key's digest is compared with every known one, each in constant time, so that
the response time reveals nothing about any of them.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from pathlib import Path

from embeddings_mcp.errors import InvalidSetting
from embeddings_mcp.settings import Settings

logger = logging.getLogger(__name__)

Digests = tuple[tuple[str, bytes], ...]
"""Pairs of a key's owner and the key's SHA-256."""

_FileState = tuple[int, int, int]
"""Modification time in ns, size and inode of a file, to detect changes."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")

_LINE = re.compile(rf"({NAME.pattern})\s+sha256:([0-9a-f]{{64}})")


class Keyring:
    """The keys in the settings: `api_key`, `api_keys` and those in `api_keys_file`, which is reloaded when it changes.

    Raises:
        InvalidSetting: the file cannot be read, or a key is not in the expected form.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings_keys = _keys_in_settings(settings)
        self._file = settings.api_keys_file
        self._file_state = None if self._file is None else _state_of(self._file)
        self._file_keys: Digests = () if self._file is None else _read_file(self._file)
        self._last_warning: tuple[_FileState | None, str] | None = None  # the file's state, and the error message

    @property
    def in_use(self) -> bool:
        """Whether callers need a key."""
        return bool(self._settings_keys) or self._file is not None

    def owner(self, key: bytes) -> str | None:
        """Return the name of the key's owner, or None if the key is unknown."""
        self._refresh()
        digest = hashlib.sha256(key).digest()
        owner = None
        for name, known in (*self._settings_keys, *self._file_keys):
            # No early exit at a match: that would reveal the position of the key.
            if hmac.compare_digest(digest, known):
                owner = name
        return owner

    def _refresh(self) -> None:
        """Reload the file if it has changed; as long as it cannot be read, keep the keys."""
        if self._file is None or (state := _state_of(self._file)) == self._file_state:
            return
        try:
            self._file_keys = _read_file(self._file)
        except InvalidSetting as error:
            if self._last_warning != (state, error.message):
                self._last_warning = state, error.message
                logger.warning("The API keys were not reloaded, and the previous ones stay valid: %s", error.message)
        else:
            self._file_state = state
            self._last_warning = None
            logger.warning("%d API keys were reloaded from %s", len(self._file_keys), self._file)


def new_key(name: str) -> tuple[str, str]:
    """Generate a key for `name`; return it and its line for the file of keys.

    Raises:
        InvalidSetting: `name` is not allowed.
    """
    if not NAME.fullmatch(name):
        raise InvalidSetting(
            f"a key's name is letters, digits and any of `._@-`, at most 64 of them, not {name[:80]!r}"
        )
    key = f"emk_{secrets.token_urlsafe(32)}"
    return key, f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def _keys_in_settings(settings: Settings) -> Digests:
    keys: list[tuple[str, str]] = []
    if settings.api_key is not None and (key := settings.api_key.get_secret_value()):
        keys.append(("api-key", key))
    for number, entry in enumerate(settings.api_keys.get_secret_value().split() if settings.api_keys else [], 1):
        name, _, key = entry.partition("=")
        if not key or not NAME.fullmatch(name):  # the message does not quote the entry, which may be a key
            raise InvalidSetting(f"entry {number} of EMBEDDINGS_MCP_API_KEYS must be NAME=KEY")
        keys.append((name, key))
    # The raw bytes of the environment in any encoding, since the bytes of a header are not decoded either.
    return tuple((name, hashlib.sha256(key.encode(errors="surrogateescape")).digest()) for name, key in keys)


def _read_file(file: Path) -> Digests:
    """Read a file of keys: one ``NAME sha256:HEX`` a line; blank lines and comments after ``#`` are ignored.

    Raises:
        InvalidSetting: the file cannot be read, or a line has another form.
    """
    try:
        lines = file.read_text("utf-8-sig").splitlines()  # editors on Windows write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSetting(f"the file of API keys {file} cannot be read: {error}") from error
    digests = []
    for number, line in enumerate(lines, 1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        if not (match := _LINE.fullmatch(entry)):
            raise InvalidSetting(
                f"line {number} of {file} must be `NAME sha256:HEX`, as `embeddings-mcp key NAME` prints it"
            )
        digests.append((match[1], bytes.fromhex(match[2])))
    return tuple(digests)


def _state_of(file: Path) -> _FileState | None:
    """The state of the file, or None if it does not exist."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino

"""The API keys that open the server over HTTP: which there are, and whose a given one is.

Keys are known by their SHA-256 only. A slow hash would protect short passwords, which a key is not: those that
`new_key` makes have 256 random bits. All digests are compared with the given one, each in constant time, so that how
long it takes tells nothing about any of them.
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
"""The name of each key's owner, and the key's SHA-256."""

_State = tuple[int, int, int]
"""What changes whenever a file does."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")

_LINE = re.compile(rf"({NAME.pattern})\s+sha256:([0-9a-f]{{64}})")


class Keyring:
    """The keys of the settings: `api_key`, `api_keys` and those in `api_keys_file`, which is read anew when it changes.

    Raises:
        InvalidSetting: the file cannot be read, or a key is not given as it should be.
    """

    def __init__(self, settings: Settings) -> None:
        self._fixed = _of_settings(settings)
        self._file = settings.api_keys_file
        self._state = None if self._file is None else _state(self._file)
        self._of_file: Digests = () if self._file is None else _read(self._file)
        self._warned: tuple[_State | None, str] | None = None  # of which state of the file, and what was wrong

    @property
    def in_use(self) -> bool:
        """Whether callers have to show a key."""
        return bool(self._fixed) or self._file is not None

    def owner(self, key: bytes) -> str | None:
        """Whose key it is; None where it is nobody's."""
        self._refresh()
        digest = hashlib.sha256(key).digest()
        found = None
        for name, known in (*self._fixed, *self._of_file):
            # No way out at the first that fits: the place of a key is none of the caller's business either.
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def _refresh(self) -> None:
        """Read the file anew if it has changed; the keys stay as they are for as long as it cannot be read."""
        if self._file is None or (state := _state(self._file)) == self._state:
            return
        try:
            self._of_file = _read(self._file)
        except InvalidSetting as error:
            if self._warned != (state, error.message):
                self._warned = state, error.message
                logger.warning("The API keys stay as they were: %s", error.message)
        else:
            self._state = state
            self._warned = None
            logger.warning("The API keys were read anew from %s: %d", self._file, len(self._of_file))


def new_key(name: str) -> tuple[str, str]:
    """A new key of `name`, and the line that makes a file of keys know it.

    Raises:
        InvalidSetting: it is no name that a key can have.
    """
    if not NAME.fullmatch(name):
        raise InvalidSetting(
            f"a key's name is letters, digits and any of `._@-`, at most 64 of them, not {name[:80]!r}"
        )
    key = f"emk_{secrets.token_urlsafe(32)}"
    return key, f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def _of_settings(settings: Settings) -> Digests:
    keys: list[tuple[str, str]] = []
    if settings.api_key is not None and (key := settings.api_key.get_secret_value()):
        keys.append(("api-key", key))
    for place, entry in enumerate(settings.api_keys.get_secret_value().split() if settings.api_keys else []):
        name, _, key = entry.partition("=")
        if not key or not NAME.fullmatch(name):  # the entry itself is not repeated: it may be a key
            raise InvalidSetting(f"entry {place + 1} of EMBEDDINGS_MCP_API_KEYS must be NAME=KEY")
        keys.append((name, key))
    # The bytes of the environment, whatever they are: a caller's are compared as they come, too.
    return tuple((name, hashlib.sha256(key.encode(errors="surrogateescape")).digest()) for name, key in keys)


def _read(file: Path) -> Digests:
    """The keys that a file holds: a line for each, ``NAME sha256:HEX``; empty lines and those after ``#`` are nothing.

    Raises:
        InvalidSetting: it cannot be read, or a line is another thing.
    """
    try:
        lines = file.read_text("utf-8-sig").splitlines()  # as editors on Windows write it
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


def _state(file: Path) -> _State | None:
    """The state that the file is in; None where it is not there."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino

"""A connection of the HTTP server, whose client must keep up: say what it wants, and read what it is told.

A client that does neither would hold on to its connection and, once its request is in flight, to its place among those
(see `room`), for as long as it likes. uvicorn, whose protocol this is, waits for ever.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

if sys.platform == "linux":
    import fcntl
    import termios

_logger = logging.getLogger(__name__)

HEAD_SECONDS = 30.0
"""Longest that the head of a request may take to arrive, and the first one to begin."""

STALL_SECONDS = 60.0
"""How often it is looked whether a client reads its answer, while it has not read what there is of it."""

_LEAST_READ = 16 * 1024
"""Bytes that it must have read in between: a slow line has 50 times as much."""

_SO_NWRITE = 0x1024
"""The option by which macOS tells how much of what was sent a client has not taken; Python has no name for it."""


class Connection(H11Protocol):
    """uvicorn's protocol, with a limit to how long it waits for its client.

    It is that of h11, whatever else happens to be installed: only this one limits the size of a request's head.
    """

    _head: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Wait for the head of the first request."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of a head, or no longer."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._await_head()
        elif self._head is not None:
            self._head.cancel()
            self._head = None

    def _should_upgrade(self) -> bool:
        """Answer in HTTP/1.1 who offers another protocol too; uvicorn would warn that a package for it is missing."""
        return False

    def pause_writing(self) -> None:
        """Wait for the client to read what was written."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """Go on: it has read most of it."""
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        super().connection_lost(exc)
        for timer in (self._head, self._reading):
            if timer is not None:
                timer.cancel()

    def _await_head(self) -> None:
        if self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _await_reader(self) -> None:
        self._reading = self.loop.call_later(STALL_SECONDS, self._check_reader, self._unread())

    def _unread(self) -> int:
        """Bytes that the client has not taken yet: those held here, and by the system, which may be megabytes more.

        Of the system's, only Linux and macOS tell.
        """
        unread = self.transport.get_write_buffer_size()
        way: socket.socket = self.transport.get_extra_info("socket")
        if sys.platform == "linux":
            unread += int.from_bytes(fcntl.ioctl(way.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        elif sys.platform == "darwin":
            unread += way.getsockopt(socket.SOL_SOCKET, _SO_NWRITE)
        return unread

    def _check_reader(self, before: int) -> None:
        if before - self._unread() >= _LEAST_READ:
            self._await_reader()
            return
        _logger.info("A client that did not read its answer for %.0f s was hung up on", STALL_SECONDS)
        self.transport.abort()  # the request ends like that of a client who hung up

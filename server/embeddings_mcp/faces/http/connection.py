"""Timeouts of an HTTP connection: for the head of a request to arrive, and for the client to read the response.

uvicorn, whose protocol class this extends, has neither. A client that sends or reads nothing could then keep its
connection, and the slot of its request in flight (see `in_flight`), for as long as it likes.
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

HEAD_TIMEOUT_SECONDS = 30.0
"""Timeout for the whole head of a request; for the first request it starts when the connection is made."""

STALL_SECONDS = 60.0
"""Interval at which the progress of a client that has not yet read its response is checked."""

_MIN_READ_BYTES = 16 * 1024
"""Bytes that it must have read in each interval; a slow line transfers 50 times as much."""

_SO_NWRITE = 0x1024
"""Socket option of macOS: bytes sent that the client has not acknowledged. Python has no name for it."""


class Connection(H11Protocol):
    """uvicorn's HTTP protocol, with timeouts for a client that stalls.

    Based on h11 even where httptools is installed: only h11 limits the size of a request's head.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Start the timeout for the head of the first request."""
        super().connection_made(transport)
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        """Start the timeout where a head is incomplete, and cancel it where one is complete."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._start_head_timer()
        elif self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _should_upgrade(self) -> bool:
        """Ignore offers of another protocol and respond in HTTP/1.1; uvicorn would warn that a package is missing."""
        return False

    def pause_writing(self) -> None:
        """Start checking whether the client reads its response: the write buffer is full."""
        super().pause_writing()
        self._start_read_timer()

    def resume_writing(self) -> None:
        """Stop checking: the write buffer has drained."""
        super().resume_writing()
        if self._read_timer is not None:
            self._read_timer.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers."""
        super().connection_lost(exc)
        for timer in (self._head_timer, self._read_timer):
            if timer is not None:
                timer.cancel()

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_SECONDS, self.transport.abort)

    def _start_read_timer(self) -> None:
        self._read_timer = self.loop.call_later(STALL_SECONDS, self._check_progress, self._unread_bytes())

    def _unread_bytes(self) -> int:
        """Bytes that the client has not received: in the write buffer and, where known, in the kernel's send buffer.

        The send buffer may hold megabytes; only Linux and macOS report its size.
        """
        unread = self.transport.get_write_buffer_size()
        sock: socket.socket = self.transport.get_extra_info("socket")
        if sys.platform == "linux":
            unread += int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        elif sys.platform == "darwin":
            unread += sock.getsockopt(socket.SOL_SOCKET, _SO_NWRITE)
        return unread

    def _check_progress(self, unread_before: int) -> None:
        if unread_before - self._unread_bytes() >= _MIN_READ_BYTES:
            self._start_read_timer()
            return
        _logger.info("A connection was closed, since its client did not read the response for %.0f s", STALL_SECONDS)
        self.transport.abort()  # the request ends as if the client had disconnected

"""What is made when it is first needed, on a thread of its own, for all who wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from embeddings_mcp.errors import ServerStopped
from embeddings_mcp.gc_pause import gc_paused

_Made = TypeVar("_Made")


class _Maker(threading.Thread):
    """A thread on which something is made, told apart from all others."""


def is_making() -> bool:
    """Whether something is being made in this process."""
    return any(isinstance(thread, _Maker) for thread in threading.enumerate())


class AsyncLazy(Generic[_Made]):
    """Something that is made when it is first needed, and once for all who wait for it.

    It is made on a daemon thread, since neither a download nor a disk that hangs may hold up the server's end. Who is
    cancelled while waiting does not disturb the others.

    Args:
        name: of the thread.
        make: makes it.
        drop: called with what was made once it is no longer wanted.
    """

    def __init__(
        self, name: str, make: Callable[[], _Made], *, drop: Callable[[_Made], object] = lambda _made: None
    ) -> None:
        self._name = name
        self._make = make
        self._drop = drop
        self._made: asyncio.Future[_Made] | None = None

    async def get(self) -> _Made:
        """What was made; raises what making it raised."""
        if self._made is None:
            self._made = self._start()
        return await asyncio.shield(self._made)

    def close(self) -> None:
        """Let it go; those who still wait for it are refused."""
        made, self._made = self._made, None
        if made is None:
            return
        if not made.done():
            made.set_exception(ServerStopped())
        elif made.exception() is None:
            self._drop(made.result())

    def forget(self, made: _Made) -> bool:
        """Have it made anew for the next who asks, if this is what there is; says whether it was."""
        held = self._made
        if held is None or not held.done() or held.exception() is not None or held.result() is not made:
            return False
        self.close()
        return True

    def _start(self) -> asyncio.Future[_Made]:
        loop = asyncio.get_running_loop()
        made: asyncio.Future[_Made] = loop.create_future()
        made.add_done_callback(self._forget_failure)

        def report(outcome: Callable[[Any], None], value: Any) -> None:  # noqa: ANN401 - what was made, or an error
            def settle() -> None:
                if not made.done():
                    outcome(value)
                elif not isinstance(value, Exception):  # this was closed meanwhile
                    self._drop(value)

            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(settle)

        def work() -> None:
            try:
                with gc_paused():
                    value = self._make()
            except Exception as error:  # noqa: BLE001 - raised again where it is awaited
                report(made.set_exception, error)
            else:
                report(made.set_result, value)

        _Maker(target=work, name=self._name, daemon=True).start()
        return made

    def _forget_failure(self, made: asyncio.Future[_Made]) -> None:
        """What failed may be a network or a disk: whoever asks next tries again."""
        if made.exception() is not None and self._made is made:
            self._made = None

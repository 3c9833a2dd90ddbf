"""A single-flight lazy value: computed on first use, once for all waiters, on a daemon thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from embeddings_mcp.errors import ServerStopped
from embeddings_mcp.gc_pause import gc_paused

_Value = TypeVar("_Value")


class _FactoryThread(threading.Thread):
    """A thread that runs a factory; a class of its own so that `is_factory_running` recognizes it."""


def is_factory_running() -> bool:
    """Whether the factory of any `AsyncLazy` is running in this process."""
    return any(isinstance(thread, _FactoryThread) for thread in threading.enumerate())


class AsyncLazy(Generic[_Value]):
    """A value that is computed on first use, once for all waiters.

    The factory runs on a daemon thread, so that neither a download nor a disk that hangs can hold up shutdown.
    Cancelling one waiter does not affect the others.

    Args:
        name: name of the thread.
        factory: computes the value.
        dispose: called with the value once it is no longer needed.
    """

    def __init__(
        self, name: str, factory: Callable[[], _Value], *, dispose: Callable[[_Value], object] = lambda _value: None
    ) -> None:
        self._name = name
        self._factory = factory
        self._dispose = dispose
        self._future: asyncio.Future[_Value] | None = None

    async def get(self) -> _Value:
        """Return the value, computing it if necessary; raises what the factory raised.

        A failure is not kept, since a network or a disk may have caused it: the next call tries again.
        """
        if self._future is None:
            self._future = self._start()
        return await asyncio.shield(self._future)

    def close(self) -> None:
        """Dispose of the value; callers that still wait for it get `ServerStopped`."""
        future, self._future = self._future, None
        if future is None:
            return
        if not future.done():
            future.set_exception(ServerStopped())
        elif future.exception() is None:
            self._dispose(future.result())

    def invalidate(self, value: _Value) -> bool:
        """Dispose of `value` if it is current, so that the next `get` computes another; return whether it was."""
        future = self._future
        if future is None or not future.done() or future.exception() is not None or future.result() is not value:
            return False
        self.close()
        return True

    def _start(self) -> asyncio.Future[_Value]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Value] = loop.create_future()
        future.add_done_callback(self._discard_failure)

        def report(settle: Callable[[Any], None], outcome: Any) -> None:  # noqa: ANN401 - the value, or an exception
            def settle_or_dispose() -> None:
                if not future.done():
                    settle(outcome)
                elif not isinstance(outcome, Exception):  # closed in the meantime
                    self._dispose(outcome)

            with contextlib.suppress(RuntimeError):  # the event loop has closed in the meantime
                loop.call_soon_threadsafe(settle_or_dispose)

        def run_factory() -> None:
            try:
                with gc_paused():
                    value = self._factory()
            except Exception as error:  # noqa: BLE001 - raised again where it is awaited
                report(future.set_exception, error)
            else:
                report(future.set_result, value)

        _FactoryThread(target=run_factory, name=self._name, daemon=True).start()
        return future

    def _discard_failure(self, future: asyncio.Future[_Value]) -> None:
        if future.exception() is not None and self._future is future:
            self._future = None

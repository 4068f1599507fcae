"""A waiter that is right on every event loop, through AnyIO's own waits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import anyio

from ._waiting import READ, Signal, SocketWaiter, wait_socket

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


class _EventSignal(Signal):
    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = anyio.Event()

    def __await__(self) -> Generator[Any, Any, None]:
        return self._event.wait().__await__()

    def set(self) -> None:
        self._event.set()


class AnyioWaiter(SocketWaiter):
    """Registers the socket anew for each wait."""

    __slots__ = ("_closed", "_idle_scope", "_operation_left", "_wait_scope", "_watcher_left")

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._closed = False
        self._wait_scope: anyio.CancelScope | None = None
        self._idle_scope: anyio.CancelScope | None = None
        self._operation_left = anyio.Event()
        self._watcher_left = anyio.Event()

    async def wait(self, interest: int) -> int:
        """Wait until the socket is ready for some of ``interest``; see `SocketWaiter.wait`."""
        if self._closed:
            raise anyio.ClosedResourceError
        if self._wait_scope is not None:
            raise anyio.BusyResourceError("waiting for")
        ready = 0
        self._operation_left = anyio.Event()
        with anyio.CancelScope() as scope:
            self._wait_scope = scope
            try:
                if self._idle_scope is not None:
                    # AnyIO lets one task wait for a socket: the watcher has to have left.
                    self._idle_scope.cancel()
                    await self._watcher_left.wait()
                ready = await wait_socket(self.fd, interest)
            finally:
                self._wait_scope = None
                self._operation_left.set()
        if self._closed:
            raise anyio.ClosedResourceError
        return ready

    async def wait_idle(self) -> bool:
        """Wait for readability, giving way to `wait`; see `SocketWaiter.wait_idle`."""
        if self._closed:
            raise anyio.ClosedResourceError
        if self._wait_scope is not None:
            await self._operation_left.wait()
            return False
        ready = 0
        self._watcher_left = anyio.Event()
        with anyio.CancelScope() as scope:
            self._idle_scope = scope
            try:
                ready = await wait_socket(self.fd, READ)
            finally:
                self._idle_scope = None
                self._watcher_left.set()
        if self._closed:
            raise anyio.ClosedResourceError
        return bool(ready)

    async def serve(self, on_readable: Callable[[], None]) -> NoReturn:
        """Call ``on_readable`` whenever the socket is readable; see `SocketWaiter.serve`."""
        while True:
            await self.wait(READ)
            on_readable()

    def create_signal(self) -> Signal:
        """Return a new signal."""
        return _EventSignal()

    def close(self) -> None:
        """Forget the socket, waking whoever waits."""
        if self._closed:
            return
        self._closed = True
        # Cancelled scopes rather than anyio.notify_closing(): that one is keyed by number, and
        # wakes with an error that asyncio's and trio's backends time differently.
        for scope in (self._wait_scope, self._idle_scope):
            if scope is not None:
                scope.cancel()

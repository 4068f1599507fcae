"""A waiter that is right on every event loop, through AnyIO's own waits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from ._waiting import READ, SocketWaiter, wait_socket

if TYPE_CHECKING:
    from collections.abc import Awaitable


class AnyioWaiter(SocketWaiter):
    """Registers the socket for each wait; slower than the waiters of one event loop."""

    __slots__ = ("_closed", "_idle_scope", "_wait_scope")

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._closed = False
        self._wait_scope: anyio.CancelScope | None = None
        self._idle_scope: anyio.CancelScope | None = None

    async def wait(self, interest: int) -> int:
        """Wait until the socket is ready for some of ``interest``; see `SocketWaiter.wait`."""
        if self._closed:
            raise anyio.ClosedResourceError
        if self._wait_scope is not None:
            raise anyio.BusyResourceError("waiting on")
        if self._idle_scope is not None:
            # AnyIO lets one task wait for a socket; the watcher leaves when it is resumed.
            await self._yield_of_watcher()
        with anyio.CancelScope() as self._wait_scope:
            try:
                return await self._watching_close(wait_socket(self.fd, interest))
            finally:
                self._wait_scope = None
        raise anyio.ClosedResourceError

    async def wait_idle(self) -> bool:
        """Wait for readability, giving way to `wait`; see `SocketWaiter.wait_idle`."""
        if self._closed:
            raise anyio.ClosedResourceError
        with anyio.CancelScope() as self._idle_scope:
            try:
                await self._watching_close(wait_socket(self.fd, READ))
            finally:
                self._idle_scope = None
            return True
        if self._closed:
            raise anyio.ClosedResourceError
        return False

    def close(self) -> None:
        """Forget the socket, waking whoever waits."""
        if self._closed:
            return
        self._closed = True
        for scope in (self._wait_scope, self._idle_scope):
            if scope is not None:
                scope.cancel()
        anyio.notify_closing(self.fd)

    async def _yield_of_watcher(self) -> None:
        while self._idle_scope is not None:
            self._idle_scope.cancel()
            await anyio.lowlevel.checkpoint()

    async def _watching_close(self, waiting: Awaitable[int]) -> int:
        return await waiting

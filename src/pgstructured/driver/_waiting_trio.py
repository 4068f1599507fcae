"""Waiting on trio, straight on its low-level calls."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

import anyio
import trio

from ._waiting import READ, WRITE, Signal, SocketWaiter, poll_now

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator


class _TaskSignal(Signal):
    """Parks and reschedules a task without a lot or an event between."""

    __slots__ = ("_is_set", "_task")

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None
        self._is_set = False

    def __await__(self) -> Generator[Any, Any, None]:
        if self._is_set:
            return
        self._task = trio.lowlevel.current_task()
        yield from trio.lowlevel.wait_task_rescheduled(self._leave).__await__()  # noqa: ASYNC105 - it is

    def _leave(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED

    def set(self) -> None:
        self._is_set = True
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task)


class TrioWaiter(SocketWaiter):
    """Waits with `trio.lowlevel`; errors are AnyIO's."""

    __slots__ = ("_closed", "_idle_scope", "_is_waiting", "_operation_left")

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.checkpoint_if_cancelled = trio.lowlevel.checkpoint_if_cancelled
        self.now = trio.lowlevel.current_clock().current_time
        self._closed = False
        self._is_waiting = False
        self._idle_scope: trio.CancelScope | None = None
        self._operation_left: trio.Event | None = None

    async def wait(self, interest: int) -> int:
        """Wait until the socket is ready for some of ``interest``; see `SocketWaiter.wait`."""
        if self._closed:
            raise anyio.ClosedResourceError
        if self._is_waiting:
            raise anyio.BusyResourceError("waiting for")
        if self._idle_scope is not None:
            # Trio withdraws the watcher's registration before cancel() returns.
            self._idle_scope.cancel()
        self._is_waiting = True
        try:
            if interest == READ:
                await trio.lowlevel.wait_readable(self.fd)
                return READ
            if interest == WRITE:
                await trio.lowlevel.wait_writable(self.fd)
                return WRITE
            return await self._wait_either()
        except trio.ClosedResourceError:
            raise anyio.ClosedResourceError from None
        finally:
            self._is_waiting = False
            if self._operation_left is not None:
                self._operation_left.set()
                self._operation_left = None

    async def _wait_either(self) -> int:
        # Nearly always the socket is writable, and one poll saves two tasks.
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise anyio.ClosedResourceError
        ready = poll_now(self.fd, READ | WRITE)
        if ready:
            return ready

        async def wait_then_stop(
            wait: Callable[[int], Awaitable[None]], readiness: int, nursery: trio.Nursery
        ) -> None:
            nonlocal ready
            if not self._closed:  # else the number may be another socket's by now
                with suppress(trio.ClosedResourceError):  # told below, once
                    await wait(self.fd)
                    ready |= readiness
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_then_stop, trio.lowlevel.wait_readable, READ, nursery)
            nursery.start_soon(wait_then_stop, trio.lowlevel.wait_writable, WRITE, nursery)
        if self._closed:
            raise anyio.ClosedResourceError
        return ready

    async def wait_idle(self) -> bool:
        """Wait for readability, giving way to `wait`; see `SocketWaiter.wait_idle`."""
        if self._closed:
            raise anyio.ClosedResourceError
        if self._is_waiting:
            self._operation_left = trio.Event()
            await self._operation_left.wait()
            return False
        readable = False
        scope = self._idle_scope = trio.CancelScope()
        try:
            with scope:
                await trio.lowlevel.wait_readable(self.fd)
                readable = True
        except trio.ClosedResourceError:
            raise anyio.ClosedResourceError from None
        finally:
            self._idle_scope = None
        return readable

    async def serve(self, on_readable: Callable[[], None]) -> NoReturn:
        """Call ``on_readable`` whenever the socket is readable; see `SocketWaiter.serve`."""
        if self._closed:
            raise anyio.ClosedResourceError
        if self._is_waiting:
            raise anyio.BusyResourceError("waiting for")
        self._is_waiting = True
        wait_readable, fd = trio.lowlevel.wait_readable, self.fd
        try:
            while not self._closed:
                await wait_readable(fd)
                on_readable()
        except trio.ClosedResourceError:
            pass  # told below, as AnyIO's
        finally:
            self._is_waiting = False
        raise anyio.ClosedResourceError

    def create_signal(self) -> Signal:
        """Return a new signal."""
        return _TaskSignal()

    def close(self) -> None:
        """Forget the socket, waking whoever waits."""
        if self._closed:
            return
        self._closed = True
        if trio.lowlevel.in_trio_run():  # pragma: no branch - a connection forgotten until exit
            trio.lowlevel.notify_closing(self.fd)

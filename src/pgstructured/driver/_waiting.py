"""Waiting until a socket is ready: the one place that knows about event loops.

A `SocketWaiter` belongs to one connected socket and is chosen once, when the
connection is made:

=====================  ======================================================
event loop             waiter
=====================  ======================================================
asyncio, uvloop        `_waiting_asyncio`: persistent registration, direct step
trio                   `_waiting_trio`: `trio.lowlevel`
anything else          `AnyioWaiter`: `anyio.wait_readable`, right everywhere
=====================  ======================================================

While a connection is being made libpq changes sockets under us; there
`wait_socket` waits once, without any registration that could go stale.
"""

from __future__ import annotations

import select
import sys
import time
from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

import anyio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Sequence

    from ._gathering import Gathering

READ: Final = 1
"""Interest in, or readiness for, reading; the same number as psycopg's ``WAIT_R``."""
WRITE: Final = 2
"""Interest in, or readiness for, writing; the same number as psycopg's ``WAIT_W``."""


class Signal(ABC):
    """A one-time event for one waiting task; cheaper than `anyio.Event`."""

    __slots__ = ()

    @property
    def is_checkpoint(self) -> bool:
        """Whether waiting for it now would first notice a cancellation that is pending."""
        return False

    @abstractmethod
    def __await__(self) -> Generator[Any, Any, None]:
        """Wait until `set` is called; as `wait`, without a coroutine around it."""

    async def wait(self) -> None:
        """Wait until `set` is called.

        Cancellation:
            A checkpoint unless it is set already. A wait that was cancelled may be repeated.
        """
        await self

    @abstractmethod
    def set(self) -> None:
        """Wake the task; from a task or from a callback of `SocketWaiter.serve`."""


class SocketWaiter(ABC):
    """Waits until one socket is ready; one task at a time, and one idle watcher beside it."""

    __slots__ = ("__weakref__", "checkpoint_if_cancelled", "fd", "now")

    def __init__(self, fd: int) -> None:
        self.fd: Final = fd
        """Number of the socket waited for."""
        backend = anyio.lowlevel.current_token().backend_class
        self.checkpoint_if_cancelled: Callable[[], Awaitable[None]]
        """What `anyio.lowlevel.checkpoint_if_cancelled` comes to on this event loop."""
        self.checkpoint_if_cancelled = backend.checkpoint_if_cancelled
        self.now: Callable[[], float] = backend.current_time
        """Returns what `anyio.current_time` does; on the known loops faster, and also outside
        of tasks."""

    @abstractmethod
    async def wait(self, interest: int) -> int:
        """Wait until the socket is ready for some of ``interest``.

        Args:
            interest: `READ`, `WRITE` or both.

        Returns:
            What it is ready for, at least one of ``interest``.

        Raises:
            anyio.ClosedResourceError: if `close` was called, before or meanwhile.
            anyio.BusyResourceError: if another task waits already.

        Cancellation:
            A cancelled call leaves nothing registered that could wake anybody.
        """

    @abstractmethod
    async def wait_idle(self) -> bool:
        """Wait for readability, giving way to `wait`.

        Returns:
            True once the socket is readable while no task is in `wait`; False if the watcher
            had to give way to an operation, and may come back.

        Raises:
            anyio.ClosedResourceError: if `close` was called, before or meanwhile.
        """

    @abstractmethod
    async def serve(self, on_readable: Callable[[], None]) -> None:
        """Call ``on_readable`` whenever the socket is readable, until `close`.

        Takes the place of a task in `wait`. On asyncio the calls come straight from the
        event loop, outside of any task; AnyIO's synchronous functions work there too. On trio
        they come from this task or from one that waits for a `Signal`.

        Raises:
            anyio.ClosedResourceError: once `close` was called.
            Exception: what ``on_readable`` raises.

        Cancellation:
            A checkpoint; no calls come after it.
        """

    @abstractmethod
    def create_signal(self) -> Signal:
        """Return a new signal."""

    def set_all(self, signals: Sequence[Signal], gathering: Gathering) -> None:  # noqa: ARG002 - for loops that run tasks at once
        """Set signals of this waiter's; from a callback of `serve`, or from a task.

        What the tasks send to the socket as soon as they run goes out in one go, where that
        can be had.

        Args:
            signals: What to set.
            gathering: What gathers, meanwhile, what can go as one command.
        """
        for signal in signals:
            signal.set()

    @abstractmethod
    def close(self) -> None:
        """Forget the socket, waking whoever waits; call before the descriptor is closed.

        Idempotent. The order matters: a number that is closed first can belong to
        another connection by the time it is deregistered.
        """


def poll_now(fd: int, interest: int) -> int:
    """Return at once what of ``interest`` the socket ``fd`` is ready for; 0 for nothing."""
    poller = select.poll()
    events = (select.POLLIN if interest & READ else 0) | (select.POLLOUT if interest & WRITE else 0)
    poller.register(fd, events)
    ready = 0
    for _, event in poller.poll(0):
        if event & (select.POLLIN | select.POLLERR | select.POLLHUP):
            ready |= READ
        if event & (select.POLLOUT | select.POLLERR | select.POLLHUP):
            ready |= WRITE
    return ready & interest


async def wait_socket(fd: int, interest: int) -> int:
    """Wait once until the socket ``fd`` is ready for some of ``interest``.

    Correct on every backend, for any descriptor, with nothing left registered.

    Returns:
        What it is ready for.
    """
    if interest == READ:
        await anyio.wait_readable(fd)
        return READ
    if interest == WRITE:
        await anyio.wait_writable(fd)
        return WRITE
    if ready := poll_now(fd, interest):
        await anyio.lowlevel.checkpoint()
        return ready
    async with anyio.create_task_group() as tasks:

        async def wait_then_stop(wait: Callable[[int], Awaitable[None]], readiness: int) -> None:
            nonlocal ready
            await anyio.lowlevel.checkpoint_if_cancelled()  # the socket may be closed by now
            await wait(fd)
            ready |= readiness
            tasks.cancel_scope.cancel()

        tasks.start_soon(wait_then_stop, anyio.wait_readable, READ)
        tasks.start_soon(wait_then_stop, anyio.wait_writable, WRITE)
    return ready


def current_task_id() -> int:
    """Return what tells the current task from all others that live.

    As the ``id`` of `anyio.get_current_task`, several times cheaper.
    """
    trio: Any = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_task():
        return id(trio.lowlevel.current_task())
    asyncio: Any = sys.modules.get("asyncio")
    # Private, and the one question of the kind that doesn't raise; as `create_waiter` asks.
    if asyncio is not None and asyncio._get_running_loop() is not None:  # noqa: SLF001
        return id(asyncio.current_task())
    return anyio.get_current_task().id


@final
class EventLoop(NamedTuple):
    """What is asked of the running event loop so often that finding it each time costs."""

    now: Callable[[], float]
    """Returns what `anyio.current_time` does."""
    task_id: Callable[[], int]
    """Returns what `current_task_id` does, in its tasks."""
    create_scope: Callable[[], anyio.CancelScope]
    """Returns a new cancel scope."""
    task: Callable[[], object]
    """Returns the current task itself, to be told from others also once it has ended."""


def running_event_loop() -> EventLoop:
    """Return the shortest ways to what AnyIO would say of the running event loop."""
    trio: Any = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_task():
        current_task = trio.lowlevel.current_task
        return EventLoop(
            trio.lowlevel.current_clock().current_time,
            lambda: id(current_task()),
            trio.CancelScope,  # what AnyIO's would wrap
            current_task,
        )
    asyncio: Any = sys.modules.get("asyncio")
    if asyncio is not None and asyncio._get_running_loop() is not None:  # noqa: SLF001
        loop, current_task = asyncio.get_running_loop(), asyncio.current_task
        scope_type = type(anyio.CancelScope())
        return EventLoop(
            asyncio_clock(loop),
            lambda: id(current_task(loop)),
            scope_type,
            partial(current_task, loop),
        )
    return EventLoop(anyio.current_time, current_task_id, anyio.CancelScope, current_task_id)


def asyncio_clock(loop: Any) -> Callable[[], float]:
    """Return what an asyncio event loop's ``time`` comes to."""
    clock: Callable[[], float] = loop.time
    asyncio: Any = sys.modules["asyncio"]
    is_stock = getattr(clock, "__func__", None) is asyncio.BaseEventLoop.time
    return time.monotonic if is_stock else clock


def create_waiter(fd: int) -> SocketWaiter:
    """Return the best waiter for the socket ``fd`` on the running event loop.

    Looks only at event loops that are imported already, so that neither asyncio nor
    trio is needed to run on the other.
    """
    trio: Any = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_task():
        from ._waiting_trio import TrioWaiter  # noqa: PLC0415 - trio is running

        return TrioWaiter(fd)
    asyncio: Any = sys.modules.get("asyncio")
    if asyncio is not None and sys.platform != "win32" and asyncio._get_running_loop() is not None:  # noqa: SLF001
        from ._waiting_asyncio import AsyncioWaiter  # noqa: PLC0415 - asyncio is running

        return AsyncioWaiter(fd)
    from ._waiting_anyio import AnyioWaiter  # noqa: PLC0415 - no other is of use here

    return AnyioWaiter(fd)

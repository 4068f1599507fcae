"""Waiting on trio, straight on its low-level calls.

A task that reads what another waits for costs two turns of the loop: one for the
reader, one for the task that it wakes. So the task that waits reads for itself,
as the deputy of the one that serves, and that one sleeps on:

====================  =============================  =========================
a `Signal` is         the task in ``serve``          whoever waits for it
====================  =============================  =========================
not waited for        reads                          -
waited for            is muted                       reads, until it is set
waited for by others  is muted                       sleeps, as ever
====================  =============================  =========================
"""

from __future__ import annotations

import select
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NoReturn

import anyio
import trio

from ._corking import hold, let_go
from ._waiting import READ, WRITE, Signal, SocketWaiter, poll_now

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Sequence

    from ._gathering import Gathering

_HAS_EPOLL: Final = hasattr(select, "epoll")
_MANY: Final = 4
"""Tasks that are worth two turns of the loop to have their output go out in one go."""


class _TaskSignal(Signal):
    """Parks and reschedules a task without a lot or an event between."""

    __slots__ = ("_task", "_waiter", "is_set")

    def __init__(self, waiter: TrioWaiter) -> None:
        self._waiter = waiter
        self._task: trio.lowlevel.Task | None = None
        self.is_set = False

    @property
    def is_checkpoint(self) -> bool:
        """Whether it has to be waited for: Trio looks when a task goes to sleep."""
        return not self.is_set

    def __await__(self) -> Generator[Any, Any, None]:
        if self.is_set:
            return
        service = self._waiter.service
        if service is not None and service.deputy is None:
            is_answered = yield from service.read_until(self).__await__()
            if is_answered:
                return
        self._task = trio.lowlevel.current_task()
        yield from trio.lowlevel.wait_task_rescheduled(self._leave).__await__()  # noqa: ASYNC105 - as good as awaited

    def _leave(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED

    def set(self) -> None:
        self.is_set = True
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task)
        elif (service := self._waiter.service) is not None and service.deputy is self:
            service.relieve()


class _Service:
    """One call of `TrioWaiter.serve`, with a deputy that reads in its place at times.

    Trio lets one task wait for a descriptor, and moving tasks in and out of that wait costs
    what is to be saved. So each of the two has an epoll of its own, which holds the socket and
    is readable when the socket is: one can be muted, and woken, without the other. (Both
    forget the socket by themselves when it is closed.)
    """

    __slots__ = (
        "_deputys",
        "_failure",
        "_fd",
        "_gathering",
        "_is_held",
        "_is_reading",
        "_on_readable",
        "_own",
        "_waiter",
        "deputy",
        "is_over",
    )

    def __init__(self, waiter: TrioWaiter, on_readable: Callable[[], None]) -> None:
        self._waiter = waiter
        self._fd = fd = waiter.fd
        self._on_readable = on_readable
        self._own, self._deputys = select.epoll(), select.epoll()
        self._own.register(fd, select.EPOLLIN)
        self._deputys.register(fd, select.EPOLLIN)
        self.deputy: _TaskSignal | None = None
        """What the deputy waits for; None while there is none, or while it reads."""
        self._failure: BaseException | None = None
        self._is_reading = False
        self._is_held = False
        self._gathering: Gathering | None = None
        self.is_over = False

    async def run(self) -> None:
        """Call ``on_readable`` until `end`; raises what a call has raised, the deputy's too."""
        fd = self._own.fileno()
        try:
            while not self.is_over:
                await trio.lowlevel.wait_readable(fd)
                if not self.is_over:
                    self._read()
                    await self._let_go()
        except trio.ClosedResourceError:
            pass  # over
        finally:
            self.end()
            self._own.close()
            self._deputys.close()
        if self._failure is not None:
            raise self._failure

    async def read_until(self, signal: _TaskSignal) -> bool:
        """Call ``on_readable`` as the deputy until ``signal`` is set; False if it ends first."""
        fd = self._deputys.fileno()
        self._own.modify(self._fd, 0)
        try:
            while not (signal.is_set or self.is_over):
                self.deputy = signal
                await trio.lowlevel.wait_readable(fd)
                self.deputy = None
                if not self.is_over:
                    self._read_for_other()
                    if self._gathering is not None:
                        self.deputy = signal  # nobody else takes over meanwhile
                        await self._let_go()
        except trio.ClosedResourceError:
            pass  # relieved, or over
        finally:
            self.deputy = None
            if not self.is_over:
                self._own.modify(self._fd, select.EPOLLIN)
        return signal.is_set

    def hold(self, signals: Sequence[Signal], gathering: Gathering) -> None:
        """Hold output back, while what has been read is handed out, until others have run."""
        if self._is_reading and self._gathering is None and len(signals) >= _MANY:
            self._is_held = hold(self._fd)
            self._gathering = gathering
            gathering.begin()

    async def _let_go(self) -> None:
        """Send what was held back, once every task has run that was woken before."""
        gathering = self._gathering
        if gathering is None:
            return
        try:
            # Trio runs the tasks of a turn in any order: another one, and all of them have run.
            await trio.lowlevel.cancel_shielded_checkpoint()
            await trio.lowlevel.cancel_shielded_checkpoint()
        finally:
            if self._gathering is not None:  # it may read at the same time as its deputy
                self._gathering = None
                gathering.end()
                is_held, self._is_held = self._is_held, False
                if is_held and not self._waiter.is_closed:
                    let_go(self._fd)

    def _read(self) -> None:
        self._is_reading = True
        try:
            self._on_readable()
        finally:
            self._is_reading = False

    def _read_for_other(self) -> None:
        try:
            self._read()
        except BaseException as exc:  # noqa: ASYNC103, BLE001 - raised in the task that serves
            self._failure = exc
            self.end()

    def relieve(self) -> None:
        """Wake the deputy: its signal was set, by somebody else who read."""
        trio.lowlevel.notify_closing(self._deputys.fileno())

    def end(self) -> None:
        """Wake both tasks, for good; idempotent."""
        if not self.is_over:
            self.is_over = True
            trio.lowlevel.notify_closing(self._own.fileno())
            trio.lowlevel.notify_closing(self._deputys.fileno())


class TrioWaiter(SocketWaiter):
    """Waits with `trio.lowlevel`; errors are AnyIO's."""

    __slots__ = ("_idle_scope", "_is_waiting", "_operation_left", "is_closed", "service")

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.checkpoint_if_cancelled = trio.lowlevel.checkpoint_if_cancelled
        self.now = trio.lowlevel.current_clock().current_time
        self.is_closed = False
        self._is_waiting = False
        self._idle_scope: trio.CancelScope | None = None
        self._operation_left: trio.Event | None = None
        self.service: _Service | None = None

    async def wait(self, interest: int) -> int:
        """Wait until the socket is ready for some of ``interest``; see `SocketWaiter.wait`."""
        if self.is_closed:
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
        if self.is_closed:
            raise anyio.ClosedResourceError
        ready = poll_now(self.fd, READ | WRITE)
        if ready:
            return ready

        async def wait_then_stop(
            wait: Callable[[int], Awaitable[None]], readiness: int, nursery: trio.Nursery
        ) -> None:
            nonlocal ready
            if not self.is_closed:  # else the number may be another socket's by now
                with suppress(trio.ClosedResourceError):  # told below, once
                    await wait(self.fd)
                    ready |= readiness
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_then_stop, trio.lowlevel.wait_readable, READ, nursery)
            nursery.start_soon(wait_then_stop, trio.lowlevel.wait_writable, WRITE, nursery)
        if self.is_closed:
            raise anyio.ClosedResourceError
        return ready

    async def wait_idle(self) -> bool:
        """Wait for readability, giving way to `wait`; see `SocketWaiter.wait_idle`."""
        if self.is_closed:
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
        if self.is_closed:
            raise anyio.ClosedResourceError
        if self._is_waiting:
            raise anyio.BusyResourceError("waiting for")
        self._is_waiting = True
        try:
            if _HAS_EPOLL:
                service = self.service = _Service(self, on_readable)
                await service.run()
            else:
                await self._serve_alone(on_readable)
        finally:
            self._is_waiting = False
            self.service = None
        raise anyio.ClosedResourceError

    async def _serve_alone(self, on_readable: Callable[[], None]) -> None:
        with suppress(trio.ClosedResourceError):  # told as AnyIO's
            while not self.is_closed:
                await trio.lowlevel.wait_readable(self.fd)
                on_readable()

    def create_signal(self) -> Signal:
        """Return a new signal."""
        return _TaskSignal(self)

    def set_all(self, signals: Sequence[Signal], gathering: Gathering) -> None:
        """Set signals; see `SocketWaiter.set_all`."""
        if self.service is not None:
            self.service.hold(signals, gathering)
        super().set_all(signals, gathering)

    def close(self) -> None:
        """Forget the socket, waking whoever waits."""
        if self.is_closed:
            return
        self.is_closed = True
        if trio.lowlevel.in_trio_run():  # pragma: no branch - a connection forgotten until exit
            trio.lowlevel.notify_closing(self.fd)
            service, self.service = self.service, None
            if service is not None:
                service.end()

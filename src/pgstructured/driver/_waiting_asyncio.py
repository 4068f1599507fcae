"""Waiting on asyncio and uvloop: a persistent registration and a direct step.

Two things make it cheap. The descriptor stays registered between waits, so a
round trip costs no epoll_ctl. And the task is stepped straight from the
selector's callback, which saves one turn of the loop; because it reads the
data in that same turn, a persistent registration reports nothing stale.

===========  ==========================  =====================================
registered   somebody waits              the callback does
===========  ==========================  =====================================
yes          a task in ``wait``          steps that task
yes          only the watcher            steps the watcher
yes          nobody                      deregisters until the next wait
yes          ``serve`` is on             calls its function, and nothing else
===========  ==========================  =====================================
"""

from __future__ import annotations

import asyncio
import select
import sys
from contextlib import suppress
from contextvars import copy_context
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast
from weakref import WeakKeyDictionary

import anyio

from ._corking import hold, let_go
from ._waiting import READ, WRITE, Signal, SocketWaiter, asyncio_clock, poll_now

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from contextvars import Context

    from ._gathering import Gathering

_TURN_BUDGET: Final = 0.0002
"""Seconds that waits which needn't wait may take, together, before the loop gets its turn.
Measured: with 1 ms a ticker beside ten busy connections is 11 ms late, with 0.2 ms under 3."""

_AT_ONCE: Final = 64
"""Tasks whose output is held back until all of them have run."""


class _Parked:
    """An awaitable, one use, that steps its task at once when it is fired.

    Speaks the protocol that `asyncio.Task` asks of a future (``_asyncio_future_blocking``,
    ``get_loop``, ``add_done_callback``, ``cancel``, ``result``); what a real future would
    hand to ``call_soon`` is called right here.
    """

    __slots__ = (
        "_asyncio_future_blocking",
        "_callback",
        "_context",
        "_done",
        "_error",
        "_loop",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._asyncio_future_blocking = False
        self._callback: Callable[[Any], object] | None = None
        self._context: Context | None = None
        self._error: BaseException | None = None
        self._done = False

    def fire(self) -> None:
        """Step the waiting task now; only from a callback of the loop, outside of tasks."""
        if self._done:
            return
        self._done = True
        if self._callback is not None and self._context is not None:  # pragma: no branch - types
            self._context.run(self._callback, self)

    def finish(self) -> None:
        """Let the waiting task go on at the loop's next turn; from anywhere."""
        if not self._done:
            self._done = True
            if self._callback is not None:  # pragma: no branch - set once it is awaited
                self._loop.call_soon(self._callback, self, context=self._context)

    def fail(self, error: BaseException) -> None:
        """Raise ``error`` in the waiting task, at the loop's next turn."""
        if not self._done:
            self._done = True
            self._error = error
            if self._callback is not None:  # pragma: no branch - set once it is awaited
                self._loop.call_soon(self._callback, self, context=self._context)

    # -------------------------------------- what asyncio.Task and AnyIO call

    def done(self) -> bool:
        return self._done

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def add_done_callback(
        self, callback: Callable[[Any], object], *, context: Context | None = None
    ) -> None:
        self._callback = callback
        self._context = context

    def cancel(self, msg: Any = None) -> bool:
        if self._done:
            return False
        self.fail(asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg))
        return True

    def result(self) -> None:
        if self._error is not None:
            raise self._error


class _ParkedWait(_Parked):
    """A task in a `SocketWaiter`'s wait."""

    __slots__ = ("interest", "ready")

    def __init__(self, loop: asyncio.AbstractEventLoop, interest: int) -> None:
        super().__init__(loop)
        self.interest = interest
        self.ready = 0

    def __await__(self) -> Generator[_Parked, None, int]:
        self._asyncio_future_blocking = True
        yield self
        self.result()
        return self.ready


class _ParkedSignal(_Parked, Signal):
    """Steps the waiting task at once where that can be done: outside of any other task."""

    __slots__ = ("_is_set",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        _Parked.__init__(self, loop)  # made on every round trip, and cheapest so
        self._is_set = False

    @property
    def is_checkpoint(self) -> bool:
        """On asyncio's own loops, which run what is pending before what sockets have brought."""
        return not self._is_set and isinstance(self._loop, asyncio.BaseEventLoop)

    def __await__(self) -> Generator[_Parked, None, None]:
        if self._is_set:
            return
        if self._done:  # a wait before this one was cancelled
            self._done = False
            self._error = None
        self._asyncio_future_blocking = True
        yield self

    def set(self) -> None:
        if asyncio.current_task(self._loop) is not None:
            self.set_soon()
        else:
            self.set_now()

    def set_now(self) -> None:
        """Set it; only from a callback of the loop, outside of tasks."""
        self._is_set = True
        if self._callback is not None:
            self.fire()

    def set_soon(self) -> None:
        """Set it, and let the task go on at the loop's next turn; from anywhere."""
        self._is_set = True
        if self._callback is not None:
            self.finish()


class _TurnBudget:
    """Time that one loop's waiters may go on without giving the loop a turn."""

    __slots__ = ("__weakref__", "_deadline", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._deadline = 0.0

    def is_left(self) -> bool:
        now = perf_counter()
        if not self._deadline:
            self._deadline = now + _TURN_BUDGET
            self._loop.call_soon(self._renew)
            return True
        return now < self._deadline

    def _renew(self) -> None:
        self._deadline = 0.0


_budgets: WeakKeyDictionary[asyncio.AbstractEventLoop, _TurnBudget] = WeakKeyDictionary()


def _copy_context_for_callbacks() -> Context:
    """Return a context in which AnyIO knows its event loop although no task runs."""
    context = copy_context()
    sniffio: Any = sys.modules.get("sniffio")
    if sniffio is not None:  # pragma: no branch - it comes with trio, which the tests have
        context.run(sniffio.current_async_library_cvar.set, "asyncio")
    return context


class AsyncioWaiter(SocketWaiter):
    """See the module's text."""

    __slots__ = (
        "_budget",
        "_closed",
        "_idle",
        "_loop",
        "_poll",
        "_polls_first",
        "_reads",
        "_serves",
        "_task",
    )

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._loop = asyncio.get_running_loop()
        self.now = asyncio_clock(self._loop)
        budget = _budgets.get(self._loop)
        if budget is None:
            budget = _budgets[self._loop] = _TurnBudget(self._loop)
        self._budget = budget
        self._closed = False
        self._task: _ParkedWait | None = None
        self._idle: _ParkedWait | None = None
        self._reads = False
        # libuv drops a descriptor on POLLERR and tells nobody: on any loop but asyncio's
        # own a registration that looks alive may never fire again, so look before sleeping.
        self._polls_first = not isinstance(self._loop, asyncio.SelectorEventLoop)
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        self._poll = poller
        # A stale entry of an earlier descriptor of this number would swallow our first events.
        self._loop.remove_reader(fd)
        self._loop.remove_writer(fd)

    async def wait(self, interest: int) -> int:
        """Wait until the socket is ready for some of ``interest``; see `SocketWaiter.wait`."""
        if self._closed:
            raise anyio.ClosedResourceError
        if self._task is not None:
            raise anyio.BusyResourceError("waiting for")
        if (interest != READ or self._polls_first) and (ready := self._look(interest)):
            if self._budget.is_left():
                # Where there is always something to read nothing else would notice.
                await anyio.lowlevel.checkpoint_if_cancelled()
                return ready
            self._disarm()
        if interest & WRITE:
            return await self._wait_writable(interest)
        if not self._reads:
            self._arm()
        self._task = parked = _ParkedWait(self._loop, interest)
        try:
            return await parked
        finally:
            self._task = None

    async def _wait_writable(self, interest: int) -> int:
        if interest & READ:
            self._disarm()
            self._arm()
        self._task = parked = _ParkedWait(self._loop, interest)
        self._loop.add_writer(self.fd, self._on_writable)
        try:
            return await parked
        finally:
            self._task = None
            if not self._closed:
                self._loop.remove_writer(self.fd)
                if self._idle is not None and not self._reads:
                    self._arm()

    async def wait_idle(self) -> bool:
        """Wait for readability, giving way to `wait`; see `SocketWaiter.wait_idle`."""
        if self._closed:
            raise anyio.ClosedResourceError
        if self._polls_first and self._task is None and self._look(READ):
            self._disarm()
        if not self._reads:
            self._arm()
        self._idle = parked = _ParkedWait(self._loop, READ)
        try:
            await parked
        finally:
            self._idle = None
        return True

    async def serve(self, on_readable: Callable[[], None]) -> NoReturn:
        """Call ``on_readable`` whenever the socket is readable; see `SocketWaiter.serve`."""
        if self._closed:
            raise anyio.ClosedResourceError
        if self._task is not None:
            raise anyio.BusyResourceError("waiting for")
        self._task = parked = _ParkedWait(self._loop, READ)

        errors = select.poll()
        errors.register(self.fd, 0)

        def serve_once() -> None:
            try:
                on_readable()
            except (KeyboardInterrupt, SystemExit):
                raise  # the event loop's own
            except BaseException as exc:  # noqa: ASYNC103, BLE001 - raised in the task that serves
                parked.fail(exc)
            # One read need not have been all: data may stand before the error that made
            # libuv drop the descriptor. Only a new registration reports it once more.
            if self._polls_first and not self._closed and errors.poll(0):
                self._loop.remove_reader(self.fd)
                self._loop.add_reader(self.fd, serve_once)

        self._disarm()
        self._reads = True
        # The loop runs the callback in a copy of the context it was registered in.
        context = _copy_context_for_callbacks()
        context.run(self._loop.add_reader, self.fd, serve_once)
        try:
            await parked
        finally:
            self._task = None
            if not self._closed:
                self._disarm()
        raise anyio.ClosedResourceError  # pragma: no cover - for the types: it ends by an error

    def create_signal(self) -> Signal:
        """Return a new signal."""
        return _ParkedSignal(self._loop)

    def set_all(self, signals: Sequence[Signal], gathering: Gathering) -> None:
        """Set signals; see `SocketWaiter.set_all`."""
        mine = cast("Sequence[_ParkedSignal]", signals)
        if asyncio.current_task(self._loop) is not None:
            for signal in mine:
                signal.set_soon()
            return
        for first in range(0, len(mine), _AT_ONCE):
            # A task that blocks the loop must not keep back what many others have sent.
            is_held = not self._closed and hold(self.fd)
            gathering.begin()
            try:
                for signal in mine[first : first + _AT_ONCE]:
                    signal.set_now()
            finally:
                gathering.end()
                if is_held and not self._closed:
                    let_go(self.fd)

    def close(self) -> None:
        """Forget the socket, waking whoever waits."""
        if self._closed:
            return
        self._closed = True
        if not self._loop.is_closed():  # pragma: no branch - a connection forgotten until exit
            # libpq may have closed the descriptor itself, in this very step; then the
            # selector forgets it but says EBADF.
            with suppress(OSError):
                self._loop.remove_reader(self.fd)
            with suppress(OSError):
                self._loop.remove_writer(self.fd)
            for parked in (self._task, self._idle):
                if parked is not None:
                    parked.fail(anyio.ClosedResourceError())

    def _arm(self) -> None:
        self._reads = True
        self._loop.add_reader(self.fd, self._on_readable)

    def _disarm(self) -> None:
        if self._reads:
            self._reads = False
            self._loop.remove_reader(self.fd)

    def _on_readable(self) -> None:
        parked = self._task
        if parked is not None and parked.interest & READ:
            parked.ready = READ
            parked.fire()
        elif parked is None and self._idle is not None:
            self._idle.fire()
        else:
            self._disarm()

    def _on_writable(self) -> None:
        parked = self._task
        if parked is not None:  # pragma: no branch - registered only while a task waits
            parked.ready = WRITE
            parked.fire()

    def _look(self, interest: int) -> int:
        """Return what of ``interest`` the socket is ready for now."""
        if interest == READ:
            return READ if self._poll.poll(0) else 0
        return poll_now(self.fd, interest)

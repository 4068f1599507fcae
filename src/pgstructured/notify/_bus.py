"""The bus, as the program sees it: subscriptions, waiting, figures."""

from __future__ import annotations

import inspect
import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar, final, overload

import anyio

from pgstructured._util import NoPublicConstructor, create
from pgstructured.errors import ConnectionLostError
from pgstructured.observe import emit

from ._backlog import Backlog
from ._channels import collapse
from ._options import check_choice
from ._reconnects import Reconnects
from ._state import BusState, BusStatistics
from ._subscription import Subscription

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from anyio.abc import ObjectReceiveStream

    from ._backlog import Overflow
    from ._channels import Channel
    from ._events import Notification
    from ._link import Link
    from ._routes import Route
    from ._subscription import GapHandling

T = TypeVar("T")


@final
class NotifyBus(metaclass=NoPublicConstructor):
    """Notifications for any number of subscribers over one session; see `open_notify_bus`."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._routes = link.routes
        self._backlogs: dict[Backlog, None] = {}
        self._dispatched_before = 0
        """What subscriptions that are no more were given."""
        self._dropped_before = 0

    def __repr__(self) -> str:
        return f"<NotifyBus {self.state} generation={self.generation}>"

    @property
    def channels(self) -> frozenset[str]:
        """Names of the channels it listens to, or is about to."""
        return self._routes.names

    @property
    def generation(self) -> int:
        """How many times it has become live: 0 before the first connect, 1 after it."""
        return self._link.generation

    @property
    def state(self) -> BusState:
        """Where it is in its life."""
        return self._link.state

    @property
    def backend_pid(self) -> int | None:
        """Process id of its server session; None while it has none."""
        session = self._link.session
        return None if session is None else session.backend_pid

    # ------------------------------------------------------------ subscribing

    @overload
    def subscribe(
        self,
        *channels: str,
        buffer: int = ...,
        overflow: Overflow = ...,
        gaps: GapHandling = ...,
        initial_gap: bool = ...,
        where: Callable[[Notification[str]], bool] | None = ...,
    ) -> AbstractAsyncContextManager[Subscription[str]]: ...
    @overload
    def subscribe(
        self,
        *channels: Channel[T],
        buffer: int = ...,
        overflow: Overflow = ...,
        gaps: GapHandling = ...,
        initial_gap: bool = ...,
        where: Callable[[Notification[T]], bool] | None = ...,
    ) -> AbstractAsyncContextManager[Subscription[T]]: ...
    @overload
    def subscribe(
        self,
        *channels: str | Channel[Any],
        buffer: int = ...,
        overflow: Overflow = ...,
        gaps: GapHandling = ...,
        initial_gap: bool = ...,
        where: Callable[[Notification[Any]], bool] | None = ...,
    ) -> AbstractAsyncContextManager[Subscription[Any]]: ...
    def subscribe(
        self,
        *channels: str | Channel[Any],
        buffer: int = 256,
        overflow: Overflow = "drop_oldest",
        gaps: GapHandling = "yield",
        initial_gap: bool = False,
        where: Callable[[Notification[Any]], bool] | None = None,
    ) -> AbstractAsyncContextManager[Subscription[Any]]:
        """Receive the notifications of some channels for the length of a block.

        The block is entered once the server has confirmed every LISTEN: whatever is
        published from then on is in the stream, or a `Gap` is where it is missing. While the
        bus is down entering waits.

        Args:
            channels: Names, or `Channel` objects that decode; at least one. All come in one
                stream, in the order in which the server sent them.
            buffer: How many notifications may wait for the subscriber.
            overflow: What to do with one more: ``drop_oldest`` or ``drop_newest``, with a
                ``Gap("lagged")`` that counts them in their place; ``latest`` keeps nothing but
                the newest one; ``close`` ends the stream.
            gaps: ``yield`` puts gaps in the stream, ``raise`` raises `GapError` in their
                place, ``ignore`` leaves them out.
            initial_gap: Begin with a ``Gap("subscribed")``, so that one piece of code both
                starts and recovers.
            where: Tells which notifications this subscriber wants; others are not buffered and
                not lost. Called on arrival; must be quick.

        Yields:
            The stream.

        Raises:
            ValueError: if there is no channel, one is given twice to be decoded differently,
                or an option is out of its range.
            TypeError: if ``where`` is no function.
            ChannelNameError: if a name is impossible.
            ListenRejectedError: if the server refuses to listen to a channel.
            BusUnavailableError: if the bus has died, or does while this waits.
            anyio.ClosedResourceError: if the bus is closed, or gets closed while this waits.

        Cancellation:
            Entering is a checkpoint; a cancelled entry leaves nothing behind. Leaving is not
            one, and takes no time: UNLISTEN follows in the background.
        """
        chosen = collapse(channels)
        if not chosen:
            raise ValueError("subscribe to at least one channel")
        size: Any = buffer
        if not (isinstance(size, int) or size == math.inf) or size < 1:
            raise ValueError(f"buffer must be at least 1, a whole number or math.inf, not {size!r}")
        check_choice("overflow", overflow, ("drop_oldest", "drop_newest", "latest", "close"))
        check_choice("gaps", gaps, ("yield", "raise", "ignore"))
        tells: Any = where
        if tells is not None and (not callable(tells) or inspect.iscoroutinefunction(tells)):
            raise TypeError(f"where must be a function, and no async one, not {tells!r}")
        return self._subscribe(
            list(chosen.values()),
            buffer=buffer,
            overflow=overflow,
            gaps=gaps,
            initial_gap=initial_gap,
            where=where,
        )

    @asynccontextmanager
    async def _subscribe(
        self,
        channels: Sequence[Channel[Any]],
        *,
        buffer: int,
        overflow: Overflow,
        gaps: GapHandling,
        initial_gap: bool,
        where: Callable[[Notification[Any]], bool] | None,
    ) -> AsyncGenerator[Subscription[Any]]:
        await anyio.lowlevel.checkpoint()
        self._link.check_alive()
        names = frozenset(channel.name for channel in channels)

        def tell_lag(lost: int) -> None:
            emit("bus.lagged", channels=sorted(names), lost=lost, overflow=overflow)

        backlog = Backlog(
            buffer,
            overflow,
            keeps_marks=gaps != "ignore",
            on_lag=None if overflow == "latest" else tell_lag,  # there to lose is the point
        )
        subscription: Subscription[Any] = create(
            Subscription,
            backlog,
            channels=names,
            gaps=gaps,
            where=where,
        )
        # Before LISTEN is sent: its reply and a first notification may come in one read.
        routes = self._routes.hold(subscription, channels)
        self._backlogs[backlog] = None
        try:
            await self._wait_listening(routes)
            subscription._open(self.generation, initial_gap=initial_gap)  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
            yield subscription
        finally:
            self._routes.release(subscription, routes, anyio.current_time())
            del self._backlogs[backlog]
            self._dispatched_before += backlog.offered + backlog.forgotten
            self._dropped_before += backlog.lost + backlog.forgotten_lost
            subscription._close()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]

    async def _wait_listening(self, routes: Sequence[Route]) -> None:
        while True:
            self._link.check_alive()
            for route in routes:
                if route.error is not None:
                    raise route.rejection()
            missing = next((route for route in routes if route.state != "listening"), None)
            if missing is not None:
                await missing.wait()
                await self._link.let_cancel()
            elif self.state is not BusState.LIVE:
                await self._link.wait_changed()
            else:
                return

    @asynccontextmanager
    async def subscribe_reconnects(self) -> AsyncGenerator[ObjectReceiveStream[int]]:
        """Receive the number of each new generation for the length of a block.

        Only the newest one waits to be received: who is slow skips some.

        Yields:
            A stream of generations greater than the one at entry.

        Cancellation:
            Entering and leaving are checkpoints.
        """
        await anyio.lowlevel.checkpoint()
        async with Reconnects(self.wait_generation, self.generation) as stream:
            yield stream

    # ------------------------------------------------------------ waiting and looking

    async def wait_generation(self, after: int) -> int:
        """Wait until the generation is greater than ``after``, and return it.

        Raises:
            BusUnavailableError: if the bus has died, or does while this waits.
            anyio.ClosedResourceError: if the bus is closed, or gets closed while this waits.

        Cancellation:
            A checkpoint; nothing changes.
        """
        await anyio.lowlevel.checkpoint()
        while True:
            self._link.check_alive()
            if self.generation > after:
                return self.generation
            await self._link.wait_changed()

    async def wait_live(self) -> int:
        """Wait until the bus is live, and return its generation.

        Raises:
            BusUnavailableError: if the bus has died, or does while this waits.
            anyio.ClosedResourceError: if the bus is closed, or gets closed while this waits.

        Cancellation:
            A checkpoint; nothing changes.
        """
        await anyio.lowlevel.checkpoint()
        while True:
            self._link.check_alive()
            if self.state is BusState.LIVE:
                return self.generation
            await self._link.wait_changed()

    async def ping(self) -> float:
        """Make a round trip to the server.

        Returns:
            How long it took, in seconds.

        Raises:
            ConnectionLostError: if the bus is not live, or ceases to be meanwhile.
            BusUnavailableError: if the bus has died.
            anyio.ClosedResourceError: if the bus is closed, or gets closed meanwhile.

        Cancellation:
            A checkpoint; nothing changes.
        """
        await anyio.lowlevel.checkpoint_if_cancelled()
        self._link.check_alive()
        session = self._link.session
        if session is None:
            error = ConnectionLostError("the bus has no session at present; see wait_live()")
            raise error from self._link.supervision.last_error
        return await session.ping()

    def statistics(self) -> BusStatistics:
        """Return what the bus has done so far."""
        backlogs = self._backlogs
        link = self._link
        if link.session is not None:
            link.note_life(link.session)
        return BusStatistics(
            received=link.received,
            dispatched=self._dispatched_before + sum(b.offered + b.forgotten for b in backlogs),
            dropped=self._dropped_before + sum(b.lost + b.forgotten_lost for b in backlogs),
            reconnects=max(0, self.generation - 1),
            attempts=link.supervision.attempts,
            subscribers=len(backlogs),
            channels=len(self.channels),
            last_error=link.supervision.last_error,
            last_received_at=link.last_received_at,
            heartbeat_rtt=link.heartbeat_rtt,
        )

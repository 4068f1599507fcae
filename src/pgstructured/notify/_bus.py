"""The bus: one server session that feeds any number of subscribers.

==========  ============================================  =======================
state       what ends it                                  next
==========  ============================================  =======================
CONNECTING  every LISTEN confirmed, the probe come back   LIVE: generation 1
LIVE        the session is lost                           DOWN
DOWN        every LISTEN confirmed, the probe come back   LIVE: generation + 1
any         its scope is left, or it can't come back      CLOSED
==========  ============================================  =======================

Becoming live is one synchronous step: the new generation, a gap for every
subscriber, and only then notifications. What arrives before it is dropped: nobody
was promised it on a first connect, and later the gap covers it.

Nothing between the socket and a subscriber's buffer waits: a listener that stops
reading would fill the server's one queue for everybody (manual: NOTIFY, Notes).
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar, final, overload

import anyio
import psycopg

from pgstructured._util import NoPublicConstructor, create, open_background
from pgstructured.driver import open_session, resolve_conninfo
from pgstructured.errors import (
    BusUnavailableError,
    ConnectionLostError,
    ConninfoError,
    DeliveryError,
    ListenRejectedError,
    NotifyError,
    NotPrimaryError,
)
from pgstructured.observe import emit
from pgstructured.supervise import GaveUp, Supervision, supervise

from ._backlog import Backlog
from ._channels import collapse
from ._listening import Probe, keep_listening, listen_to_all
from ._options import check_choice, find_target
from ._reconnects import Reconnects
from ._routes import Routes
from ._state import BusState, BusStatistics
from ._subscription import Subscription

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from anyio.abc import ObjectReceiveStream

    from pgstructured.driver import Session

    from ._backlog import Overflow
    from ._channels import Channel
    from ._events import Notification, RawNotification
    from ._options import BusOptions
    from ._routes import Route
    from ._subscription import GapHandling

T = TypeVar("T")


@final
class NotifyBus(metaclass=NoPublicConstructor):
    """Notifications for any number of subscribers over one session; see `open_notify_bus`."""

    def __init__(self, options: BusOptions) -> None:
        self._options = options
        self._state = BusState.CONNECTING
        self._supervision = Supervision()
        self._routes = Routes(options.channels, linger=options.unlisten_linger)
        self._session: Session | None = None
        """The session, while LIVE."""
        self._probe: Probe | None = None
        self._changed = anyio.Event()
        self._failure: BusUnavailableError | None = None
        self._conninfo_error: Exception | None = None
        self._last_received_at: float | None = None
        self._heartbeat_rtt: float | None = None
        self._received = 0
        self._dispatched_before = 0
        """What subscriptions that are no more were given."""
        self._dropped_before = 0

    def __repr__(self) -> str:
        return f"<NotifyBus {self._state} generation={self.generation}>"

    @property
    def channels(self) -> frozenset[str]:
        """Names of the channels it listens to, or is about to."""
        return self._routes.names

    @property
    def generation(self) -> int:
        """How many times it has become live: 0 before the first connect, 1 after it."""
        return self._supervision.generation

    @property
    def state(self) -> BusState:
        """Where it is in its life."""
        return self._state

    @property
    def backend_pid(self) -> int | None:
        """Process id of its server session; None while it has none."""
        return None if self._session is None else self._session.backend_pid

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
        if buffer < 1:
            raise ValueError(f"buffer must be at least 1, not {buffer}")
        check_choice("overflow", overflow, ("drop_oldest", "drop_newest", "latest", "close"))
        check_choice("gaps", gaps, ("yield", "raise", "ignore"))
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
        self._check_alive()
        backlog = Backlog(buffer, overflow, keeps_marks=gaps != "ignore")
        subscription: Subscription[Any] = create(
            Subscription,
            backlog,
            channels=frozenset(channel.name for channel in channels),
            gaps=gaps,
            where=where,
        )
        # Before LISTEN is sent: its reply and a first notification may come in one read.
        routes = self._routes.hold(subscription, channels)
        try:
            await self._wait_listening(routes)
            subscription._open(self.generation, initial_gap=initial_gap)  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
            yield subscription
        finally:
            self._routes.release(subscription, routes, anyio.current_time())
            self._dispatched_before += backlog.offered
            self._dropped_before += backlog.lost
            subscription._close()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]

    async def _wait_listening(self, routes: Sequence[Route]) -> None:
        while True:
            self._check_alive()
            for route in routes:
                if route.error is not None:
                    raise route.rejection()
            missing = next((route for route in routes if route.state != "listening"), None)
            if missing is not None:
                await missing.wait()
            elif self._state is not BusState.LIVE:
                await self._changed.wait()
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
            self._check_alive()
            if self.generation > after:
                return self.generation
            await self._changed.wait()

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
            self._check_alive()
            if self._state is BusState.LIVE:
                return self.generation
            await self._changed.wait()

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
        self._check_alive()
        if self._session is None:
            error = ConnectionLostError("the bus has no session at present; see wait_live()")
            raise error from self._supervision.last_error
        return await self._session.ping()

    def statistics(self) -> BusStatistics:
        """Return what the bus has done so far."""
        told = [subscription.statistics() for subscription in self._routes.subscriptions]
        dropped = sum(each.lost for each in told)
        given = sum(each.depth + each.received for each in told)
        session = self._session
        if session is not None:
            self._note_life(session)
        return BusStatistics(
            received=self._received,
            dispatched=self._dispatched_before + given + dropped,
            dropped=self._dropped_before + dropped,
            reconnects=max(0, self.generation - 1),
            attempts=self._supervision.attempts,
            subscribers=len(told),
            channels=len(self.channels),
            last_error=self._supervision.last_error,
            last_received_at=self._last_received_at,
            heartbeat_rtt=self._heartbeat_rtt,
        )

    def _check_alive(self) -> None:
        if self._state is BusState.CLOSED:
            raise self._closed_error()

    def _closed_error(self) -> Exception:
        if self._failure is None:
            return anyio.ClosedResourceError()
        return self._died()

    def _has_raised(self, error: BusUnavailableError) -> bool:
        """Tell whether ``error`` tells of this bus's end."""
        return self._failure is not None and error.__cause__ is self._failure

    def _died(self) -> BusUnavailableError:
        error = BusUnavailableError(str(self._failure))
        error.__cause__ = self._failure
        return error

    # ------------------------------------------------------------ the session

    async def _run(self, scope: anyio.CancelScope) -> None:
        """Keep the bus live; when that can't be done, cancel ``scope`` and say why."""
        options = self._options
        try:
            await supervise(
                self._serve,
                what=options.application_name,
                backoff=options.backoff,
                max_outage=options.max_outage,
                is_transient=self._heals,
                supervision=self._supervision,
            )
        except GaveUp as exc:
            failure = BusUnavailableError(
                f"the bus was not live for {exc.outage:g} s (max_outage): {exc.last_error}"
            )
            self._fail(failure, scope)
            raise failure from exc.last_error
        except Exception as exc:
            failure = BusUnavailableError(f"the bus has ended: {exc}")
            failure.__cause__ = exc
            self._fail(failure, scope)
            raise

    def _heals(self, error: BaseException) -> bool:
        """Tell whether another attempt is to be made."""
        options = self._options
        if self.generation == 0:
            if options.initial_connect == "fail":
                return False
            if isinstance(error, (DeliveryError, ListenRejectedError)):
                return False
        if error is self._conninfo_error:
            return True
        return isinstance(error, (psycopg.Error, OSError, NotifyError, ConninfoError))

    async def _serve(self, supervision: Supervision) -> None:
        """Connect, become live, and serve until the session is lost."""
        options = self._options
        deadline = anyio.current_time() + options.connect_timeout
        conninfo = await self._resolve_conninfo(deadline)
        target = find_target(conninfo)
        async with open_session(
            conninfo,
            application_name=options.application_name,
            connect_timeout=deadline - anyio.current_time(),
            heartbeat=options.heartbeat,
            heartbeat_timeout=options.heartbeat_timeout,
            # What may be under way, LISTEN or a heartbeat, needs no ending.
            close_timeout=0.0,
            on_notifications=self._take,
            **target,
        ) as session:
            with anyio.CancelScope(deadline=deadline) as scope:
                await self._prepare(session, conninfo, deadline, target)
            if scope.cancelled_caught:
                raise psycopg.errors.ConnectionTimeout("connection timeout expired in LISTEN")
            try:
                self._go_live(session, supervision)
                async with open_background() as tasks:
                    tasks.start_soon(keep_listening, session, self._routes, self._reject)
                    await session.wait_closed()
            except ConnectionLostError:
                pass  # the session's own failure says more
            finally:
                self._go_down(session)
            if session.failure is not None:
                raise session.failure

    async def _resolve_conninfo(self, deadline: float) -> str:
        try:
            with anyio.CancelScope(deadline=deadline):
                return await resolve_conninfo(self._options.conninfo)
            raise psycopg.errors.ConnectionTimeout("connection timeout expired in conninfo()")
        except Exception as exc:
            self._conninfo_error = exc
            raise

    async def _prepare(
        self, session: Session, conninfo: str, deadline: float, target: dict[str, Any]
    ) -> None:
        if session.is_standby:
            raise NotPrimaryError(
                "the server is a standby, where LISTEN is not possible; name the primary, or all"
                " hosts with target_session_attrs=primary"
            )
        await listen_to_all(session, self._routes, self._reject)
        if self._options.verify_delivery:
            self._probe = Probe()
            try:
                await self._probe.run(
                    session,
                    conninfo,
                    application_name=self._options.application_name,
                    connect_timeout=deadline - anyio.current_time(),
                    **target,
                )
            finally:
                self._probe = None

    def _reject(self, route: Route, error: psycopg.Error) -> None:
        emit("bus.listen_rejected", channel=route.name, error=error)
        self._routes.reject(route, error)
        if self.generation == 0 and self._routes.is_static(route):
            raise route.rejection()

    def _take(self, batch: Sequence[RawNotification]) -> None:
        """Take the notifications of one read from the socket."""
        session = self._session
        if session is None:
            if self._probe is not None:
                self._probe.look(batch)
            return
        self._received += len(batch)
        self._routes.dispatch(batch, self.generation, session.last_received_at)

    def _go_live(self, session: Session, supervision: Supervision) -> None:
        generation = supervision.declare_live()
        self._state = BusState.LIVE
        self._session = session
        facts: dict[str, object] = {
            "generation": generation,
            "backend_pid": session.backend_pid,
            "channels": len(self.channels),
        }
        if generation == 1 or self._last_received_at is None:
            emit("bus.connected", **facts)
        else:
            outage = anyio.current_time() - self._last_received_at
            emit("bus.reconnected", outage=outage, **facts)
            for subscription in self._routes.subscriptions:
                subscription._note_reconnect(generation, outage)  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
        self._announce()

    def _go_down(self, session: Session) -> None:
        self._session = None
        self._note_life(session)
        self._routes.renew()
        if session.failure is not None:
            emit("bus.lost", generation=self.generation, error=session.failure)
        if self._state is BusState.LIVE:  # and not closed
            self._state = BusState.DOWN
            self._announce()

    def _note_life(self, session: Session) -> None:
        self._last_received_at = session.last_received_at
        self._heartbeat_rtt = session.heartbeat_rtt or self._heartbeat_rtt

    def _announce(self) -> None:
        """Wake whoever waits for the state or the generation to change."""
        self._changed.set()
        self._changed = anyio.Event()

    # ------------------------------------------------------------ the end

    def _fail(self, failure: BusUnavailableError, scope: anyio.CancelScope) -> None:
        self._failure = failure
        # First: what waits in the scope is to be cancelled, and only what waits
        # elsewhere to be told by an error.
        scope.cancel()
        self._close()

    def _close(self) -> None:
        """End every stream and waiter; what is buffered can still be received."""
        if self._state is BusState.CLOSED:
            return
        self._state = BusState.CLOSED
        ending = anyio.EndOfStream if self._failure is None else self._died
        for subscription in self._routes.subscriptions:
            subscription._end(ending)  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
        self._routes.wake_all()
        self._announce()
        emit("bus.closed", generation=self.generation)

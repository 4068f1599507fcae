"""The bus's link to the server: one session at a time, and what happens between two of them.

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

# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# Subscriptions have a side for their subscriber and one for this.

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NoReturn, final

import anyio
import psycopg

from pgstructured._util import open_background
from pgstructured.driver import foreign_codec, open_session, resolve_conninfo
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

from ._listening import Probe, keep_listening, listen_to_all
from ._options import find_target
from ._routes import Routes
from ._state import BusState
from ._translation import Translation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pgstructured.driver import Session

    from ._events import RawNotification
    from ._options import BusOptions
    from ._routes import Route

_HAS_IDLE_SESSION_TIMEOUT: Final = 140_000


@final
class Link:
    """See the module's text."""

    def __init__(self, options: BusOptions) -> None:
        self._options = options
        self.state: BusState = BusState.CONNECTING
        self.supervision: Supervision = Supervision()
        self.routes: Routes = Routes(options.channels, linger=options.unlisten_linger)
        self.session: Session | None = None
        """The session, while LIVE."""
        self.received: int = 0
        """How many notifications came while LIVE."""
        self.last_received_at: float | None = None
        """When the last session gave its last sign of life."""
        self.heartbeat_rtt: float | None = None
        """What its last heartbeat took, in seconds."""
        self._probe: Probe | None = None
        self._translation = Translation()
        self._changed = anyio.Event()
        self._failure: BusUnavailableError | None = None
        self._conninfo_error: Exception | None = None
        self._lost_at = 0.0
        """When the last session that was live gave its last sign of life."""

    @property
    def generation(self) -> int:
        """How many times it has become live."""
        return self.supervision.generation

    # ------------------------------------------------------------ for the bus

    async def wait_changed(self) -> None:
        """Wait until the state or the generation changes."""
        await self._changed.wait()
        await self.let_cancel()

    async def let_cancel(self) -> None:
        """Let a cancellation that has closed the bus come before the news that it is closed.

        They were cancelled together, and the bus may be the first to meet it.
        """
        if self.state is BusState.CLOSED:
            await anyio.lowlevel.checkpoint()

    def check_alive(self) -> None:
        """Raise what a subscriber is told when the bus is no more."""
        if self.state is BusState.CLOSED:
            raise self._closed() if self._failure is None else self._died()

    def note_life(self, session: Session) -> None:
        """Remember what is to be known of ``session`` when it is no more."""
        self.last_received_at = session.last_received_at
        if session.heartbeat_rtt is not None:
            self.heartbeat_rtt = session.heartbeat_rtt

    def has_raised(self, error: BusUnavailableError) -> bool:
        """Tell whether ``error`` is the news of this bus's own end."""
        return self._failure is not None and error.__cause__ is self._failure

    def close(self) -> None:
        """End every stream and waiter; what is buffered can still be received."""
        if self.state is BusState.CLOSED:
            return
        self.state = BusState.CLOSED
        ending = anyio.EndOfStream if self._failure is None else self._died
        for subscription in self.routes.subscriptions:
            subscription._end(ending)
        self.routes.wake_all()
        self._announce()
        emit("bus.closed", generation=self.generation)

    def _closed(self) -> anyio.ClosedResourceError:
        return anyio.ClosedResourceError("the block of open_notify_bus was left")

    def _died(self) -> BusUnavailableError:
        error = BusUnavailableError(str(self._failure))
        error.__cause__ = self._failure
        return error

    def _announce(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    # ------------------------------------------------------------ one session after the other

    async def run(self, scope: anyio.CancelScope) -> None:
        """Keep the bus live; when that can't be done, cancel ``scope`` and say why.

        Raises:
            BusUnavailableError: after ``max_outage``.
            Exception: what another attempt would not heal.

        Cancellation:
            A checkpoint; leaves no session.
        """
        try:
            await supervise(
                self._serve,
                what=self._options.application_name,
                backoff=self._options.backoff,
                max_outage=self._options.max_outage,
                is_transient=self._heals,
                supervision=self.supervision,
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
        finally:
            # Cancelled: the block may still be at its own clean-up, which is not to wait for
            # what nobody runs any more.
            self.close()

    def _fail(self, failure: BusUnavailableError, scope: anyio.CancelScope) -> None:
        self._failure = failure
        # First: what waits in the scope is to be cancelled, and only what waits
        # elsewhere to be told by an error.
        scope.cancel()
        self.close()

    def _heals(self, error: BaseException) -> bool:
        """Tell whether another attempt is to be made."""
        if self.generation == 0:
            if self._options.initial_connect == "fail":
                return False
            if isinstance(error, (DeliveryError, ListenRejectedError)):
                return False
        return error is self._conninfo_error or isinstance(
            error, (psycopg.Error, OSError, NotifyError, ConninfoError)
        )

    async def _serve(self, supervision: Supervision) -> NoReturn:
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
            settings=_settings,
            on_notifications=self._take,
            **target,
        ) as session:
            loss: BaseException | None = None
            try:
                translation = self._translation = Translation(foreign_codec(session))
                with anyio.CancelScope(deadline=deadline) as scope:
                    await self._prepare(session, translation, conninfo, deadline, target)
                if scope.cancelled_caught:
                    raise psycopg.errors.ConnectionTimeout("connection timeout expired in LISTEN")
                self._go_live(session, supervision)
                async with open_background() as tasks:
                    tasks.start_soon(
                        keep_listening, session, translation, self.routes, self._reject
                    )
                    await session.wait_closed()
                loss = session.failure
            except ConnectionLostError:
                loss = session.failure  # says more
            except Exception as exc:
                loss = exc
                raise
            finally:
                self._go_down(session, loss)
            raise loss or psycopg.OperationalError("the session has ended")

    async def _resolve_conninfo(self, deadline: float) -> str:
        try:
            with anyio.CancelScope(deadline=deadline):
                return await resolve_conninfo(self._options.conninfo)
            raise psycopg.errors.ConnectionTimeout("connection timeout expired in conninfo()")
        except Exception as exc:
            self._conninfo_error = exc
            raise

    async def _prepare(
        self,
        session: Session,
        translation: Translation,
        conninfo: str,
        deadline: float,
        target: dict[str, Any],
    ) -> None:
        """Do everything that comes before being live."""
        if session.is_standby:
            raise NotPrimaryError(
                "the server is a standby, where LISTEN is not possible; name the primary, or all"
                " hosts with target_session_attrs=primary"
            )
        await translation.begin(session)
        await listen_to_all(session, translation, self.routes, self._reject)
        if self._options.verify_delivery:
            self._probe = Probe()
            await self._probe.run(
                session,
                conninfo,
                application_name=self._options.application_name,
                connect_timeout=deadline - anyio.current_time(),
                **target,
            )

    def _reject(self, route: Route, error: psycopg.Error) -> None:
        emit("bus.listen_rejected", channel=route.name, error=error)
        self.routes.reject(route, error)
        if self.generation == 0 and self.routes.is_static(route):
            raise route.rejection()

    def _take(self, batch: Sequence[RawNotification]) -> None:
        """Take the notifications of one read from the socket."""
        session = self.session
        if session is not None:
            self.received += len(batch)
            if self._translation.is_needed:
                batch = self._translation.translate(batch)
            self.routes.dispatch(batch, self.supervision.generation, session.pulse.last_received_at)
        elif self._probe is not None:
            self._probe.look(batch)

    def _go_live(self, session: Session, supervision: Supervision) -> None:
        generation = supervision.declare_live()
        self.state = BusState.LIVE
        self.session = session
        facts: dict[str, object] = {
            "generation": generation,
            "backend_pid": session.backend_pid,
            "channels": len(self.routes.names),
        }
        if generation == 1:
            emit("bus.connected", **facts)
        else:
            outage = anyio.current_time() - self._lost_at
            emit("bus.reconnected", outage=outage, **facts)
            for subscription in self.routes.subscriptions:
                subscription._note_reconnect(generation, outage)
        self._announce()

    def _go_down(self, session: Session, loss: BaseException | None) -> None:
        self.note_life(session)
        self.routes.renew()
        self._probe = None
        if self.session is None:  # it never was live
            return
        self.session = None
        self._lost_at = session.last_received_at
        # Not closed meanwhile, nor about to be: without a loss this is a cancellation.
        if self.state is BusState.LIVE and loss is not None:
            emit("bus.lost", generation=self.generation, error=loss)
            self.state = BusState.DOWN
            self._announce()


def _settings(server_version: int) -> Mapping[str, str]:
    """Return what the session of a bus needs: to listen is to be idle."""
    is_known = server_version >= _HAS_IDLE_SESSION_TIMEOUT
    return {"idle_session_timeout": "0"} if is_known else {}

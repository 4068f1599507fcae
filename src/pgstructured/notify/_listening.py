"""Keeping the server's LISTENs in step with the routes, and proving that they work."""

from __future__ import annotations

import secrets
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Final, final

import anyio
import psycopg

from pgstructured.driver import ConnectionState, open_session
from pgstructured.errors import DeliveryError
from pgstructured.observe import emit

from ._channels import quote_name
from ._publisher_statement import MAKE_ROOM

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pgstructured.driver import Session

    from ._events import RawNotification
    from ._routes import Route, Routes
    from ._translation import Translation

    OnReject = Callable[[Route, psycopg.Error], None]

_PATIENCE: Final = 3.0
_NOTIFY: Final = "SELECT pg_catalog.pg_notify($1, '')"
# Data exceptions (a name that the server's encoding lacks) and access rules: of this channel.
_ABOUT_ONE_CHANNEL: Final = ("22", "42")


async def listen_to_all(
    session: Session, translation: Translation, routes: Routes, on_reject: OnReject
) -> None:
    """Listen to every channel that is wanted.

    Raises:
        psycopg.Error: if the server refuses for a reason that is not one channel's own.
        Exception: what ``on_reject`` raises.
    """
    plan = routes.plan(anyio.current_time())
    await _Listening(session, translation, routes, on_reject, strict=True).begin(plan.listen)


async def keep_listening(
    session: Session, translation: Translation, routes: Routes, on_reject: OnReject
) -> None:
    """Tell the server of every change in what is wanted, until the session ends.

    Raises:
        psycopg.Error: when the session is lost.

    Cancellation:
        A checkpoint.
    """
    listening = _Listening(session, translation, routes, on_reject, strict=False)
    while True:
        plan = routes.plan(anyio.current_time())
        if plan.unlisten:
            await listening.end(plan.unlisten)
        await listening.begin(plan.listen)
        with anyio.CancelScope(deadline=plan.due):
            await plan.changed.wait()


@final
@dataclass(frozen=True, slots=True)
class _Listening:
    """LISTEN and UNLISTEN on one session."""

    session: Session
    translation: Translation
    routes: Routes
    on_reject: OnReject
    _: KW_ONLY
    strict: bool
    """Raise what the server refuses for a reason that is not one channel's own."""

    async def begin(self, wanted: Sequence[Route]) -> None:
        """Listen to ``wanted``, all in one transaction; halves where the server refuses."""
        if not wanted:
            return
        try:
            # Asked before, for a first notification may come with the reply to LISTEN.
            await self.translation.learn(self.session, [route.name for route in wanted])
            await self._tell("LISTEN", wanted)
        except psycopg.Error as exc:
            if self.session.state is not ConnectionState.OPEN:
                raise
            if self.strict and not (exc.sqlstate or "").startswith(_ABOUT_ONE_CHANNEL):
                raise
            if len(wanted) == 1:
                self.on_reject(wanted[0], exc)
                return
            middle = len(wanted) // 2
            for half in (wanted[:middle], wanted[middle:]):
                await self.begin(half)
        else:
            self.routes.confirm_listen(wanted)

    async def end(self, unwanted: Sequence[Route]) -> None:
        """Listen to ``unwanted`` no more."""
        await self._tell("UNLISTEN", unwanted)
        self.routes.confirm_unlisten(unwanted)

    async def _tell(self, verb: str, routes: Sequence[Route]) -> None:
        statements = [(f"{verb} {route.quoted}", ()) for route in routes]
        await self.session.execute_batch(self.translation.around(statements))


class Probe:
    """A notification to ourselves, over a channel that nobody else knows."""

    def __init__(self) -> None:
        self._name = f"_pgstructured_probe_{secrets.token_hex(8)}"
        self._channel = self._name.encode()
        self._seen = anyio.Event()

    def look(self, batch: Sequence[RawNotification]) -> None:
        """Look for the probe among the notifications of one read."""
        if any(raw[0] == self._channel for raw in batch):
            self._seen.set()

    async def run(
        self, session: Session, conninfo: str, *, connect_timeout: float, **options: Any
    ) -> None:
        """Send a notification and wait for it.

        Args:
            session: The session that listens; its notifications go to `look`.
            conninfo: Where a pooler may stand between: from there the probe is sent over a
                second session, for the first could be lucky and meet itself.
            connect_timeout: Seconds that all of it has; half of them are for the answer.
            options: More options of `open_session`, for that second one.

        Raises:
            DeliveryError: if it does not come although the session answers.
            psycopg.Error: if a session fails.
        """
        quoted = quote_name(self._name)
        if session.behind_pooler:
            await session.execute(f"LISTEN {quoted}")
            async with open_session(
                conninfo, close_timeout=0.0, connect_timeout=connect_timeout, **options
            ) as other:
                await other.execute_batch(self._notify())
                await self._wait(session, connect_timeout)
        else:
            await session.execute_batch([(f"LISTEN {quoted}", ()), *self._notify()])
            await self._wait(session, connect_timeout)
        session.send([(f"UNLISTEN {quoted}", ())])

    def _notify(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(MAKE_ROOM, ()), (_NOTIFY, (self._name,))]

    async def _wait(self, session: Session, available: float) -> None:
        # The verdict has to come before the attempt is over, or there is never one.
        with anyio.move_on_after(min(_PATIENCE, available / 2)):
            await self._seen.wait()
            return
        # A session that is silent altogether is lost, or slow: another matter.
        await session.ping()
        if not self._seen.is_set():
            error = DeliveryError(
                "a notification to itself did not come back: something between, such as a pooler"
                " in transaction mode, swallows LISTEN; connect the bus to the server directly,"
                " or through a pooler in session mode"
            )
            emit("bus.probe_failed", error=error)
            raise error

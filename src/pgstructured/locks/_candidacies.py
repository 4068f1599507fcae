"""The elections of one `Locks`: sessions of candidates, and looks at who leads.

A candidate has a session of its own, by whose name all can see who it is. It stands in
the server's queue for the election's key, and leads while it holds it.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, final

import anyio

from pgstructured.errors import ConnectionLostError

from ._dedicated import DedicatedSource
from ._names import note
from ._statements import (
    LEADER,
    RESIGN,
    leader_params,
    resign_channel,
    ring_payload,
    ring_statement,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Sequence

    from pgstructured.driver import Conninfo, Prepared, Session, SessionNotification

    from ._bell import Bell, Ring
    from ._dedicated import SessionGrip
    from ._fleet import Fleet
    from ._grip import Grip, LockRequest
    from ._keys import LockKey
    from ._options import LockOptions

_ELECTED: Final = "elected"
_RELEASED: Final = "released"
_REMEMBERED: Final = 256
"""Requests to resign that are kept until a session is known: its own may be among them."""
_LINGER: Final = 0.01
"""Seconds until the session of a leader that has resigned tells others, and ends. Both are work
for the server, and who is elected next comes first."""


@final
class _Candidacy:
    """One candidate, from standing in line to the end of its block."""

    def __init__(self, asked: anyio.Event) -> None:
        self.scope = anyio.CancelScope()
        self.grip: SessionGrip | None = None
        self._asked = asked
        self._backend_pid: int | None = None
        self._asked_pids: list[bytes] = []

    def begin(self, backend_pid: int) -> None:
        """It stands by this session now."""
        self._backend_pid = backend_pid
        self._check()

    def hear(self, notifications: list[SessionNotification]) -> None:
        """Take note of whom somebody asks to resign: whoever leads, by its session."""
        self._asked_pids += [notification.extra for notification in notifications]
        self._check()
        del self._asked_pids[:-_REMEMBERED]  # whoever may NOTIFY can send any number of them

    def _check(self) -> None:
        if str(self._backend_pid).encode() in self._asked_pids:
            self._asked.set()

    def begin_closing(self) -> None:
        if self.grip is None:
            self.scope.cancel()
        else:
            self.grip.begin_closing()


@final
class Candidacies:
    """What the elections of one `Locks` share.

    Args:
        conninfo: Where to connect.
        fleet: The sessions on which to look and to ask.
        bell: What tells of changes.
        options: How sessions live.
    """

    def __init__(self, conninfo: Conninfo, fleet: Fleet, bell: Bell, options: LockOptions) -> None:
        self._conninfo = conninfo
        self._fleet = fleet
        self._bell = bell
        self._options = options
        self._live: dict[_Candidacy, None] = {}
        self._detached: list[SessionGrip] = []
        self._rings: list[Ring] = []
        self._changed = anyio.Event()
        self._close_by = 0.0
        self.is_closed: bool = False
        """Whether the `Locks` is closed, or being closed."""

    # ------------------------------------------------------------ standing

    @property
    def release_timeout(self) -> float:
        """Seconds an unlock may take."""
        return self._options.release_timeout

    @asynccontextmanager
    async def stand(
        self, candidate: str, asked: anyio.Event, request: LockRequest
    ) -> AsyncGenerator[Grip | None]:
        """Hold the key of an election for the length of a block, in the name of a candidate.

        As `LockSource.take` in everything else.

        Args:
            candidate: Its name.
            asked: To be set when it is asked to resign.
            request: What is asked for.

        Raises:
            anyio.ClosedResourceError: if the `Locks` is closed.
        """
        if self.is_closed:
            raise anyio.ClosedResourceError("the block of open_locks was left")
        key = request.key
        candidacy = _Candidacy(asked)
        source = DedicatedSource(
            self._conninfo,
            replace(self._options, application_name=candidate, is_name_fixed=True),
            # Before it leads: who sees that it does may ask at once.
            preface=f"LISTEN {resign_channel(key)}",
            on_backend=candidacy.begin,
            greeting=((ring_statement(key, _ELECTED) + note((key,)), ()),),
            see_off=partial(self._fleet.start_soon, _see_off, ring_statement(key, _RELEASED)),
            on_notifications=candidacy.hear,
        )
        self._live[candidacy] = None
        try:
            with candidacy.scope:
                async with source.take(request) as grip:
                    # From here on its lock is told of the end, and not this scope.
                    await anyio.lowlevel.checkpoint_if_cancelled()
                    candidacy.grip = grip
                    yield grip
        finally:
            del self._live[candidacy]
            self._changed.set()
            if candidacy.grip is not None and candidacy.grip.is_detached:
                self._detached = [g for g in self._detached if not g.has_ended]
                self._detached.append(candidacy.grip)
        if candidacy.scope.cancelled_caught:
            raise anyio.ClosedResourceError("the block of open_locks was left")

    # ------------------------------------------------------------ looking and asking

    async def fetch_leader(self, key: LockKey) -> str | None:
        """Return the name of the session that holds ``key``; None if none does.

        Raises:
            psycopg.Error: what the server says, or why connecting failed.
            anyio.ClosedResourceError: if the `Locks` is closed.

        Cancellation:
            A checkpoint; nothing is left behind.
        """
        rows = await self._ask(LEADER, leader_params(key))
        return rows[0][0] if rows else None

    async def ask_to_resign(self, key: LockKey) -> None:
        """Tell the session that leads, if there is one; as `fetch_leader`."""
        await self._ask(RESIGN, (*leader_params(key), resign_channel(key).encode()))

    async def _ask(
        self, statement: Prepared, params: Sequence[bytes]
    ) -> list[tuple[str | None, ...]]:
        lane = await self._fleet.reserve()
        try:
            command = lane.session.send_prepared(statement, params)
            await command.wait()
            return command.result().rows
        finally:
            lane.remind_of_names()
            self._fleet.give_back(lane)

    @contextmanager
    def hearing(self, key: LockKey) -> Generator[Ring]:
        """Hear when somebody may have begun or ended to lead, and of the end of it all."""
        payloads = (ring_payload(key, _ELECTED), ring_payload(key, _RELEASED))
        with self._bell.hearing(payloads, on_demand=False) as ring:
            self._rings.append(ring)
            try:
                yield ring
            finally:
                self._rings.remove(ring)

    # ------------------------------------------------------------ end

    def begin_closing(self) -> None:
        """Tell everybody that it is over: who leads, who wants to, and who looks."""
        self.is_closed = True
        self._close_by = anyio.current_time() + self._options.release_timeout
        for candidacy in tuple(self._live):
            candidacy.begin_closing()
        for ring in self._rings:
            ring.ring()

    async def close(self) -> None:
        """End every session, once its block has ended, or time is over.

        Cancellation:
            Shielded, at most ``release_timeout`` from `begin_closing` on.
        """
        try:
            with anyio.CancelScope(deadline=self._close_by, shield=True):
                while self._live:
                    self._changed = anyio.Event()
                    await self._changed.wait()
        finally:  # asyncio's own cancellation heeds no shield
            left = [candidacy.grip for candidacy in self._live if candidacy.grip is not None]
            with anyio.CancelScope(shield=True):  # doesn't wait for the server
                for grip in left + self._detached:
                    await grip.aclose()


async def _see_off(farewell: str, session: Session) -> None:
    """Close the session of a leader that has resigned, after a word to others."""
    try:
        await anyio.sleep(_LINGER)
    finally:
        # A socket that is closed with something unread cuts the server off, maybe before this.
        session.poll()
        with suppress(ConnectionLostError, anyio.ClosedResourceError):  # it has ended already
            session.send([(farewell, ())])
        with anyio.CancelScope(shield=True):  # doesn't wait for the server, which reads it all
            await session.aclose(close_timeout=0)

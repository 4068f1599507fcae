"""Telling each other about locks by NOTIFY, for those who don't stand in the server's queue.

One session listens for the whole `Locks`, for as long as somebody wants to hear. It
also holds `MARKER` while somebody wants to hear what is told on demand only, and nobody
else does: whoever unlocks looks whether it can be shared, and sends nothing while it
can. A ring is a hint and no promise: none is sent
when a holder dies, so whoever waits for one looks by itself now and then.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, final

import anyio
import psycopg

from ._names import MARKER
from ._statements import CHANNEL, MARKER_STATEMENT, ring_payload, unlock_statement
from ._waits import settle

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable
    from contextlib import AbstractContextManager

    from pgstructured.driver import SessionNotification

    from ._fleet import Fleet
    from ._keys import LockKey
    from ._lanes import Lane

_TRY_AGAIN: Final = 0.1
"""Seconds until it is tried again to hold `MARKER`."""
_LOOK_AGAIN: Final = 1.0
"""Seconds until the session is looked at again."""
_AFTER_FAILURE: Final = 1.0
"""Seconds until another session is tried."""


@final
class Ring:
    """Something that is waited for, again and again."""

    def __init__(self) -> None:
        self._event = anyio.Event()

    async def wait(self) -> None:
        """Wait until it has rung since it was last waited for.

        Cancellation:
            A checkpoint; nothing is lost.
        """
        await self._event.wait()
        self._event = anyio.Event()

    def ring(self) -> None:
        """Wake who waits, or will."""
        self._event.set()


@final
class Bell:
    """Hears what others send.

    Args:
        fleet: Whose sessions to use; each hands its notifications to `take`.
        release_timeout: Seconds in which a session has to be as it was.
    """

    def __init__(self, fleet: Fleet, *, release_timeout: float) -> None:
        self._fleet = fleet
        self._release_timeout = release_timeout
        self._rings: dict[str, list[Ring]] = {}
        self._demands = 0
        self._is_running = False
        self._changed = anyio.Event()

    def listening(self, key: LockKey, what: str = "released") -> AbstractContextManager[Ring]:
        """Hear of ``key`` for the length of a block; it rings once when it begins to hear."""
        return self.hearing((ring_payload(key, what),))

    @contextmanager
    def hearing(self, payloads: Iterable[str], *, on_demand: bool = True) -> Generator[Ring]:
        """Hear of several things, see `ring_payload`, by one ring; as `listening`.

        Args:
            payloads: What to hear of.
            on_demand: Whether that is told only while somebody holds `MARKER`.
        """
        self._fleet.check_open()
        ring = Ring()
        heard = tuple(payloads)
        for payload in heard:
            self._rings.setdefault(payload, []).append(ring)
        self._demands += on_demand
        self._changed.set()
        if self._is_running:
            ring.ring()  # it may have missed something
        else:
            self._is_running = True
            self._fleet.start_soon(self._run)
        try:
            yield ring
        finally:
            for payload in heard:
                rings = self._rings[payload]
                rings.remove(ring)
                if not rings:
                    del self._rings[payload]
            self._demands -= on_demand
            self._changed.set()

    def take(self, notifications: list[SessionNotification]) -> None:
        """Ring for each notification that somebody waits for."""
        for notification in notifications:
            for ring in self._rings.get(notification.extra.decode(errors="replace"), ()):
                ring.ring()

    async def _run(self) -> None:
        try:
            while self._rings:
                try:
                    lane = await self._fleet.reserve_whole()
                except anyio.ClosedResourceError:
                    return
                except Exception:  # noqa: BLE001 - the fleet has told of it; who waits polls
                    await anyio.sleep(_AFTER_FAILURE)
                    continue
                await self._listen_on(lane)
        finally:
            self._is_running = False

    async def _listen_on(self, lane: Lane) -> None:
        session = lane.session
        try:
            await session.execute(f"LISTEN {CHANNEL}")
            self._ring_all()  # it may have missed something
            await self._hear_on(lane)
            await session.execute(f"UNLISTEN {CHANNEL}")
        except (psycopg.Error, anyio.ClosedResourceError):
            await settle(lane, within=self._release_timeout)
        finally:
            self._fleet.give_back_whole(lane)

    async def _hear_on(self, lane: Lane) -> None:
        """Hold `MARKER` while that is needed, until nobody listens or the session has ended."""
        is_held = False
        while self._rings and lane.is_open:
            self._changed = anyio.Event()
            if bool(self._demands) != is_held:
                is_held = await self._turn_marker(lane, held=is_held)
            is_settled = bool(self._demands) == is_held
            with anyio.move_on_after(_LOOK_AGAIN if is_settled else _TRY_AGAIN):
                await self._changed.wait()
        if is_held:
            await self._turn_marker(lane, held=True)

    async def _turn_marker(self, lane: Lane, *, held: bool) -> bool:
        """Take `MARKER` if nobody has it, or let it go; return whether it is held now."""
        if held:
            await lane.session.execute(unlock_statement(MARKER, shared=False))
            return False
        answer = await lane.session.execute(MARKER_STATEMENT)
        if answer.scalar() != "true":
            return False
        self._ring_all()  # until now nobody may have been told of anything
        return True

    def _ring_all(self) -> None:
        for rings in self._rings.values():
            for ring in rings:
                ring.ring()

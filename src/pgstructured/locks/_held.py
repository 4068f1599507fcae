"""A held lock: its body, its loss, its release. The same for every source.

==========  =========================================  ==========================
state       what ends it                               next
==========  =========================================  ==========================
HELD        end of the block, `HeldLock.release`       RELEASED
HELD        `HeldLock.detach`                          DETACHED
HELD        the session ended, silence, ttl, a newer   LOST
            fencing token
RELEASED    the unlock finds that it was lost before   LOST
LOST        -                                          -
==========  =========================================  ==========================

While it is HELD its body runs in a scope of its own, which a loss cancels. What
keeps the lock on the server (the session) is let go only after the body has
ended: a body that is cancelled has not ended yet.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import anyio
import psycopg

from pgstructured._util import create
from pgstructured.driver import current_task_id
from pgstructured.errors import LockError, LockLost, LockNotHeldError
from pgstructured.observe import emit

from . import _life
from ._detached import DetachedLock
from ._handle import LockHandle, State
from ._loss import Loss
from ._tasks import add_holding, remove_holding

if TYPE_CHECKING:
    from collections.abc import Generator

    from pgstructured.driver import Connection

    from ._grip import Grip, LockRequest
    from ._keys import LockKey

Held = TypeVar("Held", bound="HeldLock")


class HeldLock(LockHandle):
    """A lock that this program holds; made by `pg_lock` and `Locks`, ended with its block."""

    __slots__ = (
        "_body_scope",
        "_due_at",
        "_ended",
        "_failure",
        "_holding",
        "_release_scope",
        "_round_trips",
        "_state",
        "_ttl",
        "_waited",
    )

    def __init__(  # noqa: PLR0917 - made for every lock, and cheapest so
        self,
        grip: Grip,
        body_scope: anyio.CancelScope,
        request: LockRequest,
        ttl: float | None,
        began: float,
        release_timeout: float,
    ) -> None:
        now = grip.now()
        LockHandle.__init__(self, grip, request.key, request.shared, now, release_timeout)
        self._ttl = ttl
        self._waited = now - began
        self._state = State.HELD
        self._failure: Exception | None = None
        """What kept an unlock from being confirmed, until that is seen to."""
        self._ended: anyio.Event | None = None
        self._holding: tuple[int, str, LockKey, int] | None = None
        self._body_scope = body_scope
        self._release_scope: anyio.CancelScope | None = None
        self._round_trips: set[anyio.CancelScope] | None = None
        self._due_at = math.inf if ttl is None else now + ttl
        """When something ends by the clock: the lock, or later its release."""

    def __repr__(self) -> str:
        kind = "shared" if self._shared else "exclusive"
        return f"<{type(self).__name__} {self._key} {kind} {self._state.name.lower()}>"

    @property
    def previous_ended_cleanly(self) -> bool | None:
        """Whether the fenced holder before released its lock, as its last act.

        False where it died, lost the lock, or left a guarded transaction open: what it
        protected may be in the middle of something. None without ``fenced``, and for the first.
        """
        grant = self._grip.fencing
        return None if grant is None else grant.previous_ended_cleanly

    @property
    def ttl(self) -> float | None:
        """Seconds it is held from entering its block or the last `refresh` on; None for ever."""
        return self._ttl

    @property
    def acquired_at(self) -> float:
        """Event-loop time (`anyio.current_time`) at which its block was entered."""
        return self._acquired_at

    @property
    def waited(self) -> float:
        """Seconds from asking for it to having it, connecting included."""
        return self._waited

    @property
    def last_confirmed(self) -> float:
        """Event-loop time (`anyio.current_time`) of the last proof that its session lives."""
        return self._grip.last_confirmed

    @property
    def connection(self) -> Connection[Any] | None:
        """The connection it is held on, where that is the user's own; free for queries."""
        return self._grip.connection

    @property
    def is_lost(self) -> bool:
        """Whether it has been lost. A lock that was released or detached has not."""
        self._look()
        return self._state is State.LOST

    async def wait_lost(self) -> LockLost:
        """Wait until it is lost.

        Returns:
            What the block will raise.

        Raises:
            LockNotHeldError: if it is released or detached instead.

        Cancellation:
            A checkpoint; nothing changes.
        """
        self._look()
        if self._ended is None:
            self._ended = anyio.Event()
            if self._state is not State.HELD:
                self._ended.set()
        await self._ended.wait()
        if self._loss is None:
            self._refuse()
        return self._error(self._loss)

    def assert_held(self) -> None:
        """Do nothing if the lock is held, as far as this program knows.

        For bodies that shield themselves from cancellation, and for other tasks.

        Raises:
            LockLost: if it has been lost.
            LockNotHeldError: if it has been released or detached.
        """
        self._look()
        if self._state is not State.HELD:
            self._refuse()

    async def refresh(self, ttl: float | None = None) -> None:
        """Make sure, by a round trip now, that the lock is held; its ttl starts anew.

        Args:
            ttl: Seconds it is held from now on; the same as before if None.

        Raises:
            LockLost: if it has been lost.
            LockNotHeldError: if it has been released or detached.
            ValueError: if ``ttl`` is not a positive number.
            psycopg.Error: what the server says, for a lock on the user's own connection;
                the lock is then held as before.

        Cancellation:
            A checkpoint; a cancelled call leaves the ttl as it was.
        """
        check_ttl(ttl)
        self.assert_held()
        is_held = True
        failure: psycopg.Error | anyio.ClosedResourceError | None = None
        with self._round_trip():
            try:
                is_held = await self._grip.confirm()
            except (psycopg.Error, anyio.ClosedResourceError) as exc:
                failure = exc
        self.assert_held()
        if not is_held:
            raise self._lose(Loss(reason="closed"))
        if failure is not None:
            raise failure
        if ttl is not None:
            self._ttl = ttl
        if self._ttl is not None:
            self._due_at = anyio.current_time() + self._ttl
            self._grip.watch.add(self._look, self._due_at)
        emit("lock.refreshed", key=self._key, ttl=self._ttl)

    async def guard(self, conn: psycopg.AsyncConnection[Any]) -> None:
        """Make the caller's transaction one that only the holder of this lock can commit.

        While the transaction is open, the next holder's block can't begin. If there has been
        a newer holder already, the transaction gets no further than this.

        Args:
            conn: A connection, to the same database, with an open transaction.

        Raises:
            LockLost: if it has been lost; with reason ``fenced`` if a newer token exists.
            LockNotHeldError: if it has been released or detached.
            LockError: if the lock is not fenced, or no transaction is open on ``conn``.
            psycopg.Error: what the server says.

        Cancellation:
            A checkpoint. A cancelled call leaves the transaction in error.
        """
        grant = self._grip.fencing
        if grant is None:
            raise LockError("only a lock that was taken with fenced=True can guard")
        self.assert_held()
        try:
            await self._grip.fence.guard(conn, self._key, grant.token)
        except LockLost:
            self.assert_held()
            raise self._lose(Loss(reason="fenced")) from None
        self.assert_held()

    async def release(self) -> None:
        """Release the lock before its block ends.

        Returns once the server has unlocked it, or it has been given up because that could
        not be confirmed (event ``lock.release_failed``).

        Raises:
            LockLost: if it has been lost.
            LockNotHeldError: if it has been released or detached already.

        Cancellation:
            Shielded, at most ``release_timeout``; a pending cancellation is then delivered.
        """
        self.assert_held()
        try:
            await _life.let_go(self)
        finally:
            self._leave_task()
        if self._state is State.LOST:
            self._refuse()
        await anyio.lowlevel.checkpoint()

    def detach(self) -> DetachedLock:
        """Keep the lock when the block ends, and no longer cancel its body when it is lost.

        It is then held until `DetachedLock.release`, or its session ends; a ttl it had does
        not count any more.

        Returns:
            What the lock goes on as.

        Raises:
            LockLost: if it has been lost.
            LockNotHeldError: if it has been released or detached already.
        """
        self.assert_held()
        self._state = State.DETACHED
        self._leave_task()
        self._end()
        self._grip.detach()
        return create(
            DetachedLock,
            self._grip,
            self._key,
            self._shared,
            self._acquired_at,
            self._release_timeout,
        )

    # ------------------------------------------------------------ loss

    def _look(self) -> None:
        """Take note of a loss that has happened and nobody has noticed yet."""
        grip = self._grip
        if self._state is not State.HELD:
            if self._release_scope is not None and grip.now() >= self._due_at:
                self._release_scope.cancel()
        elif grip.has_ended:
            self._lose(grip.diagnose())
        else:
            now = grip.now()
            if now >= self._due_at:
                self._lose(Loss(reason="expired"))
            elif now >= grip.overdue_at:
                self._lose(Loss(reason="unconfirmed"))

    def _lose(self, loss: Loss) -> LockLost:
        """It is lost: cancel what must not go on, and return the error for it."""
        self._state = State.LOST
        self._take_note(loss)
        self._end()
        self._body_scope.cancel()
        for round_trip in self._round_trips or ():
            round_trip.cancel()
        return self._error(loss)

    def _end(self) -> None:
        """The lock is not HELD any more."""
        self._grip.watch.discard(self._look)
        if self._ended is not None:
            self._ended.set()

    @contextmanager
    def _round_trip(self) -> Generator[None]:
        """Cancel a block when the lock is lost, which may not be the body's."""
        if self._round_trips is None:
            self._round_trips = set()
        with anyio.CancelScope() as scope:
            self._round_trips.add(scope)
            try:
                yield
            finally:
                self._round_trips.discard(scope)

    def _refuse(self) -> NoReturn:
        if self._loss is not None:
            raise self._error(self._loss)
        how = "detached" if self._state is State.DETACHED else "released"
        raise LockNotHeldError(f"the lock {self._key} has been {how} already")

    # ------------------------------------------------------------ its task

    def _join_task(self) -> None:
        """The current task holds it, and would wait for itself if it asked for it again."""
        grip = self._grip
        self._holding = (current_task_id(), grip.identity, self._key, grip.backend_pid)
        add_holding(*self._holding)

    def _leave_task(self) -> None:
        """No task holds it any more; idempotent."""
        if self._holding is not None:
            remove_holding(*self._holding)
            self._holding = None


def check_ttl(ttl: float | None) -> None:
    """Refuse what is no ttl.

    Raises:
        ValueError: if it is not a positive number.
    """
    given: Any = ttl
    if given is not None and not (isinstance(given, (int, float)) and given > 0):
        raise ValueError(f"ttl must be a positive number of seconds, not {ttl!r}")

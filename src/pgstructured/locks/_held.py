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

# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# The class and the functions below are one thing: they make the handles, and run their life.

from __future__ import annotations

import math
from contextlib import contextmanager
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import anyio
import psycopg

from pgstructured._util import NoPublicConstructor, create
from pgstructured.driver import current_task_id
from pgstructured.errors import LockError, LockLost, LockNotHeldError
from pgstructured.observe import emit

from ._detached import DetachedLock
from ._loss import Loss
from ._releasing import abandon, not_confirmed, unlock
from ._tasks import add_holding, remove_holding

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from pgstructured.driver import Connection

    from ._grip import Grip, LockRequest
    from ._keys import LockKey

Held = TypeVar("Held", bound="HeldLock")


class _State(Enum):
    HELD = auto()
    RELEASED = auto()
    DETACHED = auto()
    LOST = auto()


class HeldLock(metaclass=NoPublicConstructor):
    """A lock that this program holds; made by `pg_lock` and `Locks`, ended with its block."""

    __slots__ = (
        "__weakref__",
        "_acquired_at",
        "_body_scope",
        "_ended",
        "_expires_at",
        "_failure",
        "_grip",
        "_held_for",
        "_holding",
        "_key",
        "_loss",
        "_release_timeout",
        "_round_trips",
        "_shared",
        "_state",
        "_ttl",
        "_waited",
    )

    def __init__(
        self,
        grip: Grip,
        body_scope: anyio.CancelScope,
        *,
        key: LockKey,
        shared: bool,
        ttl: float | None,
        waited: float,
        release_timeout: float,
    ) -> None:
        self._grip = grip
        self._key = key
        self._shared = shared
        self._ttl = ttl
        self._waited = waited
        self._release_timeout = release_timeout
        self._state = _State.HELD
        self._loss: Loss | None = None
        self._held_for = 0.0
        self._failure: Exception | None = None
        self._ended: anyio.Event | None = None
        self._holding: tuple[int, str, LockKey, int] | None = None
        self._body_scope = body_scope
        self._round_trips: set[anyio.CancelScope] | None = None
        self._acquired_at = grip.now()
        self._expires_at = math.inf if ttl is None else self._acquired_at + ttl

    def __repr__(self) -> str:
        kind = "shared" if self._shared else "exclusive"
        return f"<{type(self).__name__} {self._key} {kind} {self._state.name.lower()}>"

    @property
    def key(self) -> LockKey:
        """The key, as Postgres sees it."""
        return self._key

    @property
    def shared(self) -> bool:
        """Whether others may hold it too, shared."""
        return self._shared

    @property
    def fencing_token(self) -> int | None:
        """A number that grows with every fenced grant of the key; None without ``fenced``."""
        grant = self._grip.fencing
        return None if grant is None else grant.token

    @property
    def previous_ended_cleanly(self) -> bool | None:
        """Whether the fenced holder before released its lock, as its last act.

        False where it died, lost the lock, or left a guarded transaction open: what it
        protected may be in the middle of something. None without ``fenced``, and for the first.
        """
        grant = self._grip.fencing
        return None if grant is None else grant.previous_ended_cleanly

    @property
    def backend_pid(self) -> int:
        """Process id of the server session that holds it."""
        return self._grip.backend_pid

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
        return self._state is _State.LOST

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
            if self._state is not _State.HELD:
                self._ended.set()
        await self._ended.wait()
        if self._state is not _State.LOST:
            self._refuse()
        return self._error()

    def assert_held(self) -> None:
        """Do nothing if the lock is held, as far as this program knows.

        For bodies that shield themselves from cancellation, and for other tasks.

        Raises:
            LockLost: if it has been lost.
            LockNotHeldError: if it has been released or detached.
        """
        self._look()
        if self._state is not _State.HELD:
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
            self._lose(Loss(reason="closed"))
            raise self._error()
        if failure is not None:
            raise failure
        if ttl is not None:
            self._ttl = ttl
        if self._ttl is not None:
            self._expires_at = anyio.current_time() + self._ttl
            self._grip.watch.add(self._look, self._expires_at)
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
            self._lose(Loss(reason="fenced"))
            raise self._error() from None
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
            await self._let_go()
        finally:
            self._leave_task()
        if self._state is _State.LOST:
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
        self._state = _State.DETACHED
        self._leave_task()
        self._end()
        self._grip.detach()
        return create(
            DetachedLock,
            self._grip,
            key=self._key,
            shared=self._shared,
            acquired_at=self._acquired_at,
            release_timeout=self._release_timeout,
        )

    # ------------------------------------------------------------ loss

    def _look(self) -> None:
        """Take note of a loss that has happened and nobody has noticed yet."""
        if self._state is not _State.HELD:
            return
        grip = self._grip
        if grip.has_ended:
            self._lose(grip.diagnose())
            return
        now = grip.now()
        if now >= self._expires_at:
            self._lose(Loss(reason="expired"))
        elif now >= grip.overdue_at:
            self._lose(Loss(reason="unconfirmed"))

    def _lose(self, loss: Loss) -> None:
        self._loss = loss
        self._state = _State.LOST
        self._held_for = anyio.current_time() - self._acquired_at
        emit(
            "lock.lost",
            key=self._key,
            reason=loss.reason,
            sqlstate=loss.sqlstate,
            held_for=self._held_for,
        )
        self._end()
        self._body_scope.cancel()
        for round_trip in self._round_trips or ():
            round_trip.cancel()

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

    def _error(self) -> LockLost:
        """Return a new error each time: several tasks may raise it, each with its own cause."""
        if self._loss is None:
            raise AssertionError("a lock that was not lost")  # pragma: no cover - for the types
        return self._loss.error(
            self._key, held_for=self._held_for, last_confirmed=self.last_confirmed
        )

    def _refuse(self) -> NoReturn:
        if self._state is _State.LOST:
            raise self._error()
        how = "detached" if self._state is _State.DETACHED else "released"
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

    # ------------------------------------------------------------ release

    async def _let_go(self) -> None:
        """Unlock a lock that is HELD: it ends RELEASED or LOST."""
        with anyio.CancelScope(shield=True) as scope:
            await self._let_go_in(scope)
        if self._failure is not None:
            await self._give_up(self._failure)

    async def _let_go_in(self, scope: anyio.CancelScope) -> None:
        """As `_let_go`, in a scope that is shielded already, and ends when time is over.

        What `_failure` tells is then to be seen to outside of it.
        """
        grip, watch = self._grip, self._grip.watch
        self._state = _State.RELEASED
        try:
            unlocking = grip.unlock()
            # While that is under way:
            watch.discard(self._look)
            now = grip.now()
            watch.bound(scope, now + self._release_timeout)
            held_for = now - self._acquired_at
            was_held = await unlocking
        except (psycopg.Error, anyio.ClosedResourceError) as exc:
            self._failure = exc
        except BaseException:
            self._failure = not_confirmed(self._release_timeout)
            raise
        else:
            if was_held:
                emit("lock.released", key=self._key, held_for=held_for)
                self._end()
                self._leave_task()
            else:
                self._lose(Loss(reason="closed"))
        finally:
            watch.unbound(scope)

    async def _give_up(self, failure: Exception) -> None:
        """Do what is to be done about an unlock that was not confirmed."""
        self._failure = None
        try:
            if (loss := self._find_end()) is not None:
                # It died before the unlock was done, so maybe before the body was.
                self._grip.forget()
                self._lose(loss)
            else:
                await abandon(self._grip, self._key, failure)
        finally:
            self._end()

    def _find_end(self) -> Loss | None:
        """Return what has ended the session, unless that was mere silence.

        Silence is no news of the time before it: the lease ran until the body had ended.
        """
        loss = self._grip.diagnose() if self._grip.has_ended else None
        return None if loss is None or loss.reason == "unconfirmed" else loss

    async def _leave(self) -> None:
        """End the block, whatever ended its body."""
        if self._failure is not None:
            await self._give_up(self._failure)
            return
        self._look()
        if self._state is _State.HELD:
            await self._let_go()
        elif self._loss is not None:
            await self._leave_lost(self._loss)

    async def _leave_lost(self, loss: Loss) -> None:
        grip = self._grip
        with anyio.CancelScope(shield=True):  # bounded inside
            if loss.reason in ("expired", "fenced"):  # the server knows of neither
                _, failure = await unlock(grip, self._release_timeout)
                if failure is not None:
                    await abandon(grip, self._key, failure)
            elif loss.reason == "unconfirmed":
                await grip.abandon()
            else:
                grip.forget()


def create_held(
    kind: Callable[..., Held],
    grip: Grip,
    body_scope: anyio.CancelScope,
    request: LockRequest,
    *,
    ttl: float | None,
    waited: float,
    release_timeout: float,
) -> Held:
    """Return the handle for a lock that was granted; its life begins with `begin`."""
    return create(
        kind,
        grip,
        body_scope,
        key=request.key,
        shared=request.shared,
        ttl=ttl,
        waited=waited,
        release_timeout=release_timeout,
    )


def begin(lock: HeldLock) -> None:
    """Begin the life of a lock that was granted."""
    grip = lock._grip
    emit(
        "lock.acquired",
        key=lock._key,
        shared=lock._shared,
        backend_pid=grip.backend_pid,
        waited=lock._waited,
    )
    lock._join_task()
    grip.watch.add(lock._look, lock._expires_at)


async def leave_well(lock: HeldLock, body_scope: anyio.CancelScope) -> None:
    """Release a lock whose body has ended well, still in its scope: the way of most locks.

    Cancellation:
        Shielded, at most ``release_timeout``.
    """
    if lock._state is _State.HELD:
        lock._look()
    if lock._state is _State.HELD:
        body_scope.shield = True
        await lock._let_go_in(body_scope)


def is_over(lock: HeldLock) -> bool:
    """Whether `leave` and `conclude` have nothing left to do for ``lock``."""
    return lock._state is _State.RELEASED and lock._failure is None


async def leave(locks: Sequence[HeldLock]) -> None:
    """Release what has not been, whatever ended the body.

    Cancellation:
        Shielded, at most ``release_timeout``.
    """
    try:
        if len(locks) == 1:
            await locks[0]._leave()
            return
        with anyio.CancelScope(shield=True):  # bounded inside
            async with anyio.create_task_group() as leaving:
                for lock in locks:
                    leaving.start_soon(lock._leave)
    finally:
        for lock in locks:
            lock._leave_task()


async def conclude(
    locks: Sequence[HeldLock], body_scope: anyio.CancelScope, body_error: Exception | None
) -> None:
    """Raise what the block is to raise.

    Raises:
        LockLost: if a lock was lost before its release; the body's own error is the cause.
        Exception: the body's own error.

    Cancellation:
        One from outside wins over `LockLost`.
    """
    for lock in locks:
        if lock._state is _State.LOST:
            if body_error is None and body_scope.cancelled_caught:
                # The loss has ended the body; but a cancellation from outside wins.
                await anyio.lowlevel.checkpoint_if_cancelled()
            raise lock._error() from body_error
    if body_error is not None:
        raise body_error


def check_ttl(ttl: float | None) -> None:
    """Refuse what is no ttl.

    Raises:
        ValueError: if it is not a positive number.
    """
    if ttl is not None and not ttl > 0:
        raise ValueError(f"ttl must be a positive number of seconds, not {ttl!r}")

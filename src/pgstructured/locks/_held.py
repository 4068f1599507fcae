"""A held lock: its body, its loss, its release. The same for every source.

==========  =========================================  ==========================
state       what ends it                               next
==========  =========================================  ==========================
HELD        end of the block, `HeldLock.release`       RELEASED
HELD        the session ended, silence, ttl            LOST
RELEASED    the unlock finds that it was lost before   LOST
LOST        -                                          -
==========  =========================================  ==========================

While it is HELD its body runs in a scope of its own, which a loss cancels. What
keeps the lock on the server (the session) is let go only after the body has
ended: a body that is cancelled has not ended yet.
"""

# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# `hold` and the class are one thing: it makes the handle, and runs its life.

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, NoReturn, final

import anyio
import psycopg

from pgstructured._util import NoPublicConstructor, create, open_background
from pgstructured.errors import LockLost, LockNotHeldError
from pgstructured.observe import emit

from ._loss import Loss

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from pgstructured.driver import Connection

    from ._grip import Grip
    from ._keys import LockKey


class _State(Enum):
    HELD = auto()
    RELEASED = auto()
    LOST = auto()


@final
class HeldLock(metaclass=NoPublicConstructor):
    """A lock that this program holds; made by `pg_lock`, ended with its block."""

    def __init__(
        self,
        grip: Grip,
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
        self._ended = anyio.Event()
        self._body_scope = anyio.CancelScope()
        self._watching = anyio.CancelScope()
        self._round_trips: set[anyio.CancelScope] = set()
        self._acquired_at = anyio.current_time()
        self._expires_at = math.inf if ttl is None else self._acquired_at + ttl

    def __repr__(self) -> str:
        kind = "shared" if self._shared else "exclusive"
        return f"<HeldLock {self._key} {kind} {self._state.name.lower()}>"

    @property
    def key(self) -> LockKey:
        """The key, as Postgres sees it."""
        return self._key

    @property
    def shared(self) -> bool:
        """Whether others may hold it too, shared."""
        return self._shared

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
        """Whether it has been lost. A released lock has not."""
        self._look()
        return self._state is _State.LOST

    async def wait_lost(self) -> LockLost:
        """Wait until it is lost.

        Returns:
            What the block will raise.

        Raises:
            LockNotHeldError: if it is released instead.

        Cancellation:
            A checkpoint; nothing changes.
        """
        self._look()
        await self._ended.wait()
        if self._state is _State.RELEASED:
            raise _not_held(self._key)
        return self._error()

    def assert_held(self) -> None:
        """Do nothing if the lock is held, as far as this program knows.

        For bodies that shield themselves from cancellation, and for other tasks.

        Raises:
            LockLost: if it has been lost.
            LockNotHeldError: if it has been released.
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
            LockNotHeldError: if it has been released.
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
        with anyio.CancelScope() as round_trip:
            self._round_trips.add(round_trip)
            try:
                is_held = await self._grip.confirm()
            except (psycopg.Error, anyio.ClosedResourceError) as exc:
                failure = exc
            finally:
                self._round_trips.discard(round_trip)
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
        self._watching.deadline = self._next_deadline()

    async def release(self) -> None:
        """Release the lock before its block ends.

        Returns once the server has unlocked it, or its session has been ended because that
        could not be confirmed (event ``lock.release_failed``).

        Raises:
            LockLost: if it has been lost.
            LockNotHeldError: if it has been released already.

        Cancellation:
            Shielded, at most ``release_timeout``; a pending cancellation is then delivered.
        """
        self.assert_held()
        await self._let_go()
        if self._state is _State.LOST:
            self._refuse()
        await anyio.lowlevel.checkpoint()

    # ------------------------------------------------------------ loss

    async def _watch(self) -> None:
        """Wait for the loss of the lock, and cancel the body when it comes.

        Shielded, until the lock is not held any more: a body that is being cancelled may still
        shield itself and wait for the loss.
        """
        while self._state is _State.HELD:
            deadline = self._next_deadline()
            with anyio.CancelScope(deadline=deadline, shield=True) as self._watching:
                await self._grip.wait_ended()
            with anyio.CancelScope(shield=True):
                # If this event loop was late, and not the server, its word is read first.
                await anyio.lowlevel.checkpoint()
            self._look()

    def _next_deadline(self) -> float:
        return min(self._expires_at, self._grip.overdue_at)

    def _look(self) -> None:
        """Take note of a loss that has happened and nobody has noticed yet."""
        if self._state is not _State.HELD:
            return
        now = anyio.current_time()
        if self._grip.has_ended:
            self._lose(self._grip.diagnose())
        elif now >= self._expires_at:
            self._lose(Loss(reason="expired"))
        elif now >= self._grip.overdue_at:
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
        self._ended.set()
        self._watching.cancel()
        self._body_scope.cancel()
        for round_trip in self._round_trips:
            round_trip.cancel()

    def _error(self) -> LockLost:
        """Return a new error each time: several tasks may raise it, each with its own cause."""
        if self._loss is None:
            raise AssertionError("a lock that was not lost")  # pragma: no cover - for the types
        return self._loss.error(
            self._key, held_for=self._held_for, last_confirmed=self.last_confirmed
        )

    def _refuse(self) -> NoReturn:
        raise _not_held(self._key) if self._state is _State.RELEASED else self._error()

    # ------------------------------------------------------------ release

    async def _let_go(self) -> None:
        """Unlock a lock that is HELD: it ends RELEASED or LOST."""
        self._state = _State.RELEASED
        self._watching.cancel()
        held_for = anyio.current_time() - self._acquired_at
        try:
            was_held, failure = await self._unlock()
            if failure is None and was_held:
                emit("lock.released", key=self._key, held_for=held_for)
            elif failure is None:
                self._lose(Loss(reason="closed"))
            elif not isinstance(failure, TimeoutError) and (loss := self._find_end()) is not None:
                # It died before the unlock was done, so maybe before the body was.
                self._lose(loss)
            else:
                with anyio.CancelScope(shield=True):  # doesn't wait for the server
                    await self._grip.end_session()
                emit("lock.release_failed", key=self._key, error=failure)
        finally:
            self._ended.set()

    def _find_end(self) -> Loss | None:
        """Return what has ended the session, unless that was mere silence.

        Silence is no news of the time before it: the lease ran until the body had ended.
        """
        loss = self._grip.diagnose() if self._grip.has_ended else None
        return None if loss is None or loss.reason == "unconfirmed" else loss

    async def _unlock(self) -> tuple[bool, Exception | None]:
        """Return whether it was held, and what kept that from being confirmed."""
        limit = self._release_timeout
        with anyio.move_on_after(limit, shield=True):
            try:
                return await self._grip.unlock(), None
            except (psycopg.Error, anyio.ClosedResourceError) as exc:
                return False, exc
        return False, TimeoutError(f"the unlock was not confirmed within {limit:g} s")

    async def _leave(self) -> None:
        """End the block, whatever ended its body."""
        self._look()
        if self._state is _State.HELD:
            await self._let_go()
        elif self._loss is not None and self._loss.reason == "expired":
            _, failure = await self._unlock()  # the server knows nothing of a ttl
            if failure is not None:
                with anyio.CancelScope(shield=True):  # doesn't wait for the server
                    await self._grip.end_session()
                emit("lock.release_failed", key=self._key, error=failure)
        elif self._loss is not None and self._loss.reason == "unconfirmed":
            with anyio.CancelScope(shield=True):  # doesn't wait for the server
                await self._grip.end_session()


@asynccontextmanager
async def hold(
    grip: Grip,
    *,
    key: LockKey,
    shared: bool,
    ttl: float | None,
    waited: float,
    release_timeout: float,
) -> AsyncGenerator[HeldLock]:
    """Run a block under a lock that was granted, and unlock it at its end.

    Raises:
        LockLost: if it was lost before its release; the body's own error is the cause.

    Cancellation:
        Entering is no checkpoint. Leaving is shielded for at most ``release_timeout``. A
        cancellation from outside wins over `LockLost`.
    """
    held = create(
        HeldLock,
        grip,
        key=key,
        shared=shared,
        ttl=ttl,
        waited=waited,
        release_timeout=release_timeout,
    )
    emit("lock.acquired", key=key, shared=shared, backend_pid=grip.backend_pid, waited=waited)
    body_error: Exception | None = None
    async with open_background() as tasks:
        tasks.start_soon(held._watch)
        try:
            with held._body_scope:
                yield held
        except Exception as exc:  # noqa: BLE001 - raised below, as it is or as a cause
            body_error = exc
        finally:
            with anyio.CancelScope(shield=True):  # bounded by release_timeout, inside
                await held._leave()
    if held._state is _State.LOST:
        if body_error is None and held._body_scope.cancelled_caught:
            # The loss has ended the body; but a cancellation from outside wins.
            await anyio.lowlevel.checkpoint_if_cancelled()
        raise held._error() from body_error
    if body_error is not None:
        raise body_error


def check_ttl(ttl: float | None) -> None:
    """Refuse what is no ttl.

    Raises:
        ValueError: if it is not a positive number.
    """
    if ttl is not None and not ttl > 0:
        raise ValueError(f"ttl must be a positive number of seconds, not {ttl!r}")


def _not_held(key: LockKey) -> LockNotHeldError:
    return LockNotHeldError(f"the lock {key} has been released already")

"""The life of a held lock, from its grant to what its block raises.

``leave_well`` is the way of most: the body has ended well, the lock is held, and one
round trip releases it. ``leave`` and ``conclude`` are for all else.
"""

# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# The handle's class and these functions are one thing: it is what its holder sees of it.

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import psycopg

from pgstructured._util import create
from pgstructured.observe import emit

from ._handle import State
from ._loss import Loss
from ._releasing import abandon, done, not_confirmed, unlock

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from ._grip import Grip, LockRequest
    from ._held import Held, HeldLock


def begin(  # noqa: PLR0917 - made for every lock, and cheapest so
    kind: Callable[..., Held],
    grip: Grip,
    body_scope: anyio.CancelScope,
    request: LockRequest,
    ttl: float | None,
    began: float,
    release_timeout: float,
) -> Held:
    """Begin the life of a lock that was granted; return its handle.

    Args:
        kind: `HeldLock`, or what extends it.
        grip: What was granted.
        body_scope: What its loss cancels.
        request: What was asked for.
        ttl: Seconds it is held.
        began: Event-loop time at which it was asked for.
        release_timeout: Seconds its unlock may take.
    """
    lock = create(kind, grip, body_scope, request, ttl, began, release_timeout)
    emit(
        "lock.acquired",
        key=request.key,
        shared=request.shared,
        backend_pid=grip.backend_pid,
        waited=lock._waited,
    )
    if not grip.is_known_to_task:
        lock._join_task()
    grip.watch.add(lock._look, lock._due_at)
    return lock


def leave_well(lock: HeldLock, body_scope: anyio.CancelScope) -> Awaitable[bool]:
    """Release a lock whose body has ended well, still in its scope.

    Returns:
        Awaitable for whether nothing is left to do but to leave the scope.

    Cancellation:
        Shielded, at most ``release_timeout``.
    """
    grip = lock._grip
    now = grip.now()
    if now >= lock._due_at or now >= grip.overdue_at or grip.has_ended:
        lock._look()
    if lock._state is not State.HELD:
        return done(is_held=False)
    body_scope.shield = True
    return _unlock_in(lock, body_scope, now)


async def let_go(lock: HeldLock) -> None:
    """Unlock a lock that is HELD: it ends RELEASED or LOST.

    Cancellation:
        Shielded, at most ``release_timeout``.
    """
    try:
        with anyio.CancelScope(shield=True) as scope:
            await _unlock_in(lock, scope, lock._grip.now())
    finally:  # asyncio's own cancellation heeds no shield
        if lock._failure is not None:
            await _give_up(lock, lock._failure)  # noqa: ASYNC102 - does not wait for the server


async def _unlock_in(lock: HeldLock, scope: anyio.CancelScope, now: float) -> bool:
    """Unlock a lock that is HELD, in a scope that is shielded, and ends when time is over.

    Args:
        lock: What to unlock.
        scope: The scope.
        now: The event-loop time.

    Returns:
        Whether it was held, and that is confirmed. Else what `HeldLock._failure` tells is to
        be seen to outside of the scope, or it is LOST.
    """
    was_held = False
    grip, watch = lock._grip, lock._grip.watch
    lock._state = State.RELEASED
    try:
        unlocking = grip.unlock()
        # While that is under way:
        lock._release_scope = scope
        lock._due_at = now + lock._release_timeout * grip.patience
        watch.add(lock._look, lock._due_at)
        was_held = await unlocking
    except (psycopg.Error, anyio.ClosedResourceError) as exc:
        lock._failure = exc
    except BaseException:
        if grip.is_unlocked:
            _note_release(lock, now)
        else:
            lock._failure = not_confirmed(lock._release_timeout)
        raise
    else:
        if was_held:
            _note_release(lock, now)
        else:
            lock._lose(Loss(reason="closed"))
    finally:
        lock._release_scope = None
        if lock._failure is not None:
            watch.discard(lock._look)
    return was_held


def _note_release(lock: HeldLock, now: float) -> None:
    """Take note that it was unlocked."""
    emit("lock.released", key=lock._key, held_for=now - lock._acquired_at)
    lock._end()
    if lock._holding is not None:
        lock._leave_task()


async def _give_up(lock: HeldLock, failure: Exception) -> None:
    """Do what is to be done about an unlock that was not confirmed."""
    lock._failure = None
    grip = lock._grip
    loss = grip.diagnose() if grip.has_ended else None
    try:
        if loss is None or loss.reason == "unconfirmed":
            # Silence is no news of the time before it: the lease ran until the body had ended.
            await abandon(grip, lock._key, failure)
        else:  # it died before the unlock was done, so maybe before the body was
            grip.forget()
            lock._lose(loss)
    finally:
        lock._end()


async def leave(locks: Sequence[HeldLock]) -> None:
    """Release what has not been, whatever ended the body.

    Cancellation:
        Shielded, at most ``release_timeout``.
    """
    try:
        if len(locks) == 1:
            await _leave(locks[0])
            return
        with anyio.CancelScope(shield=True):  # bounded inside
            async with anyio.create_task_group() as leaving:
                for lock in locks:
                    leaving.start_soon(_leave, lock)
    finally:
        for lock in locks:
            lock._leave_task()


async def _leave(lock: HeldLock) -> None:
    if lock._failure is not None:
        await _give_up(lock, lock._failure)
        return
    lock._look()
    if lock._state is State.HELD:
        await let_go(lock)
    elif lock._loss is not None:
        await _leave_lost(lock, lock._loss)


async def _leave_lost(lock: HeldLock, loss: Loss) -> None:
    grip = lock._grip
    with anyio.CancelScope(shield=True):  # bounded inside
        if loss.reason in ("expired", "fenced"):  # the server knows of neither
            _, failure = await unlock(grip, lock._release_timeout)
            if failure is not None:
                await abandon(grip, lock._key, failure)
        elif loss.reason == "unconfirmed":
            await grip.abandon()
        else:
            grip.forget()


async def conclude(
    locks: Sequence[HeldLock], body_scope: anyio.CancelScope, body_error: Exception | None
) -> None:
    """Raise what the block is to raise for the loss of a lock.

    Raises:
        LockLost: if one was lost before its release; the body's own error is the cause.

    Cancellation:
        One from outside wins over `LockLost`.
    """
    for lock in locks:
        if lock._loss is not None:
            if body_error is None and body_scope.cancelled_caught:
                # The loss has ended the body; but a cancellation from outside wins.
                await anyio.lowlevel.checkpoint_if_cancelled()
            raise lock._error(lock._loss) from body_error

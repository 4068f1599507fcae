"""Unlocking within a bound, and giving up where that fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import psycopg

from pgstructured.observe import emit

if TYPE_CHECKING:
    from ._grip import Grip
    from ._keys import LockKey


async def unlock(grip: Grip, release_timeout: float) -> tuple[bool, Exception | None]:
    """Return whether the lock was held, and what kept that from being confirmed.

    Cancellation:
        Shielded, at most ``release_timeout``.
    """
    try:
        with anyio.move_on_after(release_timeout * grip.patience, shield=True):
            try:
                return await grip.unlock(), None
            except (psycopg.Error, anyio.ClosedResourceError) as exc:
                return False, exc
    except BaseException:  # asyncio's own cancellation heeds no shield
        if not grip.is_unlocked:
            with anyio.CancelScope(shield=True):
                await grip.abandon()
        raise
    return grip.is_unlocked, None if grip.is_unlocked else not_confirmed(release_timeout)


def not_confirmed(release_timeout: float) -> TimeoutError:
    """Return the error for an unlock without an answer."""
    return TimeoutError(f"the unlock was not confirmed within {release_timeout:g} s")


async def abandon(grip: Grip, key: LockKey, failure: Exception) -> None:
    """Give up a lock whose unlock was not confirmed.

    Cancellation:
        Shielded; does not wait for the server.
    """
    with anyio.CancelScope(shield=True):
        await grip.abandon()
    emit("lock.release_failed", key=key, error=failure)


async def done(*, is_held: bool) -> bool:  # noqa: ASYNC124 - what is awaited elsewhere
    """Return at once, where others have to wait."""
    return is_held

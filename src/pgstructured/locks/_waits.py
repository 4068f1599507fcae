"""Statements that may wait, each on a lane of its own, and how they are ended.

A refusal is no proof that a lock was not granted: cancelled waits have been seen to
say so and hold it all the same. So a lane that was waited on is cleaned in any case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, final

import anyio
import psycopg

from pgstructured.driver import ConnectionState

if TYPE_CHECKING:
    from pgstructured.driver import Command, Session

    from ._lanes import Lane

_UNLOCK_ALL: Final = "SELECT pg_catalog.pg_advisory_unlock_all()"
_FIRST_PAUSE: Final = 0.05
_LAST_PAUSE: Final = 1.0


@final
class ServerWait(NamedTuple):
    """A place in the server's queue, which one task may leave to another."""

    lane: Lane
    """Where it stands; whole."""
    command: Command
    """Answered when the lock is granted, or refused."""


async def settle(lane: Lane, *, within: float) -> bool:
    """End what runs on a whole lane, and unlock what it may have got; else end the session.

    Args:
        lane: The lane.
        within: Seconds this may take.

    Returns:
        Whether the lane is fit for use.

    Cancellation:
        Shielded, at most ``within`` seconds.
    """
    session = lane.session
    is_clean = False
    try:
        with anyio.move_on_after(within, shield=True):
            try:
                await _end_statements(session)
                await session.execute(_UNLOCK_ALL)
                is_clean = True
            except (psycopg.Error, anyio.ClosedResourceError):
                pass  # then its end settles it
    except BaseException:  # asyncio's own cancellation heeds no shield
        await session.aclose(close_timeout=within)  # noqa: ASYNC102 - shields itself
        raise
    if not is_clean and session.state is ConnectionState.OPEN:
        with anyio.CancelScope(shield=True):  # doesn't wait for the server
            await session.aclose(close_timeout=0)
    return is_clean


async def _end_statements(session: Session) -> None:
    last = session.send([("", ())], may_block=True)  # answered after everything before it
    pause = _FIRST_PAUSE
    is_answered = False
    while not is_answered:
        await session.cancel()
        # A request that overtakes its statement is lost, so it is repeated.
        with anyio.move_on_after(pause):
            await last.wait()
            is_answered = True
        pause = min(pause * 2, _LAST_PAUSE)

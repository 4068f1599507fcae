"""Sessions that could not be had, or died, while a lock was being taken: again, or enough."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, final

import anyio

from pgstructured.errors import LockTimeout

from ._refusals import table_full
from ._sessions import can_retry

if TYPE_CHECKING:
    import psycopg

    from ._grip import LockRequest
    from ._options import LockOptions

_TABLE_FULL: Final = "53200"
_LAST_MOMENT: Final = 0.1
"""Seconds in which no more is tried."""


@final
class Retries:
    """The attempts of one acquire."""

    def __init__(self, options: LockOptions, request: LockRequest) -> None:
        self._options = options
        self._request = request
        limit = request.acquire_timeout
        self.deadline: float = anyio.current_time() + limit if limit else math.inf
        """Event-loop time at which the acquire is over; infinite also for a single try,
        which its session's life bounds."""
        self._give_up_at = 0.0
        self._failures = 0
        self.begin()

    def begin(self) -> None:
        """Count anew: it was connected until now."""
        limit = anyio.current_time() + self._options.connect_timeout
        self._give_up_at = self.deadline if self.deadline < math.inf else limit
        self._failures = 0

    @property
    def connect_by(self) -> float:
        """Event-loop time at which the next attempt is to give up."""
        return min(self._give_up_at, anyio.current_time() + self._options.connect_timeout)

    async def back_off(self, error: psycopg.OperationalError) -> None:
        """Wait before the next attempt, or raise where there is none.

        Raises:
            LockTimeout: if time is over; without ``acquire_timeout`` it is ``error``.
            LockCapacityError: if there is no room in the lock table for another session's.
            psycopg.OperationalError: ``error``, if another attempt can't fare better.

        Cancellation:
            A checkpoint.
        """
        if error.sqlstate == _TABLE_FULL:
            raise table_full() from error
        if not can_retry(error):
            raise error
        delay = self._options.backoff.delay(self._failures)
        self._failures += 1
        left = self._give_up_at - anyio.current_time()
        if delay >= left > _LAST_MOMENT:
            delay = left / 2  # whoever said how long to try means all of it
        if self._request.acquire_timeout != 0 and delay < left:
            await anyio.sleep(delay)
            return
        if self._request.acquire_timeout is None:
            raise error
        raise LockTimeout(
            f"the lock {self._request.key} could not be had in time, for want of a session"
        ) from error

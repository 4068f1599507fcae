"""What a pool does by itself, in tasks of its own that end with it.

========  ===================================================================
timer     ends the waiting of those whose time is over, and closes what has
          rested or lived for too long: one timer for all
filler    makes connections while there are fewer than ``min_size``, for as
          long as it takes; with ``reconnect_timeout``, also to find out
          whether there is a server again
guard     ends the pool after ``reconnect_timeout`` without one
========  ===================================================================
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, final

import anyio
import psycopg

from pgstructured._util import contained
from pgstructured.errors import PoolClosedError, PoolUnavailableError

from ._opening import AttemptFailed

if TYPE_CHECKING:
    from ._lender import Lender


@final
class Keeper:
    """The tasks of one pool.

    Args:
        lender: The pool's desk.
    """

    def __init__(self, lender: Lender) -> None:
        self._lender: Final = lender
        self._timer = anyio.CancelScope()
        self._wanted = anyio.Event()
        lender.wake_at = self._wake_at
        lender.ledger.on_free = self._refill

    def start(self, tasks: anyio.abc.TaskGroup) -> None:
        """Start everything that there is to do."""
        tasks.start_soon(self._run_timer)
        tasks.start_soon(contained, self._run_filler)
        limit = self._lender.options.reconnect_timeout
        if limit is not None:
            tasks.start_soon(self._run_guard, limit)

    # ------------------------------------------------------------ timer

    def _wake_at(self, at: float) -> None:
        self._lender.looks_at = self._timer.deadline = at

    async def _run_timer(self) -> None:
        lender = self._lender
        while True:
            lender.looks_at = self._next_deadline()
            with anyio.CancelScope(deadline=lender.looks_at) as self._timer:
                await anyio.sleep_forever()
            now = lender.now()
            lender.ledger.waiters.time_out(now)
            self._reap(now)

    def _next_deadline(self) -> float:
        ledger = self._lender.ledger
        deadline = ledger.waiters.next_deadline()
        may_shrink = ledger.size > ledger.min_size
        for member in ledger.idle:
            if may_shrink:
                deadline = min(deadline, member.idle_since + member.idle_limit)
            deadline = min(deadline, member.expires_at)
        return deadline

    def _reap(self, now: float) -> None:
        """Close what is idle and dead, or too old, or not needed; the longest idle first."""
        lender, ledger = self._lender, self._lender.ledger
        for member in tuple(ledger.idle):
            is_past_rest = member.is_past_rest(now) and ledger.size > ledger.min_size
            is_old = now >= member.expires_at
            if is_old or is_past_rest or not member.session.is_alive():
                ledger.idle.remove(member)
                lender.retire(member, "expired" if is_old else "idle" if is_past_rest else "broken")

    # ------------------------------------------------------------ filler

    def _refill(self) -> None:
        self._wanted.set()

    def _is_wanting(self) -> bool:
        lender, ledger = self._lender, self._lender.ledger
        if lender.is_closing:
            return False
        if ledger.size < ledger.min_size:
            return True
        is_in_doubt = (
            lender.options.reconnect_timeout is not None and lender.opener.failing_since is not None
        )
        # While another attempt is being made it will tell.
        is_tried = ledger.size > len(ledger.idle) + len(ledger.borrowed)
        return is_in_doubt and not is_tried and ledger.size < ledger.max_size

    async def _run_filler(self) -> None:
        lender, ledger = self._lender, self._lender.ledger
        failures = 0
        while True:
            if not self._is_wanting():
                self._wanted = anyio.Event()
                await self._wanted.wait()
                continue
            ledger.take_slot()  # there is one: min_size is not above max_size
            try:
                member = await lender.open()
            except AttemptFailed:
                ledger.free_slot()
            except PoolClosedError:
                ledger.free_slot()
                return
            except psycopg.Error as exc:
                ledger.free_slot()  # on_connect's own; as good as no connection
                lender.opener.take_note(exc)
            except BaseException:
                ledger.free_slot()
                raise
            else:
                failures = 0
                lender.put_back(member)
                continue
            await anyio.sleep(lender.options.backoff.delay(failures))
            failures += 1

    # ------------------------------------------------------------ guard

    async def _run_guard(self, limit: float) -> None:
        opener = self._lender.opener
        while True:
            since = opener.failing_since
            with anyio.CancelScope(deadline=math.inf if since is None else since + limit):
                self._refill()
                await opener.wait_change()
                continue
            raise PoolUnavailableError(
                f"the server could not be reached for {limit:g} s: {opener.last_error}"
            ) from opener.last_error

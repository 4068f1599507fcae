"""Lending connections: what all acquires of a pool go through.

==============  =============================================================
a connection    goes to
==============  =============================================================
idle            the newcomer, if it lives and its time is not over
being made      whoever makes it, in its own task; a cancelled maker gives up
                the attempt and the slot
given back      the first in line; to nobody who has been cancelled meanwhile
==============  =============================================================

Between getting a connection and having its holder noted nothing is awaited, so there is no
moment at which a cancellation could lose one.
"""

from __future__ import annotations

import math
from time import perf_counter
from typing import TYPE_CHECKING, Final, final

import anyio
from psycopg.errors import ConnectionTimeout

from pgstructured.driver import create_parking
from pgstructured.errors import PoolNestedAcquireError, PoolTimeoutError, TooManyWaitingError
from pgstructured.observe import emit

from ._opening import AttemptFailed
from ._returning import TELLING, Returns
from ._waiters import Grant, Waiter

if TYPE_CHECKING:
    from ._members import Member
    from ._options import ConnectionHook

_TURN: Final = 0.002
"""Seconds that acquires which needn't wait may take before the event loop gets its turn."""
_STILL_WARM: Final = 0.0005
"""Seconds; what was in use so short a time ago need not be looked at: that it has died since
is as likely as that it dies now."""
_CHECK_TIMEOUT: Final = 5.0
"""Seconds that a connection which has rested has for a sign of life."""
_SHORTEST: Final = 0.001
"""Seconds; what a question is given at least."""
_LAST_TRY: Final = 0.02
"""Seconds; with less time left there is no other attempt to connect."""


@final
class Lender(Returns):
    """The side of the desk where connections are borrowed."""

    def lend_now(self, task: object) -> Member | None:
        """Lend an idle connection that needs no more than a look; None where there is none."""
        idle = self.ledger.idle
        if not idle or self._prepares_always:
            return None
        now = self.now()
        member = idle[-1]
        if now >= self._turn_at or now >= member.fresh_until:
            return None
        session = member.session
        if not session.is_at_rest() or (
            perf_counter() - member.used_at > _STILL_WARM and not session.is_quiet()
        ):
            return None
        del idle[-1]
        member.borrowed_at = now
        member.holder = task
        self.holders[task] = member
        self.ledger.borrowed.add(member)
        self.counters.acquired += 1
        emit("pool.acquired", pool=self._name, waited=0.0)
        return member

    async def lend(self, task: object) -> Member:
        """Lend a connection to the current task.

        Raises:
            PoolError: if there is none to be had.
            Exception: why connecting failed, where that can't heal; what a hook raises.

        Cancellation:
            A checkpoint. A cancelled call takes nothing.
        """
        started = now = self.now()
        if now >= self._turn_at:
            await anyio.lowlevel.checkpoint()
            now = self.now()
            self._turn_at = now + _TURN
        hook = self.options.on_acquire
        while True:
            if self.is_closing:
                raise self.closed()
            member = self._take_idle(now)
            if member is None or self._is_doubtful(member, now):
                member = await self._find_slowly(member, started)
                now = self.now()
            self.counters.acquired += 1
            waited = now - started
            self.counters.acquire_wait_seconds += waited
            member.borrowed_at = now
            member.holder = task
            self.holders[task] = member
            self.ledger.borrowed.add(member)
            emit("pool.acquired", pool=self._name, waited=waited)
            if hook is None or await self._prepare(member, hook, self.deadline(started)):
                return member
            now = self.now()

    async def share(self, member: Member) -> Member:
        """Lend the calling task what it holds already, if that is pinned.

        Raises:
            PoolNestedAcquireError: if it is not.
            PoolClosedError: if the pool is closed.

        Cancellation:
            A checkpoint; nothing changes.
        """
        if not member.is_pinned:
            raise PoolNestedAcquireError(
                f"this task holds a connection of {self!r} already, and could wait for another"
                " one for ever; use that one, or pin() it"
            )
        await anyio.lowlevel.checkpoint()
        if self.is_closing:
            raise self.closed()
        return member

    def deadline(self, started: float | None = None) -> float:
        """Return the event-loop time at which an acquire is over that begins now."""
        limit = self.options.acquire_timeout
        if limit is None:
            return math.inf
        return (self.now() if started is None else started) + limit

    async def make(self, deadline: float) -> None:
        """Make one more connection, in a slot of the caller's, for whoever wants it.

        Raises:
            PoolError: if it could not be made in time.
            Exception: why connecting failed, where that can't heal; what ``on_connect`` raises.

        Cancellation:
            A checkpoint. A cancelled call makes none.
        """
        self._tickets += 1
        self.put_back(await self._connect(self._tickets, deadline))

    async def _find_slowly(self, member: Member | None, started: float) -> Member:
        deadline = self.deadline(started)
        self._tickets += 1
        ticket = self._tickets
        try:
            found = await self._find(member, ticket, deadline)
        except anyio.get_cancelled_exc_class():
            self.counters.acquire_cancelled += 1
            raise
        except PoolTimeoutError:
            self.counters.acquire_timeouts += 1
            raise
        finally:
            self.tell_change()
        if self.is_closing:
            self.retire(found, "closed")
            raise self.closed()
        return found

    async def _find(self, member: Member | None, ticket: int, deadline: float) -> Member:
        while member is not None:  # it is idle, and has been for long
            limit = min(_CHECK_TIMEOUT, max(deadline - self.now(), _SHORTEST))
            if await self.answers(member, limit):
                return member
            if limit == _CHECK_TIMEOUT and isinstance(member.conn.failure, ConnectionTimeout):
                self._retire_rested(member)
            member = self._take_idle(self.now())
        return await self._obtain(ticket, deadline)

    def _take_idle(self, now: float) -> Member | None:
        """Take the idle connection that was used last; what is dead or too old is closed."""
        idle = self.ledger.idle
        while idle:
            member = idle.pop()
            if now >= member.expires_at:
                self.retire(member, "expired")
            elif member.is_past_rest(now) and self.ledger.size > self.ledger.min_size:
                self.retire(member, "idle")
            elif not (member.session.is_at_rest() and member.session.is_alive()):
                self.retire(member, "broken")
            else:
                return member
        return None

    def _retire_rested(self, silent: Member) -> None:
        """Close what has rested longer than one that is silent; it would be asked in vain.

        Where a firewall has forgotten idle connections it has forgotten them all, and to ask
        each would take longer than an acquire may.
        """
        idle = self.ledger.idle
        while idle and idle[0].idle_since <= silent.idle_since:
            self.retire(idle.pop(0), "broken")

    def _is_doubtful(self, member: Member, now: float) -> bool:
        return now - member.idle_since >= self._check_after

    async def answers(self, member: Member, limit: float = _CHECK_TIMEOUT) -> bool:
        """Ask for a sign of life, within ``limit`` seconds; without it the connection is closed.

        Cancellation:
            A checkpoint. A cancelled call puts the connection back.
        """
        answers = False
        try:
            with self.noted_under_way():
                answers = await member.session.answers(limit)
        except BaseException:
            self.put_back(member)
            raise
        if not answers:
            self.put_back(member)
        return answers

    async def _obtain(self, ticket: int, deadline: float) -> Member:
        """Get a connection that is given back, or make one."""
        ledger = self.ledger
        if ledger.take_slot():
            return await self._connect(ticket, deadline)
        most = self.options.max_waiting
        if most is not None and len(ledger.waiters) >= most:
            raise TooManyWaitingError(
                f"{len(ledger.waiters)} tasks wait for a connection already ({self.figures()})"
            )
        grant = await self._wait(ticket, deadline, has_slot=False)
        if grant is Grant.SLOT:
            return await self._connect(ticket, deadline)
        if isinstance(grant, Grant):
            raise self.late(self.opener.last_error)
        return grant

    async def _connect(self, ticket: int, deadline: float) -> Member:
        """Make a connection, again and again where that may help; the caller has a slot."""
        failures = 0
        try:
            while True:
                try:
                    return await self.open(deadline)
                except AttemptFailed as failed:
                    error, may_heal = failed.error, failed.may_heal
                if not may_heal:
                    raise error
                left = deadline - self.now()
                if left <= 0:
                    raise self.late(error)
                delay = self.options.backoff.delay(failures)
                failures += 1
                # Never so long that the time ends without another attempt.
                delay = min(delay, left / 2) if left > _LAST_TRY else left
                grant = await self._wait(ticket, self.now() + delay, has_slot=True)
                if not isinstance(grant, Grant):
                    break
        except BaseException:
            self.ledger.free_slot()
            raise
        self.ledger.free_slot()
        return grant

    async def open(self, deadline: float = math.inf) -> Member:
        """Make one connection, in a slot of the caller's.

        Raises:
            AttemptFailed: if it fails.
            PoolClosedError: if the pool is being closed.

        Cancellation:
            A checkpoint. A cancelled call leaves no connection behind.
        """
        with self.noted_under_way():
            if self.is_closing:
                raise self.closed()
            return await self.opener.open(deadline, generation=self.ledger.generation)
        raise self.closed()

    async def _wait(self, ticket: int, deadline: float, *, has_slot: bool) -> Member | Grant:
        """Stand in line.

        Raises:
            PoolClosedError: if the pool is being closed.

        Cancellation:
            A checkpoint. What a cancelled call was given goes to the next in line.
        """
        waiters, parkings = self.ledger.waiters, self._parkings
        parking = parkings.pop() if parkings else create_parking()
        waiter = Waiter(ticket, deadline, parking, has_slot=has_slot)
        waiters.join(waiter)
        if deadline < self.looks_at:
            self.wake_at(deadline)
        try:
            await parking.wait()
        except BaseException:
            if waiter.grant is None:
                waiters.leave(waiter)
            elif waiter.grant is Grant.SLOT:
                self.ledger.free_slot()
            elif not isinstance(waiter.grant, Grant):  # pragma: no branch - told of an end
                self.put_back(waiter.grant)
            raise
        finally:
            parkings.append(parking)
        grant = waiter.grant
        if grant is None or grant is Grant.CLOSED:
            raise self.closed()
        return grant

    async def _prepare(self, member: Member, hook: ConnectionHook, deadline: float) -> bool:
        """Run ``on_acquire``; what it doesn't make ready is taken back.

        Returns:
            Whether the connection is ready; else the hook has closed it.

        Raises:
            PoolTimeoutError: if it has not ended by the event-loop time ``deadline``.
            PoolClosedError: if the pool has closed the connection under it.
            Exception: what it raises.

        Cancellation:
            As the hook; taking back is shielded and bounded.
        """
        try:
            with anyio.CancelScope(deadline=deadline) as scope:
                await hook(member.conn)
        except Exception as exc:
            self.unbind(member)
            was_closed = self.is_closed_under(member)
            self.end_loan(member, self.now())
            await self.close(member, "unusable")  # noqa: ASYNC120 - shielded and bounded inside
            if was_closed and isinstance(exc, TELLING):
                raise self.closed() from exc
            raise
        except BaseException as exc:
            self.unbind(member)
            await self.take_back(member, exc)  # noqa: ASYNC102 - shielded and bounded inside
            raise
        if not scope.cancelled_caught and not member.conn.closed:
            return True
        self.unbind(member)
        if not scope.cancelled_caught:
            self.take_back_closed(member)
            return False
        self.counters.acquire_timeouts += 1
        error = self.late(None, "on_acquire has not ended")
        await self.take_back(member, error)
        raise error

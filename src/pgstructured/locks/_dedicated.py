"""Locks on sessions of their own, one for each.

The session ends with its lock, so wherever there is doubt whether the server has
granted one (an acquire that was cancelled, timed out or failed; an unlock without an
answer) the end of the session settles it. A refusal is no proof: cancelled and
timed-out waits have been seen to say so and hold the lock all the same.
"""

from __future__ import annotations

import math
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import anyio
import psycopg

from pgstructured.driver import ConnectionState
from pgstructured.errors import ConnectionLostError, LockTimeout

from ._loss import Loss, diagnose
from ._refusals import already_held, not_in_time, translated
from ._sessions import can_retry, open_lock_session
from ._statements import Answer, try_statement, unlock_statement, wait_statement
from ._tasks import holds_elsewhere

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from pgstructured.driver import Conninfo, Session

    from ._grip import Grip, LockRequest
    from ._options import LockOptions


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SessionGrip:
    """A lock on a `Session` of its own."""

    session: Session
    request: LockRequest
    identity: str
    lost_after: float
    connection: None = None

    @property
    def backend_pid(self) -> int:
        return self.session.backend_pid

    @property
    def last_confirmed(self) -> float:
        return self.session.last_confirmed

    @property
    def overdue_at(self) -> float:
        return self.session.last_confirmed + self.lost_after

    @property
    def has_ended(self) -> bool:
        return self.session.state is not ConnectionState.OPEN

    async def wait_ended(self) -> None:
        await self.session.wait_closed()

    def diagnose(self) -> Loss:
        is_overdue = anyio.current_time() >= self.overdue_at
        return diagnose(self.session.failure, is_overdue=is_overdue)

    async def confirm(self) -> bool:
        await self.session.ping()
        return True  # nobody else can unlock on this session

    async def unlock(self) -> bool:
        statement = unlock_statement(self.request.key, shared=self.request.shared)
        was_held = (await self.session.execute(statement)).scalar() == "true"
        # Nothing else is on it, and a lock released early may have a long block.
        await self.session.aclose(close_timeout=0)
        return was_held

    async def end_session(self) -> None:
        await self.session.aclose(close_timeout=0)


@final
class DedicatedSource:
    """Takes each lock on a session of its own.

    Args:
        conninfo: Where to connect.
        options: How the sessions live.
    """

    def __init__(self, conninfo: Conninfo, options: LockOptions) -> None:
        self._conninfo = conninfo
        self._options = options

    @property
    def release_timeout(self) -> float:
        """Seconds an unlock may take."""
        return self._options.release_timeout

    @asynccontextmanager
    async def take(self, request: LockRequest) -> AsyncGenerator[Grip | None]:
        """Take a lock for the length of a block; see `LockSource.take`."""
        async with AsyncExitStack() as session_stack:
            yield await _Acquire(self._conninfo, self._options, request).run(session_stack)


class _Acquire:
    """One acquire: sessions that come and go until one of them is granted the lock."""

    def __init__(self, conninfo: Conninfo, options: LockOptions, request: LockRequest) -> None:
        self._conninfo = conninfo
        self._options = options
        self._request = request
        now = anyio.current_time()
        limit = request.acquire_timeout
        # Infinite also for a single try, which its session's life bounds.
        self._deadline = now + limit if limit else math.inf
        self._connect_by = 0.0
        self._failures = 0
        self._begin_connecting()

    def _begin_connecting(self) -> None:
        limit = anyio.current_time() + self._options.connect_timeout
        self._connect_by = self._deadline if self._deadline < math.inf else limit
        self._failures = 0

    async def run(self, session_stack: AsyncExitStack) -> SessionGrip | None:
        """Return the grip, with its session's end on the stack; None after a refused try."""
        while True:
            try:
                async with AsyncExitStack() as attempt:
                    connect_by = min(
                        self._connect_by, anyio.current_time() + self._options.connect_timeout
                    )
                    session = await attempt.enter_async_context(
                        open_lock_session(self._conninfo, self._options, connect_by=connect_by)
                    )
                    grip = await self._take_on(session)
                    if grip is not None:
                        session_stack.push_async_exit(attempt.pop_all())
                    return grip
            except psycopg.OperationalError as exc:
                if not can_retry(exc):
                    raise
                error = exc
            await self._back_off(error)

    async def _back_off(self, error: Exception) -> None:
        """Wait before the next attempt, or raise where there is none."""
        delay = self._options.backoff.delay(self._failures)
        self._failures += 1
        if self._request.acquire_timeout != 0 and anyio.current_time() + delay < self._connect_by:
            await anyio.sleep(delay)
            return
        if self._request.acquire_timeout is None:
            raise error
        raise LockTimeout(
            f"the lock {self._request.key} could not be had in time, for want of a session"
        ) from error

    async def _take_on(self, session: Session) -> SessionGrip | None:
        key, shared = self._request.key, self._request.shared
        with anyio.CancelScope(deadline=self._deadline), translated(key):
            statement = try_statement(key, shared=shared)
            answer = Answer(*(await session.execute(statement)).rows[0])
            identity = str(answer.identity)
            if answer.verdict != "granted":
                if holds_elsewhere(identity, key, session.backend_pid):
                    raise already_held(key)
                if self._request.is_try:
                    return None
                if not self._request.may_wait:
                    raise not_in_time(self._request)
                await self._wait_on(session)
            return SessionGrip(
                session=session,
                request=self._request,
                identity=identity,
                lost_after=self._options.lost_after,
            )
        raise not_in_time(self._request)

    async def _wait_on(self, session: Session) -> None:
        """Stand in the server's queue."""
        try:
            await session.execute(
                wait_statement(self._request.key, shared=self._request.shared), may_block=True
            )
            # The lease runs from a round trip after the grant, not from before the wait.
            await session.ping()
        except ConnectionLostError:
            self._begin_connecting()  # it was connected until now; queue anew
            raise

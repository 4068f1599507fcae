"""Locks on the user's own connection.

Nothing of it is changed, and nothing is left on it: a lock, a transaction, a
setting. What Postgres counts (the same key taken again) stays counted, so it has to be
known for certain whether an interrupted statement has added one to the count:

=======================  =====================================================
interrupted              then
=======================  =====================================================
the try                  it is let come to its end, its answer says
the wait                 the try before it was refused, so this session did not
                         hold the lock: it is unlocked if ``pg_locks`` shows it
either, without answer   the connection is closed
=======================  =====================================================
"""

from __future__ import annotations

import math
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Protocol, final
from weakref import WeakKeyDictionary

import anyio
import psycopg

from pgstructured._util import open_background
from pgstructured.driver import (
    Connection,
    ConnectionState,
    Statement,
    conninfo_of,
    hold_turn,
    is_session_pooled,
    keep_watched,
)
from pgstructured.observe import emit

from ._fencing import FenceGrant, FenceTable, TokenWithheldError
from ._loss import Loss, diagnose
from ._refusals import (
    already_held,
    not_in_time,
    not_primary,
    refuse,
    session_required,
    translated,
)
from ._sessions import fetch_grant
from ._statements import (
    Answer,
    held_condition,
    try_statement,
    unlock_statement,
    wait_statement,
)
from ._tasks import holds_elsewhere
from ._watch import Watch

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from ._grip import Grip, LockRequest
    from ._options import LockOptions

_acquiring: Final[WeakKeyDictionary[Connection[Any], anyio.Lock]] = WeakKeyDictionary()
"""One acquire at a time on each connection: it could do no more than one at once anyway."""

_SAVEPOINT: Final = "pgstructured_lock"
_TO_SETTLE: Final = 0.75
"""The part of ``release_timeout`` that a cancelled statement has to settle; the rest is for
giving back what it may have got."""
_TO_UNLOCK: Final = 0.75
"""The part of it that an unlock waits, for its turn after another task's operation too; the rest
is to settle in, or for that turn, where asyncio itself has cancelled it."""


class ConnectionLender(Protocol):
    """Whose connection it is that a lock is on, where that is lent."""

    def keep(self) -> None:
        """Keep the connection when the block ends that it was lent for."""
        ...

    async def give_back(self) -> None:
        """Give back what was kept.

        Cancellation:
            Shielded and bounded.
        """
        ...

    def drop(self) -> None:
        """Give back what was kept and is closed."""
        ...


@final
class ConnectionGrip:
    """A lock on a `Connection`."""

    overdue_at = math.inf  # silence is for the connection's own heartbeat to notice
    is_known_to_task = False
    patience: float = _TO_UNLOCK
    now = staticmethod(anyio.current_time)

    def __init__(
        self,
        conn: Connection[Any],
        request: LockRequest,
        answer: Answer,
        *,
        confirmed_at: float,
        release_timeout: float,
        fence_table: str,
        lender: ConnectionLender | None,
    ) -> None:
        self._request = request
        self._lender = lender
        self._is_kept = False
        self._release_timeout = release_timeout
        self.is_unlocked = False
        self.connection = conn
        self.backend_pid = int(answer.backend_pid or 0)
        self.identity = str(answer.identity)
        self.last_confirmed = confirmed_at
        self.fencing: FenceGrant | None = None
        self.fence = FenceTable(fence_table)
        self.watch = Watch(lambda: self.overdue_at)

    @property
    def has_ended(self) -> bool:
        return self.connection.state is not ConnectionState.OPEN

    async def wait_ended(self) -> None:
        async with open_background() as tasks:
            tasks.start_soon(keep_watched, self.connection)
            await self.connection.wait_closed()

    def diagnose(self) -> Loss:
        return diagnose(self.connection.failure, is_overdue=False)

    async def confirm(self) -> bool:
        asked_at = anyio.current_time()
        condition = held_condition(self._request.key, shared=self._request.shared)
        settle_timeout = self._release_timeout * _TO_SETTLE
        statement = Statement(
            self.connection, f"SELECT 1{condition}", settle_timeout=settle_timeout
        )
        # To its end: a transaction of theirs must not fail because a refresh was cancelled.
        rows = await statement.run_to_end()
        self.last_confirmed = asked_at
        return bool(rows)

    async def unlock(self) -> bool:
        if self.fencing is None:
            text = unlock_statement(self._request.key, shared=self._request.shared)
        else:
            text = self.fence.unlock_statement(self._request.key, self.fencing.token)
        left = self._release_timeout * (1 - _TO_UNLOCK)
        statement = Statement(self.connection, text, settle_timeout=left)
        try:
            # To its end: asyncio's own cancellation, which heeds no shield, is no reason to
            # close the user's connection.
            await statement.run_to_end()
        except anyio.get_cancelled_exc_class():
            if not statement.was_sent:  # nor to close it for another task that works on it
                statement = Statement(self.connection, text, settle_timeout=0)
                # An error leaves it not unlocked, which whoever is cancelled here sees to.
                with suppress(psycopg.Error), anyio.move_on_after(left, shield=True):
                    await statement.run_to_end()
            raise
        finally:
            self.is_unlocked = statement.rows == [("true",)]
            if self.is_unlocked and self._is_kept and self._lender is not None:
                self._is_kept = False
                await self._lender.give_back()  # noqa: ASYNC102 - shielded and bounded inside
        return self.is_unlocked

    async def abandon(self) -> None:
        await self.connection.aclose()
        self.forget()

    def forget(self) -> None:
        """Take note that the lock is gone; a connection that it has kept goes back."""
        if self._is_kept and self._lender is not None:
            self._is_kept = False
            self._lender.drop()

    def detach(self) -> None:
        """Keep the connection where it is lent; the user's own is not the block's."""
        if self._lender is not None:
            self._is_kept = True
            self._lender.keep()

    @asynccontextmanager
    async def attend(self) -> AsyncGenerator[None]:
        async with open_background() as tasks:
            tasks.start_soon(self._look_at_end)
            yield

    async def _look_at_end(self) -> None:
        await self.wait_ended()
        self.watch.look()


@final
class ConnectionSource:
    """Takes locks on the user's own connection.

    Args:
        conn: The connection.
        options: How long clean-up may take.
        lender: Whose it is, if it is lent.
    """

    def __init__(
        self,
        conn: Connection[Any],
        options: LockOptions,
        lender: ConnectionLender | None = None,
    ) -> None:
        self._conn = conn
        self._lender = lender
        self._options = options
        self._release_timeout = options.release_timeout
        self._settle_timeout = options.release_timeout * _TO_SETTLE

    now = staticmethod(anyio.current_time)
    create_scope = anyio.CancelScope
    ask = None

    @property
    def release_timeout(self) -> float:
        """Seconds an unlock may take."""
        return self._release_timeout

    @asynccontextmanager
    async def take(self, request: LockRequest) -> AsyncGenerator[Grip | None]:
        """Take a lock for the length of a block; see `LockSource.take`."""
        grip = await self._acquire(request)
        if grip is None:
            yield None
            return
        async with grip.watch.running(grip.wait_ended):
            yield grip

    async def _acquire(self, request: LockRequest) -> ConnectionGrip | None:
        conn = self._conn
        limit = request.acquire_timeout
        with anyio.move_on_after(limit or None):
            async with _acquiring.setdefault(conn, anyio.Lock()):
                with translated(request.key):
                    asked_at = anyio.current_time()
                    answer = await self._try(request)
                    if answer.verdict != "granted":
                        identity, pid = str(answer.identity), int(answer.backend_pid or 0)
                        if holds_elsewhere(identity, request.key, pid):
                            raise already_held(request.key)
                        if not request.may_wait:
                            refuse(request)
                            return None
                        emit("lock.contended", key=request.key, shared=request.shared)
                        asked_at = await self._wait(request)
                    grip = ConnectionGrip(
                        conn,
                        request,
                        answer,
                        confirmed_at=asked_at,
                        release_timeout=self._release_timeout,
                        fence_table=self._options.fence_table,
                        lender=self._lender,
                    )
                    if request.fenced:
                        try:
                            grip.fencing = await self._fence(request)
                        except TokenWithheldError:
                            refuse(request)
                            return None
            return grip
        raise not_in_time(request)

    async def _fence(self, request: LockRequest) -> FenceGrant:
        """Return a new token, from a session of its own: durable whatever becomes of theirs."""
        connect_by = anyio.current_time() + self._options.connect_timeout
        try:
            return await fetch_grant(
                conninfo_of(self._conn), self._options, request, connect_by=connect_by
            )
        except BaseException:
            is_done = False
            with anyio.move_on_after(self._release_timeout, shield=True):
                async with hold_turn(self._conn):
                    await self._give_back(request)
                    is_done = True
            if not is_done:  # another task's query is on it
                with anyio.CancelScope(shield=True):  # bounded by its close_timeout
                    await self._conn.aclose()
            raise

    # ------------------------------------------------------------ the try

    async def _try(self, request: LockRequest) -> Answer:
        """Take the lock if it is free, and know for certain whether."""
        conn = self._conn
        # A closed one has no process id; running the statement says what has become of it.
        is_unknown = conn.closed or is_session_pooled(conn)
        pid = None if is_unknown else conn.pgconn.backend_pid
        text = try_statement(request.key, shared=request.shared, announced_pid=pid)
        statement = self._statement(text)
        async with hold_turn(conn):
            try:
                rows = await statement.run_to_end()
            except BaseException:
                if statement.rows and Answer(*statement.rows[0]).verdict == "granted":
                    await self._give_back(request)  # noqa: ASYNC102 - bounded by release_timeout inside
                raise
        answer = Answer(*rows[0])
        if answer.verdict == "standby":
            raise not_primary()
        if answer.verdict == "pooled":
            raise session_required()
        return answer

    # ------------------------------------------------------------ the wait

    async def _wait(self, request: LockRequest) -> float:
        """Stand in the server's queue; return when the proof of life behind it was asked for."""
        conn = self._conn
        text = wait_statement(request.key, shared=request.shared)
        # In one turn: where others share the connection, nothing of theirs may come between
        # the savepoint and its end, and nothing keep the clean-up waiting.
        async with hold_turn(conn):
            is_idle = conn.info.transaction_status.name == "IDLE"
            savepoint = self._statement(f"SAVEPOINT {_SAVEPOINT}")
            wait = self._statement(text)
            # The end of it proves that the session lives, as well as a statement of its own.
            proof = self._statement("SELECT 1" if is_idle else f"RELEASE SAVEPOINT {_SAVEPOINT}")
            try:
                if not is_idle:  # a wait that ends badly must not spoil their transaction
                    await savepoint.run_to_end()
                await wait.run()
                asked_at = anyio.current_time()
                await proof.run_to_end()
            except BaseException:
                is_set = savepoint.rows is not None and proof.rows is None
                if is_set or wait.was_sent:
                    await self._give_back(request, to_savepoint=is_set)  # noqa: ASYNC102 - bounded by release_timeout inside
                raise
        return asked_at

    def _statement(self, text: str) -> Statement:
        return Statement(self._conn, text, settle_timeout=self._settle_timeout, in_turn=True)

    async def _give_back(self, request: LockRequest, *, to_savepoint: bool = False) -> None:
        """Unlock once what this session holds, or close the connection; in its turn."""
        conn = self._conn
        if conn.state is not ConnectionState.OPEN:
            return  # and the lock, if it was one, has ended with it
        unlock = unlock_statement(request.key, shared=request.shared)
        texts = [unlock + held_condition(request.key, shared=request.shared)]
        if to_savepoint:
            texts = [f"{how} SAVEPOINT {_SAVEPOINT}" for how in ("ROLLBACK TO", "RELEASE")] + texts
        failure: psycopg.Error = psycopg.errors.ConnectionTimeout("the unlock was not confirmed")
        is_done = False
        with anyio.move_on_after(self._release_timeout * (1 - _TO_SETTLE), shield=True):
            try:
                for text in texts:
                    await Statement(conn, text, settle_timeout=0, in_turn=True).run()
                is_done = True
            except psycopg.Error as exc:
                failure = exc
        if not is_done:
            emit("lock.release_failed", key=request.key, error=failure)
            with anyio.CancelScope(shield=True):  # bounded by the connection's close_timeout
                await conn.aclose()

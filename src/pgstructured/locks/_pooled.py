"""Locks on a connection of a pool, borrowed for the block.

It is the current task's meanwhile, as a pin is: what the task acquires of the pool in the
block runs on the lock's own session, so a task can neither wait for itself nor write past
a lock that it has lost. Behind a transaction pooler no connection of the pool can hold a
lock; there one is made that leads past it.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, final

import anyio
import psycopg

from pgstructured.driver import connect
from pgstructured.errors import LockTimeout
from pgstructured.pool import direct_conninfo, lend_session, session_required

from ._borrowed import ConnectionSource
from ._refusals import not_in_time
from ._retrying import Retries

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from pgstructured.driver import Connection, Conninfo
    from pgstructured.pool import Loan, Pool

    from ._borrowed import ConnectionLender
    from ._grip import Grip, LockRequest
    from ._options import LockOptions


@final
class PoolSource:
    """Takes locks on connections of a pool.

    Args:
        pool: The pool.
        options: How long clean-up may take.
    """

    def __init__(self, pool: Pool, options: LockOptions) -> None:
        self._pool = pool
        self._options = options

    now = staticmethod(anyio.current_time)
    create_scope = anyio.CancelScope
    ask = None

    @property
    def release_timeout(self) -> float:
        """Seconds an unlock may take."""
        return self._options.release_timeout

    @asynccontextmanager
    async def take(self, request: LockRequest) -> AsyncGenerator[Grip | None]:
        """Take a lock for the length of a block; see `LockSource.take`."""
        began = anyio.current_time()
        async with AsyncExitStack() as stack:
            lender: ConnectionLender
            loan = lender = await self._borrow(request, stack)
            conn = loan.conn
            if loan.pools_transactions:
                await stack.aclose()
                conninfo = direct_conninfo(self._pool)
                if conninfo is None:
                    raise session_required()
                conn = await self._connect(conninfo, request)
                lender = own = _OwnConnection(conn)
                stack.push_async_callback(own.leave)
            left = request
            if request.acquire_timeout:
                seconds = began + request.acquire_timeout - anyio.current_time()
                # Not 0: that would be one try.
                left = request._replace(acquire_timeout=max(seconds, 1e-6))
            taking = ConnectionSource(conn, self._options, lender).take(left)
            try:
                grip = await stack.enter_async_context(taking)
            except LockTimeout:
                raise not_in_time(request) from None
            yield grip

    async def _borrow(self, request: LockRequest, stack: AsyncExitStack) -> Loan:
        with anyio.move_on_after(request.acquire_timeout or None):
            return await stack.enter_async_context(lend_session(self._pool))
        raise not_in_time(request)

    async def _connect(self, conninfo: Conninfo, request: LockRequest) -> Connection[Any]:
        retries = Retries(self._options, request)
        while True:
            try:
                return await connect(
                    conninfo,
                    connect_timeout=max(retries.connect_by - anyio.current_time(), 1e-3),
                    fallback_application_name=self._options.application_name,
                )
            except psycopg.OperationalError as exc:
                error = exc
            await retries.back_off(error)


@final
class _OwnConnection:
    """A connection that was made for one lock."""

    def __init__(self, conn: Connection[Any]) -> None:
        self._conn = conn
        self._is_kept = False

    async def leave(self) -> None:
        """End the block that it was made for."""
        if not self._is_kept:
            await self.give_back()

    def keep(self) -> None:
        self._is_kept = True

    async def give_back(self) -> None:
        with anyio.CancelScope(shield=True):  # bounded by its close_timeout
            await self._conn.aclose()

    def drop(self) -> None:
        """Nothing is left to do: it is closed."""

# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# A subclass of psycopg's transaction has to know psycopg's private names.
"""Transaction blocks that end within bounds, cancelled or not."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, cast

import psycopg
from psycopg import pq

from ._driving import Work

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from psycopg.abc import PQGen

    from ._connection import Connection

logger = logging.getLogger("psycopg")

_OK: Final = pq.ConnStatus.OK
_INERROR: Final = pq.TransactionStatus.INERROR


class AsyncTransaction(psycopg.AsyncTransaction):
    """See `psycopg.AsyncTransaction`, whose place it takes, also by its name."""

    __module__ = "psycopg"

    is_committed = False
    """Whether COMMIT, or the release of the savepoint, was sent and has not failed."""

    @property
    def is_outermost(self) -> bool:
        """Whether it is a transaction, not a savepoint in one."""
        return self._outer_transaction

    @property
    def _connection(self) -> Connection[Any]:
        return cast("Connection[Any]", self._conn)

    async def __aenter__(self) -> Self:
        conn = self._connection
        async with conn._lock:
            self._check_enter()
            try:
                await conn.wait(self._enter_gen())
            except BaseException as exc:
                if self.pgconn.status == _OK:
                    # Bounded by cancel_timeout inside.
                    await conn._settle(Work(self._exit_gen(type(exc), exc, None)), may_cancel=False)  # noqa: ASYNC102
                else:
                    self.status = self.Status.FAILED
                raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> bool:
        if self.pgconn.status != _OK:
            self.status = self.Status.FAILED
            if exc_val is None and not self.force_rollback:
                self._connection._tell_loss()
            return False
        if exc_val is not None or self.force_rollback:
            return await self._roll_back(exc_val)  # noqa: ASYNC102 - bounded by cancel_timeout inside
        await self._commit()  # noqa: ASYNC102 - the operation itself, not clean-up
        return False

    def _rollback_gen(self, exc_val: BaseException | None) -> PQGen[bool]:
        try:
            return (yield from super()._rollback_gen(exc_val))
        except psycopg.Error as exc:
            # psycopg logs it and goes on; but it may be what the connection ends with.
            self._connection._take_note(exc)
            raise

    async def _commit(self) -> None:
        conn = self._connection
        try:
            await conn._lock.acquire()
        except BaseException as exc:
            # Cancelled before COMMIT was sent.
            await self._roll_back(exc)  # noqa: ASYNC102 - bounded by cancel_timeout inside
            raise
        is_healthy = self.pgconn.transaction_status != _INERROR
        work = Work(self._exit_gen(None, None, None))
        remark = "whether the transaction was committed is unknown" if self.is_outermost else ""
        try:
            await conn._finish(work, remark=remark)
        finally:
            self.is_committed = is_healthy and work.succeeded
            await conn._lock.release()  # noqa: ASYNC102 - bounded by cancel_timeout inside

    async def _roll_back(self, exc: BaseException | None) -> bool:
        conn = self._connection
        try:
            interruption = await conn._take_to_clean_up(exc)
            work = Work(self._exit_gen(type(exc) if exc else None, exc, None))
            try:
                result = await conn._clean_up(work)
            finally:
                await conn._lock.release()  # noqa: ASYNC102 - bounded by cancel_timeout inside
        except Exception as failure:
            if exc is None or self.pgconn.status == _OK:
                raise
            # The body's own error is what counts; the connection says why it failed.
            logger.warning("error ignored in rollback of %s: %s", self, failure)
            return False
        if interruption is not None:
            raise interruption
        return result

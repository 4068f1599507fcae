# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# A subclass of psycopg's pipeline has to know psycopg's private names.
"""Pipelines whose books are right also after a cancellation."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

import psycopg

from ._driving import Work

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from ._connection import Connection

logger = logging.getLogger("psycopg")


class AsyncPipeline(psycopg.AsyncPipeline):
    """See `psycopg.AsyncPipeline`, whose place it takes, also by its name."""

    __module__ = "psycopg"

    @property
    def _connection(self) -> Connection[Any]:
        return cast("Connection[Any]", self._conn)

    async def __aenter__(self) -> Self:
        level = self.level
        async with self._lock:
            try:
                await self._conn.wait(self._enter_gen())
            except BaseException as exc:
                # Settled, it came to its end and counted; but the block is not entered.
                if self.level > level:
                    self._exit(exc)
                raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        try:
            await self._leave(exc_val)
        except Exception as exc:
            if exc_val is None:
                raise exc.with_traceback(None) from exc.__cause__
            logger.warning("error ignored terminating %r: %s", self, exc)
        finally:
            self._exit(exc_val)

    async def _leave(self, exc: BaseException | None) -> None:
        """Send the Sync and read everything up to it, whatever happens meanwhile."""
        conn = self._connection
        holds_lock = self._lock is not conn.lock
        interruption = None if holds_lock else await conn._take_to_clean_up(exc)
        try:
            if interruption is not None or not (exc is None or isinstance(exc, Exception)):
                await conn._settle(Work(self._exit_gen()), may_cancel=True)
            else:
                await conn.wait(self._exit_gen())
        finally:
            if not holds_lock:
                await conn._lock.release()
        if interruption is not None:
            raise interruption

# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# Subclasses of psycopg's cursors have to know psycopg's private names.
"""Server-side cursors that close also while a cancellation is pending.

Client-side cursors need nothing: `Connection.wait` and its lock see to them, and
they stay psycopg's own classes.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

import psycopg
from psycopg.rows import Row

from ._driving import Work
from ._traces import note

if TYPE_CHECKING:
    from types import TracebackType

    from psycopg.abc import PQGen

    from ._connection import Connection

logger = logging.getLogger("psycopg")


class _ShieldedClose:
    """Mixin over psycopg's server-side cursors."""

    __slots__ = ()

    def _declare_gen(self, *args: Any, **kwargs: Any) -> PQGen[None]:
        cursor = cast("psycopg.AsyncServerCursor[Any]", self)
        yield from cast("Any", super())._declare_gen(*args, **kwargs)
        note(cursor._conn, cursor._query)

    async def close(self) -> None:
        """Close the cursor on the server and here.

        Cancellation:
            Shielded, and bounded by the connection's ``cancel_timeout``.
        """
        cursor = cast("psycopg.AsyncServerCursor[Any]", self)
        if cursor.closed:
            return
        conn = cast("Connection[Any]", cursor._conn)
        if conn.closed:
            cursor._close()
            return
        interruption = await conn._take_to_clean_up(None)
        work = Work(cursor._close_gen())
        try:
            await conn._clean_up(work)
        finally:
            if work.succeeded:
                cursor._close()
            await conn._lock.release()  # noqa: ASYNC102 - bounded by cancel_timeout inside
        if interruption is not None:
            raise interruption

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        try:
            await self.close()  # noqa: ASYNC102 - bounded by cancel_timeout inside
        except Exception as exc:
            cursor = cast("psycopg.AsyncServerCursor[Any]", self)
            if not cursor._conn.closed or exc_val is None:
                raise
            cursor._close()
            logger.warning("error ignored closing %r: %s", self, exc)


class AsyncServerCursor(_ShieldedClose, psycopg.AsyncServerCursor[Row]):
    """See `psycopg.AsyncServerCursor`, whose place it takes, also by its name."""

    __module__ = "psycopg"
    __slots__ = ()


class AsyncRawServerCursor(_ShieldedClose, psycopg.AsyncRawServerCursor[Row]):
    """See `psycopg.AsyncRawServerCursor`, whose place it takes, also by its name."""

    __module__ = "psycopg"
    __slots__ = ()


_SHIELDED: dict[Any, Any] = {
    psycopg.AsyncServerCursor: AsyncServerCursor,
    psycopg.AsyncRawServerCursor: AsyncRawServerCursor,
}


def shielded_factory(factory: Any) -> Any:
    """Return what makes server-side cursors for ``factory``; the user's own are left alone."""
    return _SHIELDED.get(factory, factory)

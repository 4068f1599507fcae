"""Trimming by partitions: what is old as a whole is dropped, instead of deleted.

A partition is looked at while others go on, and dropped under a lock that nobody else's
statement shares. The lock waits for all who have appended: so whoever had an id of the partition
has ended by then, and what they have committed is there to be seen. They are told by their
transactions, which had not ended when the partition was looked at.

The lock is on the whole table, so it is waited for briefly only: meanwhile others wait behind.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, final

import psycopg
from psycopg import sql

from pgstructured.observe import emit

from . import _partition_statements as statements, _statements
from ._partitions import AHEAD, look, make_more

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from typing import LiteralString

    from psycopg import AsyncConnection, AsyncCursor

    from ._names import Names
    from ._removals import Removals

_READ_PER_SECOND: Final = 200_000_000
"""Bytes of a table that a server looks through in a second, and more."""
_BUSY: Final = (
    psycopg.errors.LockNotAvailable,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.ObjectInUse,
)


@final
class Dropper:
    """Trims one log by partitions.

    Args:
        names: The log's.
    """

    def __init__(self, names: Names) -> None:
        self._names = names
        self._lock_state: LiteralString = names.fill(_statements.LOCK_STATE)
        self._lock: LiteralString = names.fill(statements.LOCK_EVENTS)
        self._goes: LiteralString = names.fill(statements.GOES)
        self._sum_up: LiteralString = names.fill(statements.SUM_UP)
        self._to_note: LiteralString = names.fill(statements.TO_NOTE)
        self._note: LiteralString = names.fill(statements.NOTE)
        self._is_quiet: LiteralString = names.fill(statements.IS_QUIET)

    async def trim(
        self,
        conn: AsyncConnection[Any],
        cursor: AsyncCursor[Any],
        values: dict[str, Any],
        removals: Removals,
        lock_timeout: float,
    ) -> bool:
        """Drop what partitions may go; return whether to go on by rows."""
        async with conn.transaction():
            found = await look(cursor, self._names)
        if found is None:
            return True
        if found.is_frozen:
            return self._leave("isolation")
        if not await self._make_more(conn, cursor, lock_timeout):
            return False
        while await self._drop_first(conn, cursor, values, removals, lock_timeout):
            pass
        async with conn.transaction():
            found = await look(cursor, self._names)
            await cursor.execute(self._is_quiet, values)
            (is_quiet,) = await cursor.fetchone() or (False,)
        # What is being filled is left until it is old as a whole; but once nothing comes any
        # more it is never filled.
        return is_quiet and not (found and found.full)

    async def _make_more(
        self, conn: AsyncConnection[Any], cursor: AsyncCursor[Any], lock_timeout: float
    ) -> bool:
        """Make partitions where there are too few ahead; return whether to go on."""
        async with conn.transaction():
            await cursor.execute(self._lock_state, ())
            found = await look(cursor, self._names)
            if found is None or found.ahead >= AHEAD:
                return True
            await cursor.execute(statements.SIZE, (found.last.table.as_string(),))
            (size,) = await cursor.fetchone() or (0,)
            if size > lock_timeout * _READ_PER_SECOND:
                self._leave("size")
                return True
            try:
                async with self._alone(conn, cursor, lock_timeout):
                    found = await look(cursor, self._names)
                    if found is not None:  # pragma: no branch - it was, and its state is locked
                        await make_more(cursor, self._names, found)
            except _BUSY:
                return self._leave("lock")
        return True

    async def _drop_first(
        self,
        conn: AsyncConnection[Any],
        cursor: AsyncCursor[Any],
        values: dict[str, Any],
        removals: Removals,
        lock_timeout: float,
    ) -> bool:
        """Drop the first partition, if it may go; return whether it did."""
        async with conn.transaction():
            await cursor.execute(self._lock_state, ())
            # Without its state nobody could be told, and nobody takes turns.
            found = await look(cursor, self._names) if cursor.rowcount else None
            if found is None or not found.full:
                return False
            table, first, end = found.full[0]
            values = {**values, "first": first, "end": end, "ended": None}
            await cursor.execute(self._goes, values)
            ended, goes = await cursor.fetchone() or (None, False)
            if not goes:
                return False
            await cursor.execute(self._sum_up, values)
            count, last_id, is_old, oldest = await cursor.fetchone() or (0, None, False, None)
            if not is_old:
                return False
            noted = {**values, "last_id": last_id, "oldest": oldest}
            await cursor.execute(self._to_note, noted)
            rows = await cursor.fetchall()
            noted |= {"xids": [xid for xid, _ in rows], "last_ids": [last for _, last in rows]}
            try:
                async with self._alone(conn, cursor, lock_timeout), removals.watched(cursor):
                    await cursor.execute(self._goes, {**values, "ended": ended})
                    _, goes = await cursor.fetchone() or (None, False)
                    if not goes:  # somebody has appended to it, or stored a cursor
                        raise psycopg.Rollback
                    if count:
                        await cursor.execute(self._note, noted)
                    await cursor.execute(sql.SQL("DROP TABLE {}").format(table))
            except _BUSY:
                return self._leave("lock")
        removals.count += count if goes else 0
        return goes

    @asynccontextmanager
    async def _alone(
        self, conn: AsyncConnection[Any], cursor: AsyncCursor[Any], lock_timeout: float
    ) -> AsyncGenerator[None]:
        """Have the table for oneself, for a block and what is left of the transaction."""
        async with conn.transaction():
            limit = f"{max(1, round(lock_timeout * 1000))}ms"
            await cursor.execute(statements.LIMIT_LOCK, (limit,))
            (before, _) = await cursor.fetchone() or ("0", None)
            await cursor.execute(self._lock, ())
            yield
            await cursor.execute(statements.SET_LIMIT, (before,))

    def _leave(self, reason: str) -> bool:
        emit("log.partitions_left", log=str(self._names), reason=reason)
        return False

"""Trimming: removing what is old, from the front, in batches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

from psycopg import AsyncCursor
from psycopg.rows import tuple_row

from pgstructured.observe import emit

from . import _statements as sql

if TYPE_CHECKING:
    from typing import LiteralString

    from psycopg import AsyncConnection

    from ._names import Names


@final
class Trimmer:
    """Trims one log.

    Args:
        names: The log's.
    """

    def __init__(self, names: Names) -> None:
        self._names = names
        self._lock: LiteralString = names.fill(sql.LOCK_STATE)
        self._trim: LiteralString = names.fill(sql.TRIM)
        self._expired: LiteralString = names.fill(sql.EXPIRED_CURSORS)

    async def trim(
        self,
        conn: AsyncConnection[Any],
        older_than: float,
        *,
        expire_cursors: bool,
        batch_size: int,
    ) -> int:
        """Remove what is old and not needed; see `EventLog.trim`."""
        values = {
            "older_than": older_than,
            "respects": not expire_cursors,
            "limit": batch_size,
        }
        total = 0
        expired: set[str] = set()
        removed = batch_size
        async with AsyncCursor(conn, row_factory=tuple_row) as cursor:
            while removed == batch_size:
                async with conn.transaction():
                    # First, and alone: what comes next sees what another one has done before.
                    await cursor.execute(self._lock, ())
                    before = await self._find_expired(cursor, asked=expire_cursors)
                    await cursor.execute(self._trim, values)
                    (removed,) = await cursor.fetchone() or (0,)
                    expired |= await self._find_expired(cursor, asked=expire_cursors) - before
                total += removed
        if total:
            emit("log.trimmed", log=str(self._names), count=total)
        if expired:
            emit("log.cursors_expired", log=str(self._names), names=sorted(expired))
        return total

    async def _find_expired(self, cursor: AsyncCursor[Any], *, asked: bool) -> set[str]:
        if not asked:
            return set()
        await cursor.execute(self._expired, ())
        return {name for (name,) in await cursor.fetchall()}


def check_older_than(older_than: float) -> float:
    """Return ``older_than`` if that is an age."""
    given: Any = older_than
    if not isinstance(given, (int, float)) or not 0 <= given < math.inf:
        raise ValueError(f"older_than must be 0 or more seconds, not {given!r}")
    return older_than

"""Trimming: removing what is old, from the front, in batches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, final

from psycopg import AsyncCursor
from psycopg.rows import tuple_row

from . import _statements as sql
from ._partition_dropping import Dropper
from ._removals import Removals

if TYPE_CHECKING:
    from typing import LiteralString

    from psycopg import AsyncConnection

    from ._names import Names

_LONGEST_TIMEOUT: Final = 86_400


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
        self._dropper = Dropper(names)

    async def trim(
        self,
        conn: AsyncConnection[Any],
        older_than: float,
        *,
        expire_cursors: bool,
        batch_size: int,
        lock_timeout: float,
    ) -> int:
        """Remove what is old and not needed; see `EventLog.trim`."""
        values: dict[str, Any] = {
            "older_than": older_than,
            "respects": not expire_cursors,
            "limit": batch_size,
        }
        removals = Removals(self._names, expires=expire_cursors)
        async with AsyncCursor(conn, row_factory=tuple_row) as cursor:
            goes_on = await self._dropper.trim(conn, cursor, values, removals, lock_timeout)
            removed = batch_size if goes_on else 0
            while removed == batch_size:
                async with conn.transaction():
                    # First, and alone: what comes next sees what another one has done before.
                    await cursor.execute(self._lock, ())
                    async with removals.watched(cursor):
                        await cursor.execute(self._trim, values)
                        (removed,) = await cursor.fetchone() or (0,)
                removals.count += removed
        removals.tell()
        return removals.count


def check_older_than(older_than: float) -> float:
    """Return ``older_than`` if that is an age."""
    given: Any = older_than
    if not isinstance(given, (int, float)) or not 0 <= given < math.inf:
        raise ValueError(f"older_than must be 0 or more seconds, not {given!r}")
    return older_than


def check_lock_timeout(lock_timeout: float) -> float:
    """Return ``lock_timeout`` if one can wait so long."""
    given: Any = lock_timeout
    if not isinstance(given, (int, float)) or not 0 < given <= _LONGEST_TIMEOUT:
        raise ValueError(f"lock_timeout must be more than 0 seconds, a day at most, not {given!r}")
    return lock_timeout

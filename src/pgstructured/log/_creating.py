"""Creating a log's tables, and adopting those of another server."""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING, Any

from psycopg import AsyncCursor
from psycopg.rows import tuple_row

from pgstructured.observe import emit

from . import _statements as sql
from ._partitions import look, make_first

if TYPE_CHECKING:
    from psycopg import AsyncConnection

    from ._names import Names

_SUFFIXES = ("", "_state", "_trimmed", "_cursor")
_EPOCH_BITS = 40


async def create_log(
    conn: AsyncConnection[Any], names: Names, *, partition_size: int | None
) -> None:
    """Create the tables of a log, or see that they are usable here; see `EventLog.create`."""
    async with AsyncCursor(conn, row_factory=tuple_row) as cursor:
        if await _is_ready(cursor, names):
            await _check_partitions(cursor, names, partition_size)
            return
        async with conn.transaction():
            # Otherwise those who create at the same time meet in the catalog, and fail.
            await cursor.execute(sql.LOCK, (_lock_key(names),))
            epoch = secrets.randbits(_EPOCH_BITS)
            if not await _exist(cursor, names):
                events = sql.CREATE_EVENTS
                if partition_size is not None:
                    events += sql.PARTITIONED
                for statement in (events, *sql.CREATE):
                    await cursor.execute(names.fill(statement), {"epoch": epoch})
                if partition_size is not None:
                    await make_first(cursor, names, partition_size)
            elif await _are_from_elsewhere(cursor, names):
                for statement in sql.ADOPT:
                    await cursor.execute(names.fill(statement), {"epoch": epoch})
                emit("log.adopted", log=str(names))
            await _check_partitions(cursor, names, partition_size)


async def _check_partitions(
    cursor: AsyncCursor[Any], names: Names, partition_size: int | None
) -> None:
    """See that a log has the partitions that are asked for."""
    if partition_size is None:
        return
    found = await look(cursor, names)
    if found is None:
        raise ValueError(
            f"event log {names} was created without partitions, and stays so: leave out"
            " partition_size, or give another log a name of its own"
        )
    if found.size != partition_size:
        raise ValueError(
            f"event log {names} was created with partition_size={found.size}, and keeps it:"
            f" {partition_size} can't be had"
        )


async def _is_ready(cursor: AsyncCursor[Any], names: Names) -> bool:
    return await _exist(cursor, names) and not await _are_from_elsewhere(cursor, names)


async def _exist(cursor: AsyncCursor[Any], names: Names) -> bool:
    tables = [names.qualified(suffix) for suffix in _SUFFIXES]
    await cursor.execute(sql.EXISTS, (tables,))
    return bool((await cursor.fetchone() or (False,))[0])


async def _are_from_elsewhere(cursor: AsyncCursor[Any], names: Names) -> bool:
    await cursor.execute(names.fill(sql.FROM_ELSEWHERE), ())
    return bool((await cursor.fetchone() or (False,))[0])


def _lock_key(names: Names) -> int:
    digest = hashlib.blake2b(f"pgstructured event log {names}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)

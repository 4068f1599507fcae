"""Locks of the caller's transaction: held until it ends, whatever ends it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psycopg.rows import tuple_row

from pgstructured.errors import LockError

from ._keys import as_lock_key
from ._refusals import check_connection, not_primary, translated
from ._statements import xact_statement

if TYPE_CHECKING:
    import psycopg

    from ._keys import LockKey, LockKeyLike


async def pg_xact_lock(
    conn: psycopg.AsyncConnection[Any], key: LockKeyLike, *, shared: bool = False
) -> None:
    """Wait for a lock that the current transaction then holds until it ends.

    The right lock to protect a transaction: it can't be released before the commit.

    Args:
        conn: A connection in a transaction.
        key: What to lock, see `LockKeyLike`.
        shared: Let others hold it too, shared.

    Raises:
        LockError: if there is no transaction to hold it.
        LockKeyError: if the key is empty or out of range.
        LockDeadlockError: if waiting has closed a circle.
        LockCapacityError: if the server's lock table is full.
        NotPrimaryError: on a standby.
        psycopg.Error: what the server says.

    Cancellation:
        A checkpoint. A cancelled call leaves the transaction in error, and with its end no lock.
    """
    await _take(conn, as_lock_key(key), shared=shared, is_try=False)


async def pg_try_xact_lock(
    conn: psycopg.AsyncConnection[Any], key: LockKeyLike, *, shared: bool = False
) -> bool:
    """Take a lock for the current transaction if it is free; see `pg_xact_lock`.

    Args:
        conn: A connection in a transaction.
        key: What to lock, see `LockKeyLike`.
        shared: Let others hold it too, shared.

    Returns:
        Whether the transaction holds it now.

    Raises:
        PgStructuredError: as `pg_xact_lock`.
        psycopg.Error: what the server says.

    Cancellation:
        As `pg_xact_lock`.
    """
    return await _take(conn, as_lock_key(key), shared=shared, is_try=True)


async def _take(
    conn: psycopg.AsyncConnection[Any], key: LockKey, *, shared: bool, is_try: bool
) -> bool:
    check_connection(conn)
    if conn.autocommit and conn.info.transaction_status.name == "IDLE":
        raise _no_transaction()
    statement = xact_statement(key, shared=shared, is_try=is_try)
    with translated(key):
        async with conn.cursor(row_factory=tuple_row) as cursor:
            await cursor.execute(statement.encode())
            ((verdict,),) = await cursor.fetchall()
    if verdict == "standby":
        raise not_primary()
    if conn.info.transaction_status.name == "IDLE":
        # Another task's statement had made the connection look busy.
        raise _no_transaction()
    return bool(verdict == "true")


def _no_transaction() -> LockError:
    return LockError("a transaction lock needs a transaction; use `async with conn.transaction()`")

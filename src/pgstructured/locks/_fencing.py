"""Fencing: a token that grows with every grant, and keeps late writers out.

A holder that was paused may go on after its lock was lost. Whoever takes the lock next
has a greater token, and what the lock protects can refuse the smaller one: `FenceTable.guard`
does so for the same database, by a row lock for which the next holder has to wait.

The token is a row's, and so survives what the data survives; see `_fence_statements`.
"""

from __future__ import annotations

import os
import secrets
import socket
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final
from weakref import WeakKeyDictionary

import psycopg
import psycopg.errors
from psycopg.rows import tuple_row

from pgstructured.errors import FenceTableMissingError, LockError

from . import _fence_statements as sql
from ._loss import Loss

if TYPE_CHECKING:
    from collections.abc import Generator

    from pgstructured.driver import Session

    from ._keys import LockKey

DEFAULT_TABLE: Final = "pgstructured_fence"
_SHOWN: Final = 200
"""Characters of a name that the table shows."""
_CREATED_MEANWHILE: Final = (
    # The table, its type, or a row of the catalog: whichever comes to light first.
    psycopg.errors.DuplicateTable,
    psycopg.errors.DuplicateObject,
    psycopg.errors.UniqueViolation,
)
_ISOLATION: Final = (
    "SELECT pg_catalog.set_config('default_transaction_isolation', 'read committed', false)"
)


@final
class FenceGrant(NamedTuple):
    """What a grant of a fenced lock gives."""

    token: int
    """Greater than that of every grant before it."""
    previous_ended_cleanly: bool | None
    """Whether the holder before has released its lock; None if there was none."""


@final
class FencedTry(NamedTuple):
    """What `FenceTable.take` gives."""

    is_granted: bool
    """Whether the session holds the lock now."""
    grant: FenceGrant | None
    """The token; None if the lock was not granted, or `FenceTable.bump` has to give it."""


class _Prepared(NamedTuple):
    """What has been prepared on a session."""

    prefix: str
    is_utf8: bool


@final
class FenceTable:
    """The fence table of a database.

    Args:
        name: ``table`` or ``schema.table``.

    Raises:
        ValueError: if it can't be a table's name.
    """

    def __init__(self, name: str = DEFAULT_TABLE) -> None:
        self._table = sql.quote_table(name)
        self._prepared: WeakKeyDictionary[Session, _Prepared] = WeakKeyDictionary()

    @property
    def quoted_name(self) -> str:
        """Its name as SQL writes it."""
        return self._table

    async def create(self, session: Session) -> None:
        """Create the table, unless there is one; any number of processes may do so at once.

        Others than its owner need SELECT, INSERT and UPDATE on it.

        Raises:
            psycopg.Error: what the server says.

        Cancellation:
            A checkpoint. A cancelled call may have created it.
        """
        try:
            await self._create(session)
        except _CREATED_MEANWHILE:
            await self._create(session)  # another one was at it, and is done

    async def prepare(self, session: Session) -> None:
        """Prepare the statements on a session of the library's own.

        `take` and `bump` do so where it is needed. It makes ``READ COMMITTED`` the
        session's default, whatever the role's is: only there a bump sees what it has waited for.

        Raises:
            FenceTableMissingError: if there is no table.
            psycopg.Error: what else the server says.

        Cancellation:
            A checkpoint.
        """
        await self._prepare(session)

    async def take(self, session: Session, key: LockKey, *, note: str = "") -> FencedTry:
        """Lock ``key`` if it is free, with a token if that needs no waiting; never waits.

        In one round trip. The token has to be given by `bump` if the key was never fenced
        before, if a guarded transaction of a holder before is open, or if commits wait for a
        synchronous standby.

        Args:
            session: Where the lock is to be held.
            key: What to lock, exclusively.
            note: What the statement ends with.

        Raises:
            FenceTableMissingError: if there is no table; nothing is locked.
            psycopg.Error: what else the server says; then the session may hold the lock.

        Cancellation:
            As `Session.execute`: a cancelled call may have locked.
        """
        with self._translated():
            prepared = self._prepared.get(session) or await self._prepare(session)
            arguments = _grant_arguments(key, prepared)
            found = await session.execute(f"EXECUTE {prepared.prefix}_take({arguments}){note}")
        granted, token, cleanly = found.rows[0]
        grant = None if token is None else _read_grant(token, cleanly)
        return FencedTry(granted == "true", grant)

    async def bump(self, session: Session, key: LockKey, *, note: str = "") -> FenceGrant:
        """Give the next token to who has been granted ``key``, durably.

        Waits for open transactions that are guarded by an older token.

        Args:
            session: A session that holds no lock, since this may wait.
            key: What has been granted.
            note: What the statement ends with.

        Raises:
            FenceTableMissingError: if there is no table.
            psycopg.Error: what else the server says.

        Cancellation:
            As `Session.execute`. A cancelled call may have used up a token, whose holder
            then counts as one that has not ended cleanly.
        """
        with self._translated():
            prepared = self._prepared.get(session) or await self._prepare(session)
            prefix, arguments = prepared.prefix, _grant_arguments(key, prepared)
            found = await session.execute(
                f"EXECUTE {prefix}_bump({arguments}){note}", may_block=True
            )
            if not found.rows:
                found = await session.execute(
                    f"EXECUTE {prefix}_begin({arguments}){note}", may_block=True
                )
        token, cleanly, _ = found.rows[0]
        return _read_grant(token, cleanly)

    def bump_statement(self, key: LockKey) -> str:
        """Return what `bump` does as a statement for any session, dearer.

        Its row is the token, ``t``, ``f`` or NULL for how the holder before has ended, and
        nothing of interest. Durable, and visible to others, once its transaction is committed.
        """
        name = "NULL" if key.name is None else sql.quote_literal(_shown(key.name, is_utf8=False))
        values = {"name": f"{name}::text", "holder": _holder_literal(os.getpid())}
        return sql.BEGIN.format(table=self._table, **sql.row_of(key), **values)

    def unlock_statement(self, key: LockKey, token: int, *, session: Session | None = None) -> str:
        """Return the statement that releases the lock once and marks its clean end.

        It gives ``true`` or ``false`` for "was not held", as that of an unfenced lock. It never
        waits: where a guarded transaction is open the end is not marked. Should it fail (no
        table, no right to it), the lock is still held.

        Args:
            key: The lock, held exclusively.
            token: Its token.
            session: Where it will run; cheaper if the session is prepared.
        """
        prepared = None if session is None else self._prepared.get(session)
        row = sql.row_of(key)
        if prepared is None:
            return sql.RELEASE.format(table=self._table, token=f"'{token}'::int8", **row)
        return f"EXECUTE {prepared.prefix}_release({row['space']}, {row['key']}, '{token}')"

    async def guard(
        self,
        conn: psycopg.AsyncConnection[Any],
        key: LockKey,
        token: int,
        *,
        held_for: float = 0.0,
        last_confirmed: float = 0.0,
    ) -> None:
        """Let the caller's transaction go on only under ``token``, and the next token wait.

        Args:
            conn: A connection in a transaction.
            key: The lock.
            token: Its token.
            held_for: For `LockLost`.
            last_confirmed: For `LockLost`.

        Raises:
            LockLost: if there is a newer token (``fenced``).
            LockError: if there is no transaction, or it can't see the token: it has begun
                before the grant, in ``REPEATABLE READ``, or is in another database.
            FenceTableMissingError: if there is no table.
            psycopg.Error: what else the server says; in ``REPEATABLE READ`` a newer token may
                be a ``SerializationFailure``.

        Cancellation:
            A checkpoint. A cancelled call leaves the transaction in error.
        """
        if conn.autocommit and conn.info.transaction_status.name == "IDLE":
            raise _no_transaction()
        places = {"table": self._table, "token": f"'{token}'::int8", **sql.row_of(key)}
        with self._translated():
            async with conn.cursor(row_factory=tuple_row) as cursor:
                await cursor.execute(sql.GUARD.format(**places).encode())
                is_current = bool(await cursor.fetchall())
                if conn.info.transaction_status.name == "IDLE":
                    # Another task's statement had made the connection look busy.
                    raise _no_transaction()
                if is_current:
                    return
                await cursor.execute(sql.NEWER.format(**places).encode())
                is_stale = bool(await cursor.fetchall())
        if is_stale:
            raise Loss(reason="fenced").error(key, held_for=held_for, last_confirmed=last_confirmed)
        raise LockError(
            f"the transaction can't see token {token} of the lock {key}; begin it under the"
            " lock, and in the same database"
        )

    # ------------------------------------------------------------ below

    async def _create(self, session: Session) -> None:
        # Looked for first: with IF NOT EXISTS, who may not create it would not be told it's there.
        found = await session.execute("SELECT pg_catalog.to_regclass($1)", [self._table])
        if found.scalar() is None:
            await session.execute(sql.CREATE.format(table=self._table), may_block=True)

    async def _prepare(self, session: Session) -> _Prepared:
        # A new name each time: nobody knows what became of a call that was cancelled.
        prefix = f"pgstructured_{secrets.token_hex(6)}"
        row = {"table": self._table, "space": "$1", "key": "$2"}
        grant = {**row, "name": "$3", "holder": "$4"}
        release = {**row, "token": "$3"}
        statements = (
            _ISOLATION,
            f"PREPARE {prefix}_take (int2, int8, text, text) AS {sql.TAKE.format(**grant)}",
            f"PREPARE {prefix}_bump (int2, int8, text, text) AS {sql.BUMP.format(**grant)}",
            f"PREPARE {prefix}_begin (int2, int8, text, text) AS {sql.BEGIN.format(**grant)}",
            f"PREPARE {prefix}_release (int2, int8, int8) AS {sql.RELEASE.format(**release)}",
            "SELECT pg_catalog.current_setting('server_encoding')",
        )
        with self._translated():
            results = await session.execute_batch([(text, ()) for text in statements])
        prepared = _Prepared(prefix, is_utf8=results[-1].scalar() == "UTF8")
        self._prepared[session] = prepared
        return prepared

    @contextmanager
    def _translated(self) -> Generator[None]:
        try:
            yield
        except psycopg.errors.UndefinedTable as exc:
            raise FenceTableMissingError(
                f"there is no fence table {self._table}; create it with"
                " Locks.create_fence_table() or `pgstructured lock --create`"
            ) from exc


def _grant_arguments(key: LockKey, prepared: _Prepared) -> str:
    row = sql.row_of(key)
    name = "NULL"
    if key.name is not None:
        name = sql.quote_literal(_shown(key.name, is_utf8=prepared.is_utf8))
    return f"{row['space']}, {row['key']}, {name}, {_holder_literal(os.getpid())}"


def _shown(name: str, *, is_utf8: bool) -> str:
    """Return what the table shows of a name: never more than its database can hold."""
    cut = name[:_SHOWN]
    return cut if is_utf8 else cut.encode("ascii", "backslashreplace").decode()


@lru_cache(maxsize=2)
def _holder_literal(pid: int) -> str:
    """Return who this process is, to stand behind the session's own name."""
    host = socket.gethostname().encode("ascii", "backslashreplace").decode()
    return sql.quote_literal(f" (process {pid} on {host})")


def _read_grant(token: str | None, cleanly: str | None) -> FenceGrant:
    return FenceGrant(int(token or 0), None if cleanly is None else cleanly == "t")


def _no_transaction() -> LockError:
    return LockError("a guard needs a transaction; use `async with conn.transaction()`")

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
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast, final

import psycopg
import psycopg.errors
from psycopg.rows import tuple_row

from pgstructured.errors import FenceTableMissingError, LockError

from . import _fence_statements as sql
from ._loss import Loss
from ._refusals import check_connection
from ._statements import WAKE, params_of

if TYPE_CHECKING:
    from collections.abc import Generator

    from pgstructured.driver import Command, Session

    from ._keys import LockKey

DEFAULT_TABLE: Final = "pgstructured_fence"
_SHOWN: Final = 200
"""Characters of a name that the table shows."""
_CACHED_NAMES: Final = 1024
_CREATED_MEANWHILE: Final = (
    # The table, its type, or a row of the catalog: whichever comes to light first.
    psycopg.errors.DuplicateTable,
    psycopg.errors.DuplicateObject,
    psycopg.errors.UniqueViolation,
)
_ISOLATION: Final = (
    "SELECT pg_catalog.set_config('default_transaction_isolation', 'read committed', false)"
)
_GENERIC_PLANS: Final = (
    # Else the server may plan anew each time, which costs more than to run the plan.
    "SELECT pg_catalog.set_config('plan_cache_mode', 'force_generic_plan', false)"
)
_HAS_PLAN_CACHE_MODE: Final = 120000


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


class TokenWithheldError(Exception):
    """A guarded transaction keeps the next token, and a try does not wait for it."""


class _Prepared(NamedTuple):
    """What has been prepared on a session: the names, and what its database can store."""

    take: bytes
    bump: bytes
    begin: bytes
    release: bytes
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
        """Prepare the statements on a session of the library's own, unless they are.

        `take` and `bump` do so where it is needed. It makes ``READ COMMITTED`` the
        session's default, whatever the role's is: only there a bump sees what it has waited for.

        Raises:
            FenceTableMissingError: if there is no table.
            psycopg.Error: what else the server says.

        Cancellation:
            A checkpoint where there is something to do.
        """
        if self not in session.kept:
            session.kept[self] = await self._prepare(session)

    def is_prepared(self, session: Session) -> bool:
        """Whether `prepare` has been done on ``session``."""
        return self in session.kept

    def send_take(self, session: Session, key: LockKey) -> Command:
        """Send what `take` asks and return at once; for a session that is prepared."""
        prepared = self._prepared_on(session)
        return session.send_named(prepared.take, _grant_params(key, prepared))

    def read_take(self, command: Command) -> FencedTry:
        """Return what `take` gives, from its answer; raises as that."""
        try:
            granted = command.scalar() == b"true"
            if not command.is_committed:
                command.result()  # raises: the token is not stored
        except psycopg.errors.UndefinedTable as exc:
            raise self._missing() from exc
        answer = command.answers[0]
        token, cleanly = answer.get_value(0, 1), answer.get_value(0, 2)
        return FencedTry(granted, None if token is None else _read_grant(token, cleanly))

    async def take(self, session: Session, key: LockKey) -> FencedTry:
        """Lock ``key`` if it is free, with a token if that needs no waiting; never waits.

        In one round trip. The token has to be given by `bump` if the key was never fenced
        before, if a guarded transaction of a holder before is open, or if commits wait for a
        synchronous standby.

        Args:
            session: Where the lock is to be held.
            key: What to lock, exclusively.

        Raises:
            FenceTableMissingError: if there is no table; nothing is locked.
            psycopg.Error: what else the server says; then the session may hold the lock.

        Cancellation:
            As `Session.execute`: a cancelled call may have locked.
        """
        await self.prepare(session)
        await session.checkpoint_if_cancelled()
        command = self.send_take(session, key)
        await command.signal
        return self.read_take(command)

    async def bump(self, session: Session, key: LockKey, *, may_wait: bool = True) -> FenceGrant:
        """Give the next token to who has been granted ``key``, durably.

        Waits for open transactions that are guarded by an older token.

        Args:
            session: A session that holds no lock, since this may wait.
            key: What has been granted.
            may_wait: Wait for as long as it takes; else for a moment only.

        Raises:
            TokenWithheldError: if such a transaction is open, and this must not wait.
            FenceTableMissingError: if there is no table.
            psycopg.Error: what else the server says.

        Cancellation:
            As `Session.execute`. A cancelled call may have used up a token, whose holder
            then counts as one that has not ended cleanly.
        """
        await self.prepare(session)
        if not may_wait:
            return await self._bump_now(session, key)
        prepared = self._prepared_on(session)
        params = _grant_params(key, prepared)
        await session.checkpoint_if_cancelled()
        answer = (await self._run(session, prepared.bump, params)).answers[0]
        if not answer.ntuples:
            answer = (await self._run(session, prepared.begin, params)).answers[0]
        return _read_grant(answer.get_value(0, 0), answer.get_value(0, 1))

    async def _bump_now(self, session: Session, key: LockKey) -> FenceGrant:
        statements = ((sql.BRIEFLY, ()), (self.bump_statement(key), ()))
        try:
            with self._translated():
                _, grant = await session.execute_batch(statements)
        except psycopg.errors.LockNotAvailable as exc:
            raise TokenWithheldError from exc
        token, cleanly, *_ = grant.rows[0]
        return FenceGrant(int(token or 0), None if cleanly is None else cleanly == "t")

    async def _run(
        self, session: Session, name: bytes, params: tuple[bytes | None, ...]
    ) -> Command:
        """Run a statement that may have to wait, and return it once it has succeeded."""
        command = session.send_named(name, params, may_block=True)
        await command.signal
        with self._translated():
            command.result()
        return command

    def bump_statement(self, key: LockKey) -> str:
        """Return what `bump` does as a statement for any session, dearer.

        Its row is the token, ``t``, ``f`` or NULL for how the holder before has ended, and
        nothing of interest. Durable, and visible to others, once its transaction is committed.
        """
        name = "NULL" if key.name is None else sql.quote_literal(_shown(key.name, is_utf8=False))
        holder = sql.quote_literal(_holder(os.getpid()).decode())
        values = {"name": f"{name}::text", "holder": holder}
        return sql.BEGIN.format(table=self._table, **sql.row_of(key), **values)

    def unlock_statement(self, key: LockKey, token: int) -> str:
        """Return the statement that releases the lock once and marks its clean end.

        It gives ``true`` or ``false`` for "was not held", as that of an unfenced lock. It never
        waits: where a guarded transaction is open the end is not marked. Should it fail (no
        table, no right to it), the lock is still held.

        Args:
            key: The lock, held exclusively.
            token: Its token.
        """
        row = sql.row_of(key)
        return sql.RELEASE.format(table=self._table, token=f"'{token}'::int8", wake="", **row)

    def send_unlock(self, session: Session, key: LockKey, token: int) -> Command:
        """Send `unlock_statement`, and tell those who wait outside of the server's queue."""
        if self.is_prepared(session):
            release = self._prepared_on(session).release
            return session.send_named(release, (*sql.numbers_of(key), b"%d" % token))
        command = session.send([(self.unlock_statement(key, token), ())])
        session.send_prepared(WAKE[key.as_pair is not None], params_of(key))  # nobody waits for it
        return command

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
        check_connection(conn)
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

    def _prepared_on(self, session: Session) -> _Prepared:
        return cast("_Prepared", session.kept[self])

    async def _prepare(self, session: Session) -> _Prepared:
        # A new name each time: nobody knows what became of a call that was cancelled.
        prefix = f"pgstructured_{secrets.token_hex(6)}"
        is_newer = session.server_version >= _HAS_PLAN_CACHE_MODE
        row = {"table": self._table, "space": "$1", "key": "$2"}
        grant = {**row, "name": "$3", "holder": "$4"}
        release = {**row, "token": "$3", "wake": sql.AND_WAKE.format(**row)}
        statements = (
            _ISOLATION,
            _GENERIC_PLANS if is_newer else "",
            f"PREPARE {prefix}_take (int2, int8, text, text) AS {sql.TAKE.format(**grant)}",
            f"PREPARE {prefix}_bump (int2, int8, text, text) AS {sql.BUMP.format(**grant)}",
            f"PREPARE {prefix}_begin (int2, int8, text, text) AS {sql.BEGIN.format(**grant)}",
            f"PREPARE {prefix}_release (int2, int8, int8) AS {sql.RELEASE.format(**release)}",
            "SELECT pg_catalog.current_setting('server_encoding')",
        )
        with self._translated():
            results = await session.execute_batch([(text, ()) for text in statements])
        return _Prepared(
            take=f"{prefix}_take".encode(),
            bump=f"{prefix}_bump".encode(),
            begin=f"{prefix}_begin".encode(),
            release=f"{prefix}_release".encode(),
            is_utf8=results[-1].scalar() == "UTF8",
        )

    @contextmanager
    def _translated(self) -> Generator[None]:
        try:
            yield
        except psycopg.errors.UndefinedTable as exc:
            raise self._missing() from exc

    def _missing(self) -> FenceTableMissingError:
        return FenceTableMissingError(
            f"there is no fence table {self._table}; create it with"
            " Locks.create_fence_table() or `pgstructured lock --create`"
        )


def _grant_params(key: LockKey, prepared: _Prepared) -> tuple[bytes | None, ...]:
    name = None if key.name is None else _stored(key.name, prepared.is_utf8)
    return (*sql.numbers_of(key), name, _holder(os.getpid()))


@lru_cache(maxsize=_CACHED_NAMES)
def _stored(name: str, is_utf8: bool) -> bytes:  # noqa: FBT001 - a key of the cache
    """Return a key's name as the table has it."""
    return sql.storable(_shown(name, is_utf8=is_utf8)).encode()


def _shown(name: str, *, is_utf8: bool) -> str:
    """Return what the table shows of a name: never more than its database can hold."""
    cut = name[:_SHOWN]
    return cut if is_utf8 else cut.encode("ascii", "backslashreplace").decode()


@lru_cache(maxsize=2)
def _holder(pid: int) -> bytes:
    """Return who this process is, to stand behind the session's own name."""
    host = socket.gethostname().encode("ascii", "backslashreplace").decode()
    return f" (process {pid} on {host})".encode()


def _read_grant(token: bytes | None, cleanly: bytes | None) -> FenceGrant:
    return FenceGrant(int(token or 0), None if cleanly is None else cleanly == b"t")


def _no_transaction() -> LockError:
    return LockError("a guard needs a transaction; use `async with conn.transaction()`")

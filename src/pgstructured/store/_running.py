"""How an operation runs on a connection.

==================  ================================  =================================
the connection      what the store knows and wants    what is sent
==================  ================================  =================================
in no transaction   the table                         the statement, alone
in no transaction   the table, and settings           a transaction, all of it at once
in no transaction   nothing yet, or many statements   a transaction, step by step
in none, but told   the table                         the same: as the connection says how
how it is to be                                       transactions are to be
in a transaction                                      the statement
in a transaction    settings, or many statements      a savepoint
==================  ================================  =================================

What is more than the statement alone takes its turn on the connection; see `_turns`.

A statement is run again only where the first one can't have done anything: in no transaction of
the caller's, and refused by the server before it ran, because DDL has changed the table. What
fails while it runs (in a trigger, say) is never run again: what it did in the database is rolled
back, but not what its functions did to sequences, or outside.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, final

import psycopg
from psycopg import AsyncRawCursor
from psycopg.rows import DictRow, dict_row, tuple_row

from pgstructured.observe import emit

from ._cursors import cursor_of
from ._resolving import Relation, check_there, is_moved, is_plan_outdated, relation, resolve
from ._rows import adapted
from ._streaming import DictStream
from ._turns import Turn, is_anyones, turn_on

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine, Sequence

    from pgstructured.driver import Connection, RowStream
    from pgstructured.pool import Pool

    from ._settings import Settings
    from ._statements import Statement


class _Refusal(NamedTuple):
    """Why a statement is to be run again."""

    relation: Relation
    """Where the table was thought to be."""
    error: psycopg.Error
    """What the server said to that."""


@final
class Runner:
    """Runs the statements of one store.

    Args:
        pool: Lends connections.
        table: The name of the table.
        schema: The name of its schema, if it is told.
        settings: What is to hold while an operation runs.
    """

    __slots__ = ("_has_settings", "_pool", "_relation", "_schema", "_settings", "_table")

    def __init__(self, pool: Pool, table: str, schema: str | None, settings: Settings) -> None:
        self._pool = pool
        self._table = table
        self._schema = schema
        self._settings = settings
        self._has_settings = bool(settings.names)
        self._relation: Relation | None = None if schema is None else relation(schema, table)

    def rows(
        self, statement: Statement, connection: Connection[Any] | None
    ) -> Coroutine[Any, Any, list[DictRow]]:
        """Run one statement, and return its rows."""
        return self._run(statement, connection, wants_rows=True)

    def count(
        self, statement: Statement, connection: Connection[Any] | None
    ) -> Coroutine[Any, Any, int]:
        """Run one statement, and return how many rows it met."""
        return self._run(statement, connection, wants_rows=False)

    async def rows_of_all(
        self, statements: Sequence[Statement], connection: Connection[Any] | None
    ) -> list[DictRow]:
        """Run statements, all or none, and return their rows in order."""
        async with AsyncExitStack() as stack:
            conn = await self._enter(stack, connection)
            cursors = await self._run_all(conn, statements)
            return [row for cursor in cursors for row in await cursor.fetchall()]

    async def count_of_all(
        self, statements: Sequence[Statement], connection: Connection[Any] | None
    ) -> int:
        """Run statements, all or none, and return how many rows they met."""
        async with AsyncExitStack() as stack:
            conn = await self._enter(stack, connection)
            return sum([cursor.rowcount for cursor in await self._run_all(conn, statements)])

    async def ping(self, connection: Connection[Any] | None) -> None:
        """Find the table, as if for the first time."""
        async with AsyncExitStack() as stack:
            conn = await self._enter(stack, connection)
            await stack.enter_async_context(stack.enter_context(turn_on(conn)).taken())
            await stack.enter_async_context(self._scope(conn))
            if self._schema is None:
                self._relation = await resolve(conn, self._table)
            else:
                await check_there(conn, relation(self._schema, self._table))

    @asynccontextmanager
    async def stream(
        self, statement: Statement, batch_size: int, connection: Connection[Any] | None
    ) -> AsyncGenerator[RowStream[DictRow]]:
        """Have the rows of a statement for a block, while the server is still making them."""
        async with AsyncExitStack() as stack:
            conn = await self._enter(stack, connection)
            turn = stack.enter_context(turn_on(conn))
            async with turn.taken():
                rows = await self._open_stream(stack, turn, conn, statement, batch_size)
            yield rows

    # ------------------------------------------------------------ inside

    async def _enter(
        self, stack: AsyncExitStack, connection: Connection[Any] | None
    ) -> Connection[Any]:
        if connection is not None:
            return connection
        return await stack.enter_async_context(self._pool.acquire())

    async def _open_stream(
        self,
        stack: AsyncExitStack,
        turn: Turn,
        conn: Connection[Any],
        statement: Statement,
        batch_size: int,
    ) -> RowStream[DictRow]:
        found = self._relation
        opening = self._stream(conn, turn, statement, batch_size, found=found)
        try:
            return await stack.enter_async_context(opening)
        except psycopg.Error as exc:
            if found is None:
                raise
            found, refusal = await self._cure(conn, found, exc)
            opening = self._stream(conn, turn, statement, batch_size, found=found, refusal=refusal)
            return await stack.enter_async_context(opening)

    async def _run(
        self, statement: Statement, connection: Connection[Any] | None, *, wants_rows: bool
    ) -> Any:
        """Run one statement, and return its rows, or how many it met."""
        async with self._pool.acquire() if connection is None else nullcontext(connection) as conn:
            found = self._relation
            cursor: psycopg.AsyncCursor[Any]
            if found is None or self._has_settings or not _is_plain(conn) or is_anyones(conn):
                (cursor,) = await self._run_all(conn, (statement,))
            else:
                head, tail, parameters, is_special = statement
                for value in parameters:
                    if isinstance(value, dict):
                        is_special = True
                try:
                    if is_special:
                        cursor = await _execute(conn, found, statement)
                    else:  # the same, in less calls
                        cursor = cursor_of(conn, dict_row if wants_rows else tuple_row)
                        text: Any = head + found.text + tail
                        await cursor.execute(text, parameters)
                except psycopg.Error as exc:
                    cursor = await self._run_again(conn, statement, found, exc)
                if cursor.rowcount < 0:  # in a pipeline block of the caller's
                    await _sync(conn)
            return await cursor.fetchall() if wants_rows else cursor.rowcount

    async def _run_again(
        self, conn: Connection[Any], statement: Statement, found: Relation, error: psycopg.Error
    ) -> psycopg.AsyncCursor[DictRow]:
        with turn_on(conn) as turn:
            async with turn.taken():
                home, refusal = await self._cure(conn, found, error)
                return (await self._run_in_scope(conn, (statement,), [], home, refusal))[0]

    async def _run_all(
        self, conn: Connection[Any], statements: Sequence[Statement]
    ) -> list[psycopg.AsyncCursor[DictRow]]:
        """Run statements, all or none, and return a cursor for each, with its result."""
        with turn_on(conn) as turn:
            async with turn.taken():
                return await self._run_in_turn(conn, statements)

    async def _run_in_turn(
        self, conn: Connection[Any], statements: Sequence[Statement]
    ) -> list[psycopg.AsyncCursor[DictRow]]:
        cursors: list[psycopg.AsyncCursor[DictRow]] = []
        found = self._relation
        try:
            is_quick = self._has_settings and len(statements) == 1 and _is_plain(conn)
            if found is not None and is_quick and _can_pipeline(conn) and _is_idle(conn):
                async with self._settings.at_once(conn):
                    cursor = await _execute(conn, found, statements[0])
                return [cursor]
            await self._run_in_scope(conn, statements, cursors, found, None)
        except psycopg.Error as exc:
            if found is None:
                raise
            # In a pipeline there is a cursor for what was sent, but no result of what was refused.
            is_begun = bool(cursors) and cursors[0].rowcount >= 0
            found, refusal = await self._cure(conn, found, exc, is_begun=is_begun)
            cursors = await self._run_in_scope(conn, statements, [], found, refusal)
        if cursors[-1].rowcount < 0:
            await _sync(conn)
        return cursors

    async def _run_in_scope(
        self,
        conn: Connection[Any],
        statements: Sequence[Statement],
        cursors: list[psycopg.AsyncCursor[DictRow]],
        found: Relation | None,
        refusal: _Refusal | None,
    ) -> list[psycopg.AsyncCursor[DictRow]]:
        """Run statements in what they need around them, and collect their cursors."""
        async with self._scope(conn, is_whole=len(statements) > 1):
            if found is None:
                found = await self._find(conn, refusal)
            for statement in statements:
                cursors.append(await _execute(conn, found, statement))  # noqa: PERF401 - how far it came counts
        return cursors

    @asynccontextmanager
    async def _stream(
        self,
        conn: Connection[Any],
        turn: Turn,
        statement: Statement,
        batch_size: int,
        *,
        found: Relation | None,
        refusal: _Refusal | None = None,
    ) -> AsyncGenerator[RowStream[DictRow]]:
        async with AsyncExitStack() as stack:
            if found is None or self._has_settings or not _is_plain(conn):
                stack.enter_context(turn.streaming())
                await stack.enter_async_context(self._scope(conn, is_pipelined=False))
            if found is None:
                found = await self._find(conn, refusal)
            text: Any = f"{statement.head}{found.text}{statement.tail}"
            parameters = adapted(conn, statement.parameters)
            opening = conn.stream(text, parameters, batch_size=batch_size)
            yield await stack.enter_async_context(DictStream(conn, opening))

    @asynccontextmanager
    async def _scope(
        self, conn: Connection[Any], *, is_pipelined: bool = True, is_whole: bool = False
    ) -> AsyncGenerator[None]:
        """Have a transaction for a block, with the settings: the caller's, or else one for it.

        Args:
            conn: The connection.
            is_pipelined: Whether what is run in it may be.
            is_whole: Whether it is to be all or nothing in the caller's transaction as well.
        """
        if not self._has_settings:
            async with conn.transaction() if is_whole or _is_idle(conn) else nullcontext():
                yield
            return
        async with conn.pipeline() if is_pipelined and _can_pipeline(conn) else nullcontext():
            if not _is_idle(conn):
                async with self._settings.held(conn):
                    yield
            else:
                async with conn.transaction():
                    await self._settings.apply(conn)
                    yield

    async def _find(self, conn: Connection[Any], refusal: _Refusal | None) -> Relation:
        """Find the table; if it is where it was thought to be, that was not the matter."""
        found = self._relation = await resolve(conn, self._table)
        if refusal is not None:
            if found == refusal.relation:
                raise refusal.error
            emit("store.retried", table=self._table, error=refusal.error)
        return found

    async def _cure(
        self,
        conn: Connection[Any],
        found: Relation,
        exc: psycopg.Error,
        *,
        is_begun: bool = False,
    ) -> tuple[Relation | None, _Refusal | None]:
        """See to it that a refused statement may succeed; raise what it was refused with if not.

        Args:
            conn: The connection, out of whatever transaction was begun for it.
            found: Where its table was thought to be.
            exc: What it was refused with.
            is_begun: Whether another one has been run before it.

        Returns:
            Where its table is, and why it has to be found if it has to.
        """
        may_retry = not is_begun and _is_idle(conn)
        if is_moved(exc) and self._schema is None:
            if self._relation == found:
                self._relation = None
            if may_retry:
                return None, _Refusal(found, exc)
        elif is_plan_outdated(exc) and may_retry:
            async with conn.transaction(force_rollback=True):
                pass  # after a rollback psycopg prepares everything anew
            emit("store.retried", table=self._table, error=exc)
            return found, None
        raise exc


async def _execute(
    conn: Connection[Any], found: Relation, statement: Statement
) -> psycopg.AsyncCursor[DictRow]:
    head, tail, parameters, is_raw = statement
    parameters = adapted(conn, parameters)
    text: Any  # psycopg wants what is literal; this is made of names and placeholders
    if is_raw:
        text = f"{head}{found.raw}{tail}"
        raw_cursor = AsyncRawCursor(conn, row_factory=dict_row)
        # Large ones that are hardly ever the same aren't worth preparing.
        return await raw_cursor.execute(text, parameters, prepare=False)
    text = f"{head}{found.text}{tail}"
    return await cursor_of(conn, dict_row).execute(text, parameters)


async def _sync(conn: Connection[Any]) -> None:
    """Have the results of what a pipeline block of the caller's has sent."""
    async with conn.pipeline():
        pass


def _is_plain(conn: Connection[Any]) -> bool:
    """Tell whether one that begins by itself is the transaction that the connection wants."""
    return (
        conn.autocommit
        and conn.isolation_level is None
        and conn.read_only is None
        and conn.deferrable is None
    )


def _can_pipeline(conn: Connection[Any]) -> bool:
    """Tell whether the connection's cursors can be used in a pipeline."""
    return not issubclass(conn.cursor_factory, psycopg.AsyncClientCursor)


def _is_idle(conn: Connection[Any]) -> bool:
    """Tell whether no transaction is open on a connection, and nothing under way."""
    return conn.info.transaction_status.name == "IDLE"

"""`TableStore`: rows of one table, without SQL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, final, overload

from anyio.lowlevel import checkpoint

from ._identifiers import identifier
from ._running import Runner
from ._settings import Settings
from ._statements import delete, insert, select, update

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from anyio.abc import ObjectReceiveStream

    from pgstructured.driver import Connection
    from pgstructured.pool import Pool


@final
class TableStore:
    """Rows of one table (or view), by filters that can carry nothing but values.

    It has no state but where its table is, and costs nothing to make: one for each request is
    as good as one for the program, if the schema is told.

    An operation runs on the ``connection`` that it is given, or else on the one that the task
    has pinned of the pool, or else on any. It is part of the transaction that is open there, or
    one of its own: all or nothing.

    Args:
        pool: Lends connections.
        table: The table's name, as it is: it is quoted, so that case matters.
        schema: The name of its schema. Without one it is found by the first operation, in its
            transaction: by the ``search_path``, or else where a table of the name is, if there
            is only one. Temporary tables need ``"pg_temp"``.
        settings: Settings of the server's that hold for each operation, by their names: what
            policies of row-level security look at (``{"app.tenant": "t42"}``), but also
            ``role``, or ``statement_timeout``. They are local to the operation's transaction,
            and in a transaction of yours are set back at its end.

    Raises:
        InvalidIdentifierError: A name is none.
        TypeError: The value of a setting is no text.
    """

    def __init__(
        self,
        pool: Pool,
        table: str,
        *,
        schema: str | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self._name = identifier(table, kind="table").as_string()
        if schema is not None:
            self._name = f"{identifier(schema, kind='schema').as_string()}.{self._name}"
        self._runner = Runner(pool, table, schema, Settings(settings or {}))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name}>"

    async def retrieve(
        self,
        where: str | Mapping[str, object] | None = None,
        *,
        bindings: Mapping[str, object] | None = None,
        columns: Sequence[str] | None = None,
        order_by: str | Sequence[str] | None = None,
        limit: int | None = None,
        connection: Connection[Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Return the rows that a filter selects.

        Args:
            where: A mapping of columns to values that they equal, or text in the language of
                filters; all rows without one.
            bindings: Values for the ``${names}`` of the filter.
            columns: What of the rows; all columns without them.
            order_by: Columns, each with ``asc`` or ``desc`` and ``nulls first`` or ``last``
                if wanted.
            limit: How many rows at most.
            connection: Where to run it.

        Returns:
            Each row as a dictionary of columns to values, as psycopg makes them.

        Raises:
            FilterError: The filter or the order can't be understood; nothing was sent.
            InvalidIdentifierError: A name is none; nothing was sent.
            ValueError: The limit is none.
            TableNotFoundError: There is no such table in any schema.
            AmbiguousTableError: There are several.
            PoolError: There is no connection to be had.
            psycopg.Error: What the server says; with a schema that was told also that there is
                no such table in it.

        Cancellation:
            A checkpoint. The statement is cancelled on the server; within ``cancel_timeout`` the
            connection is as usable as before, or has failed.
        """
        statement = select(where, bindings, columns, order_by, limit)
        return await self._runner.rows(statement, connection)

    def stream(
        self,
        where: str | Mapping[str, object] | None = None,
        *,
        bindings: Mapping[str, object] | None = None,
        columns: Sequence[str] | None = None,
        order_by: str | Sequence[str] | None = None,
        limit: int | None = None,
        batch_size: int = 100,
        connection: Connection[Any] | None = None,
    ) -> AbstractAsyncContextManager[ObjectReceiveStream[dict[str, Any]]]:
        """Read the rows that a filter selects one by one, while the server is still making them.

        Nothing is kept but the batch in hand, and a reader that stops makes the server wait. The
        connection is the stream's for the length of the block.

        Args:
            where: As in `retrieve`, and so are the others.
            bindings: For the filter.
            columns: What of the rows.
            order_by: In which order.
            limit: How many at most.
            batch_size: Rows that are read at once, for speed.
            connection: Where to run it.

        Returns:
            A context manager; the stream.

        Raises:
            Exception: as `retrieve`, and as `Connection.stream`.

        Cancellation:
            Entering is a checkpoint and may wait for the first row. Leaving is shielded, and
            bounded by ``cancel_timeout``; a stream that is left early is cancelled on the server.
        """
        statement = select(where, bindings, columns, order_by, limit)
        return self._runner.stream(statement, batch_size, connection)

    @overload
    async def persist(
        self,
        data: Mapping[str, object] | Iterable[Mapping[str, object]],
        *,
        returning: None = None,
        on_conflict: Literal["error", "ignore"] = "error",
        connection: Connection[Any] | None = None,
    ) -> int: ...

    @overload
    async def persist(
        self,
        data: Mapping[str, object] | Iterable[Mapping[str, object]],
        *,
        returning: str | Sequence[str],
        on_conflict: Literal["error", "ignore"] = "error",
        connection: Connection[Any] | None = None,
    ) -> list[dict[str, Any]]: ...

    async def persist(
        self,
        data: Mapping[str, object] | Iterable[Mapping[str, object]],
        *,
        returning: str | Sequence[str] | None = None,
        on_conflict: Literal["error", "ignore"] = "error",
        connection: Connection[Any] | None = None,
    ) -> int | list[dict[str, Any]]:
        """Store one row or many: all of them, or none.

        Args:
            data: A mapping of columns to values, or many with the same columns. Values are what
                psycopg can adapt, and a bare `dict`, which is stored as JSON.
            returning: Columns of the stored rows to return, or ``"*"``.
            on_conflict: Whether a row that is there already is an error, or left as it is and
                not counted.
            connection: Where to run it.

        Returns:
            How many rows were stored; with ``returning`` these rows, in the order given.

        Raises:
            InvalidIdentifierError: A name is none; nothing was sent.
            TypeError: The data is no mapping, and not made of mappings.
            ValueError: A row has no columns, or others than the first; nothing was sent.
            Exception: as `retrieve`.

        Cancellation:
            A checkpoint. A cancelled call has stored all rows, or none.
        """
        statements = insert(data, returning, on_conflict)
        if len(statements) == 1:
            if returning is None:
                return await self._runner.count(statements[0], connection)
            return await self._runner.rows(statements[0], connection)
        if not statements:
            await checkpoint()
            return 0 if returning is None else []
        if returning is None:
            return await self._runner.count_of_all(statements, connection)
        return await self._runner.rows_of_all(statements, connection)

    async def mutate(
        self,
        data: Mapping[str, object],
        where: str | Mapping[str, object] | None,
        *,
        bindings: Mapping[str, object] | None = None,
        all_rows: bool = False,
        connection: Connection[Any] | None = None,
    ) -> int:
        """Change the rows that a filter selects.

        Args:
            data: What to set: a mapping of columns to values.
            where: As in `retrieve`.
            bindings: For the filter.
            all_rows: Whether an empty filter is meant.
            connection: Where to run it.

        Returns:
            How many rows it selected.

        Raises:
            FilterError: The filter can't be understood, or is empty; nothing was sent.
            ValueError: There is nothing to set.
            Exception: as `retrieve`.

        Cancellation:
            A checkpoint. A cancelled call has changed all of the rows, or none.
        """
        statement = update(data, where, bindings, all_rows=all_rows)
        return await self._runner.count(statement, connection)

    async def purge(
        self,
        where: str | Mapping[str, object] | None,
        *,
        bindings: Mapping[str, object] | None = None,
        all_rows: bool = False,
        connection: Connection[Any] | None = None,
    ) -> int:
        """Delete the rows that a filter selects.

        Args:
            where: As in `retrieve`.
            bindings: For the filter.
            all_rows: Whether an empty filter is meant.
            connection: Where to run it.

        Returns:
            How many rows it deleted.

        Raises:
            FilterError: The filter can't be understood, or is empty; nothing was sent.
            Exception: as `retrieve`.

        Cancellation:
            A checkpoint. A cancelled call has deleted all of the rows, or none.
        """
        statement = delete(where, bindings, all_rows=all_rows)
        return await self._runner.count(statement, connection)

    async def ping(self, *, connection: Connection[Any] | None = None) -> None:
        """Find out whether the server answers, and has the table.

        Args:
            connection: Where to ask.

        Raises:
            TableNotFoundError: There is no such table.
            AmbiguousTableError: There are several, and none on the search path.
            PoolError: There is no connection to be had.
            psycopg.Error: What the server says.

        Cancellation:
            A checkpoint; nothing changes.
        """
        await self._runner.ping(connection)

"""What a `Connection` does with more rows than fit into a list: the door to streams and COPY."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psycopg.rows import Row

from ._copying_in import CopyIn, open_copy_in
from ._copying_out import CopyOut, open_copy_out
from ._copying_rows import copy_in_rows
from ._counting import execute_no_rows
from ._operating import OperatingConnection
from ._streaming import RowStream, open_stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Iterable, Sequence
    from contextlib import AbstractAsyncContextManager

    from psycopg.abc import Params, Query, QueryNoTemplate


class BulkConnection(OperatingConnection[Row]):
    """A psycopg connection with streams of rows, and COPY as streams of bytes."""

    def stream(
        self, query: Query, params: Params | None = None, *, batch_size: int = 100
    ) -> AbstractAsyncContextManager[RowStream[Row]]:
        """Read the rows of a query one by one, while the server is still making them.

        A reader that stops makes the server wait. Until the last row, or the end of the block,
        other operations on the connection raise `anyio.BusyResourceError`. A stream that is left
        early is read to its end if little is left; else the statement is cancelled on the
        server, and a transaction that it is part of has failed.

        Args:
            query: The query; with `None` for ``params`` too it is one statement.
            params: Its parameters.
            batch_size: Rows that are read at once, for speed.

        Returns:
            A context manager; the stream, its columns known. A statement that has no result
            gives no rows.

        Raises:
            ValueError: if ``batch_size`` is less than 1.
            psycopg.Error: what the server says, with the query in a note.

        Cancellation:
            Entering is a checkpoint and may wait for the first row; a cancelled one leaves no
            statement running. Leaving is shielded, and bounded by ``cancel_timeout``.
        """
        return open_stream(self, query, params, batch_size)

    async def execute_no_rows(self, query: Query, params: Params | None = None) -> int:
        """Run a statement that returns no rows.

        Args:
            query: One statement, or several without ``params``.
            params: Its parameters.

        Returns:
            How many rows it inserted, updated, deleted or copied; 0 for others.

        Raises:
            UnexpectedRowsError: if it returned rows. What it did stays done, where no
                transaction block rolls it back.
            psycopg.Error: what the server says, with the query in a note.

        Cancellation:
            As `execute`: a checkpoint, and the statement is cancelled on the server.
        """
        return await execute_no_rows(self, query, params)

    def copy_in(self, statement: QueryNoTemplate) -> AbstractAsyncContextManager[CopyIn]:
        """Send data into a table, by ``COPY ... FROM STDIN``.

        Leaving the block normally completes it. An exception, also a cancellation, or
        `CopyIn.abort` refuses it, and nothing is stored.

        Args:
            statement: The statement, with all its options.

        Returns:
            A context manager; what takes the data.

        Raises:
            psycopg.ProgrammingError: if the statement is not such a COPY; nothing is run.
            psycopg.Error: what the server says, from a later `send` or from leaving the block.

        Cancellation:
            Entering is a checkpoint. Leaving normally is one too: cancelled before the server
            has all data it stores nothing; later it is as with every statement, all or nothing.
            Refusing is shielded, and bounded by ``cancel_timeout``.
        """
        return open_copy_in(self, statement)

    async def copy_in_rows(
        self,
        table: str | tuple[str, str],
        columns: Sequence[str],
        rows: Iterable[Sequence[Any]] | AsyncIterable[Sequence[Any]],
    ) -> int:
        """Insert many rows at once, by COPY: all of them, or none.

        Args:
            table: Its name, or its schema's and its own; taken literally, as those of
                ``columns`` are.
            columns: Names of the columns, one or more.
            rows: The rows, each with a value for each column. An async generator is closed.

        Returns:
            How many were stored.

        Raises:
            ValueError: if a row has more or fewer values than there are columns.
            Exception: what ``rows`` raises.
            psycopg.Error: what the server says.

        Cancellation:
            A checkpoint now and then. A cancelled call stores nothing, unless the server had all
            rows already.
        """
        return await copy_in_rows(self, table, columns, rows)

    def copy_out(self, statement: QueryNoTemplate) -> AbstractAsyncContextManager[CopyOut]:
        """Read data out of a table or query, by ``COPY ... TO STDOUT``.

        A reader that stops makes the server wait. Left early it is as with `stream`.

        Args:
            statement: The statement, with all its options.

        Returns:
            A context manager; what gives the data.

        Raises:
            psycopg.ProgrammingError: if the statement is not such a COPY; nothing is run.
            psycopg.Error: what the server says, here or from a later `receive`.

        Cancellation:
            Entering is a checkpoint. Leaving is shielded, and bounded by ``cancel_timeout``.
        """
        return open_copy_out(self, statement)

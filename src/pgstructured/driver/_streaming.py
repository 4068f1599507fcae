# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# What psycopg's cursors know of queries and rows are private names; this room may know them.
"""Rows of a result, while the server is still making them.

There is no task and no buffer but the batch in hand: rows are read when they are asked
for, and a reader that doesn't ask makes the server wait.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, Generic, TypeVar, final

import anyio
import psycopg
from anyio.abc import ObjectReceiveStream
from psycopg import errors, generators, pq
from psycopg._capabilities import capabilities

from pgstructured._util import NoPublicConstructor, create

from ._lifecycle import last_words
from ._occupying import Occupation, may_await
from ._traces import note

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from psycopg.abc import Params, PQGen, Query
    from psycopg.pq.abc import PGresult

    from ._operating import OperatingConnection

Row_co = TypeVar("Row_co", covariant=True)
Row = TypeVar("Row")

_ROWS: Final = (pq.ExecStatus.TUPLES_CHUNK, pq.ExecStatus.SINGLE_TUPLE)
_END: Final = (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK, pq.ExecStatus.EMPTY_QUERY)
_COPY: Final = (pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_OUT)

_SMALL: Final = 10_000
"""Rows that are read and dropped rather than cancelled, where a stream is left early."""


@final
class RowStream(ObjectReceiveStream[Row_co], Generic[Row_co], metaclass=NoPublicConstructor):
    """The rows of one query, read from the server as they are asked for.

    Made by `Connection.stream`. Iterate, or call `receive` or `receive_many`; one task at
    a time. Until its end, or the end of its block, other operations on the connection
    raise `anyio.BusyResourceError`.
    """

    def __init__(self, conn: OperatingConnection[Row_co], batch_size: int) -> None:
        self._conn = conn
        self._cursor: psycopg.AsyncCursor[Row_co] = conn.cursor()
        self._batch_size = batch_size
        self._occupation = Occupation(conn, "streaming from", self._discard)
        self._rows: Iterator[Row_co] = iter(())
        self._has_begun = False
        self._has_ended = False
        self._is_closed = False
        self._columns: tuple[psycopg.Column, ...] = ()

    @property
    def columns(self) -> tuple[psycopg.Column, ...]:
        """The result's columns, known also if it has no rows; empty for statements without one."""
        return self._columns

    async def receive(self) -> Row_co:
        """Return the next row, waiting for the server if no row is at hand.

        Raises:
            anyio.EndOfStream: after the last row.
            anyio.ClosedResourceError: if the stream was left or cancelled, or the connection
                was closed.
            anyio.BusyResourceError: if another task is receiving.
            ConnectionLostError: if the connection has failed.
            psycopg.Error: what the server says, or what is wrong with a row.

        Cancellation:
            A checkpoint. A cancelled call ends the stream: within ``cancel_timeout`` the
            connection is idle or has failed.
        """
        await self._checkpoint()
        if self._is_going_on:
            for row in self._rows:
                return row
        self._rows = iter(await self._fetch())
        return next(self._rows)

    async def receive_many(self) -> list[Row_co]:
        """Return the rows that are at hand, or else the next batch of them.

        Returns:
            At least one row, and at most ``batch_size``.

        Raises:
            Exception: as `receive`.

        Cancellation:
            As `receive`.
        """
        await self._checkpoint()
        if self._is_going_on and (rows := list(self._rows)):
            return rows
        return await self._fetch()

    async def __anext__(self) -> Row_co:
        """Return the next row; as `receive`, but a checkpoint once for each batch only."""
        if self._conn._waiter is not None and not self._occupation.is_over:
            for row in self._rows:
                return row
        try:
            self._rows = iter(await self._fetch())
        except anyio.EndOfStream:
            raise StopAsyncIteration from None
        return next(self._rows)

    async def aclose(self) -> None:
        """End the stream before the end of its block; harmless if it has ended.

        Cancellation:
            Shielded, and bounded by the connection's ``cancel_timeout``.
        """
        self._is_closed = True
        self._rows = iter(())
        await self._occupation.end()

    # ------------------------------------------------------------------ inside

    async def _begin(self, query: Query, params: Params | None) -> None:
        cursor = self._cursor
        # Before 17 libpq gives rows one by one only.
        size = self._batch_size if capabilities.has_stream_chunked() else 1
        await self._occupation.begin()
        await self._occupation.run(cursor._stream_send_gen(query, params, size=size))
        self._occupation.query = cursor._query
        note(self._conn, cursor._query)
        self._rows = iter(await self._occupation.run(self._fetch_gen()))
        if self._has_ended:
            await self._occupation.end()

    def _abandon(self) -> None:
        self._is_closed = True
        self._occupation.abandon()

    @property
    def _is_going_on(self) -> bool:
        return self._conn._waiter is not None and not self._occupation.is_over

    async def _checkpoint(self) -> None:
        if self._occupation.is_over:
            await anyio.lowlevel.checkpoint()
        else:
            await self._occupation.checkpoint()

    async def _fetch(self) -> list[Row_co]:
        if self._has_ended and not self._is_closed:
            raise anyio.EndOfStream
        rows = await self._occupation.run(self._fetch_gen())
        if self._has_ended:
            await self._occupation.end()
            raise anyio.EndOfStream
        return rows

    def _fetch_gen(self) -> PQGen[list[Row_co]]:
        """Read the next batch; an empty one is the end."""
        pgconn = self._conn.pgconn
        result = yield from generators.fetch(pgconn)
        if result is None or result.status not in _ROWS:
            yield from self._end_gen(result)
            return []
        cursor = self._cursor
        if self._has_begun:
            cursor._tx.set_pgresult(result, set_loaders=False)
        else:
            self._show(result)
            cursor._make_row = cursor._make_row_maker()
        return cursor._tx.load_rows(0, result.ntuples, cursor._make_row)

    def _end_gen(self, result: PGresult | None) -> PQGen[None]:
        if result is not None and result.status in _COPY:
            raise psycopg.ProgrammingError("a COPY can't be streamed: use copy_in() or copy_out()")
        if result is not None and result.status not in _END:
            raise errors.error_from_result(result, encoding=self._conn.pgconn._encoding)
        if result is not None and not self._has_begun:
            self._show(result)
        last = yield from generators.fetch(self._conn.pgconn)
        if last is not None:  # found only when the statement was committed, in autocommit
            raise errors.error_from_result(last, encoding=self._conn.pgconn._encoding)
        self._has_ended = True

    def _show(self, result: PGresult) -> None:
        self._has_begun = True
        cursor = self._cursor
        cursor.pgresult = result
        cursor._tx.set_pgresult(result)
        self._columns = tuple(cursor.description or ())

    def _discard(self) -> PQGen[None]:
        rows = _SMALL
        conn = self._conn
        while (result := (yield from generators.fetch(conn.pgconn))) is not None:
            rows -= result.ntuples
            conn._last_words = last_words(result, conn.pgconn._encoding) or conn._last_words
            if rows < 0 or result.status in _COPY:
                return


@asynccontextmanager
async def open_stream(
    conn: OperatingConnection[Row], query: Query, params: Params | None, batch_size: int
) -> AsyncGenerator[RowStream[Row]]:
    """Do what `Connection.stream` says."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if conn._pipeline is not None:
        raise psycopg.ProgrammingError("rows can't be streamed in a pipeline block")
    stream = create(RowStream, conn, batch_size)
    try:
        await stream._begin(query, params)
        yield stream
    except GeneratorExit as exc:
        if not may_await(exc):
            stream._abandon()
        raise
    finally:
        await stream.aclose()  # noqa: ASYNC102 - shielded and bounded inside

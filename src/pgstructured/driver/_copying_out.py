# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# What psycopg's cursors know of COPY are private names; this room may know them.
"""COPY TO STDOUT: bytes or rows, read as they are asked for.

libpq gives one row at a time. Handing each to a task costs more than the row, so all that
is there is taken at once, up to what was asked for.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, final

import anyio
import psycopg
from anyio.abc import ByteReceiveStream

from pgstructured._util import NoPublicConstructor, create

from ._copy_statements import read_copy
from ._occupying import Occupation, may_await, read_outcome
from ._traces import note
from ._waiting import READ

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
    from typing import Self

    from psycopg.abc import Buffer, PQGen, QueryNoTemplate

    from ._copy_statements import CopyStatement
    from ._operating import OperatingConnection

_PIECE: Final = 64 * 1024
"""Bytes that are read at once."""

_SMALL: Final = 1024 * 1024
"""Bytes that are read and dropped rather than cancelled, where a COPY is left early."""


@final
class CopyOut(ByteReceiveStream, metaclass=NoPublicConstructor):
    """Data on their way out of a table.

    Made by `Connection.copy_out`. Read it with `receive`, iterate over it, or over its
    `rows`; one task at a time. Until its end, or the end of its block, other operations on
    the connection raise `anyio.BusyResourceError`.
    """

    def __init__(self, conn: OperatingConnection[Any], statement: CopyStatement) -> None:
        self._conn = conn
        self._statement = statement
        self._cursor = conn.cursor()
        self._occupation = Occupation(conn, "copying out of", self._discard_gen)
        self._rest = memoryview(b"")
        self._has_received = False
        self._rows: _CopiedRows | None = None
        self._is_exhausted = False
        self._has_ended = False
        self._is_closed = False

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Return some data, waiting for the server if none are at hand.

        Args:
            max_bytes: The most to return. Pieces have nothing to do with rows.

        Returns:
            At least one byte.

        Raises:
            ValueError: if ``max_bytes`` is less than 1.
            anyio.EndOfStream: after the last byte.
            anyio.ClosedResourceError: if the COPY was left or cancelled, or the connection
                was closed.
            anyio.BusyResourceError: if another task is receiving.
            ConnectionLostError: if the connection has failed.
            psycopg.Error: what the server says.

        Cancellation:
            A checkpoint. A cancelled call ends the COPY: within ``cancel_timeout`` the
            connection is idle or has failed.
        """
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, not {max_bytes}")
        if self._rows is not None:
            raise psycopg.ProgrammingError("a COPY whose rows() are read can't be received as well")
        self._has_received = True
        if self._rest:
            self._occupation.check()
            await self._occupation.checkpoint()
            data = self._rest
        else:
            data = memoryview(b"".join(await self._read(self._pieces_gen(max_bytes))))
        self._rest = data[max_bytes:]
        return bytes(data[:max_bytes])

    def rows(self) -> AsyncIterator[tuple[Any, ...]]:
        """Return an iterator over the rows.

        Their values are strings (bytes, of a binary COPY), or what `set_types` makes of them.
        A checkpoint once for each piece that is read from the server.

        Raises:
            psycopg.ProgrammingError: if the statement asks for another format than Postgres'
                own text or binary format, or `receive` was called before.
        """
        if self._rows is None:
            if self._has_received:
                raise psycopg.ProgrammingError("a COPY that is received has no rows() any more")
            if not (self._statement.is_plain or self._copy.formatter.format):
                raise psycopg.ProgrammingError(
                    "rows are read in Postgres' own text or binary format, and the statement "
                    "asks for another: receive bytes"
                )
            self._rows = _CopiedRows(self)
        return self._rows

    def set_types(self, types: Sequence[int | str]) -> None:
        """Say what types the columns have, by name or OID, before `rows` are read.

        Args:
            types: One for each column.
        """
        self._copy.set_types(types)

    async def aclose(self) -> None:
        """End the COPY before the end of its block; harmless if it has ended.

        Cancellation:
            Shielded, and bounded by the connection's ``cancel_timeout``.
        """
        self._is_closed = True
        self._rest = memoryview(b"")
        await self._occupation.end()

    # ------------------------------------------------------------------ inside

    async def _begin(self) -> None:
        conn = self._conn
        cursor = self._cursor
        await self._occupation.begin()
        statement = self._statement.text.encode(conn.info.encoding)
        await self._occupation.run(cursor._start_copy_gen(statement))
        self._occupation.query = cursor._query
        note(conn, cursor._query)
        self._copy = psycopg.AsyncCopy(cursor)

    def _abandon(self) -> None:
        self._is_closed = True
        self._occupation.abandon()

    async def _read(self, gen: PQGen[list[Any]]) -> list[Any]:
        if self._has_ended and not self._is_closed:
            await anyio.lowlevel.checkpoint()
            raise anyio.EndOfStream
        items = await self._occupation.run(gen)
        if not items:
            self._has_ended = True
            await self._occupation.end()
            raise anyio.EndOfStream
        return items

    def _pieces_gen(self, limit: int) -> PQGen[list[Buffer]]:
        """Read what is there, about ``limit`` bytes of it at most; nothing at the end."""
        pgconn = self._conn.pgconn
        pieces: list[Buffer] = []
        size = 0
        is_dry = False
        while size < limit and not self._is_exhausted:
            length, piece = pgconn.get_copy_data(1)
            if length > 0:
                pieces.append(piece)
                size += length
                is_dry = False
            elif length < 0:
                self._is_exhausted = True
            elif not is_dry:
                pgconn.consume_input()
                is_dry = True
            elif pieces:
                break
            else:
                while not (yield READ):  # type: ignore[misc]  # psycopg types only its own enum
                    pass
                pgconn.consume_input()
        if not pieces:
            yield from read_outcome(pgconn)
        return pieces

    def _rows_gen(self) -> PQGen[list[tuple[Any, ...]]]:
        parse = self._copy.formatter.parse_row
        while pieces := (yield from self._pieces_gen(_PIECE)):
            # The end of a binary COPY is no row.
            if rows := [row for piece in pieces if (row := parse(piece)) is not None]:
                return rows
        return []

    def _discard_gen(self) -> PQGen[None]:
        size = 0
        while size < _SMALL and (pieces := (yield from self._pieces_gen(_PIECE))):
            size += sum(map(len, pieces))


@final
class _CopiedRows:
    """The rows of a `CopyOut`."""

    __slots__ = ("_copy", "_rows")

    def __init__(self, copy: CopyOut) -> None:
        self._copy = copy
        self._rows: Iterator[tuple[Any, ...]] = iter(())

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[Any, ...]:
        copy = self._copy
        if copy._conn._waiter is not None and not copy._occupation.is_over:
            for row in self._rows:
                return row
        try:
            self._rows = iter(await copy._read(copy._rows_gen()))
        except anyio.EndOfStream:
            raise StopAsyncIteration from None
        return next(self._rows)


@asynccontextmanager
async def open_copy_out(
    conn: OperatingConnection[Any], statement: QueryNoTemplate
) -> AsyncGenerator[CopyOut]:
    """Do what `Connection.copy_out` says."""
    conn._check_connection_ok()
    copy = create(CopyOut, conn, read_copy(statement, conn, "TO"))
    try:
        await copy._begin()
        yield copy
    except GeneratorExit as exc:
        if not may_await(exc):
            copy._abandon()
        raise
    finally:
        await copy.aclose()  # noqa: ASYNC102 - shielded and bounded inside

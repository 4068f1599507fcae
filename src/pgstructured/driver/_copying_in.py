# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# What psycopg's cursors know of COPY are private names; this room may know them.
"""COPY FROM STDIN: bytes or rows, sent as fast as the server takes them.

libpq doesn't look at what the server says while data go out. So we look whether there is
anything to be read, and what it can be: a notice is handed on, and what stays unread for
a while is the error that has ended the COPY.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, cast, final

import anyio
import psycopg
from anyio.abc import ByteSendStream
from psycopg._copy_base import (
    _binary_signature,
    _binary_trailer,
    format_row_binary,
    format_row_text,
)

from pgstructured._util import NoPublicConstructor, create

from ._copy_statements import read_copy
from ._occupying import Occupation, may_await, read_outcome
from ._traces import note
from ._waiting import READ, WRITE, poll_now

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from psycopg.abc import Buffer, PQGen, QueryNoTemplate
    from psycopg.pq.abc import PGresult

    from ._copy_statements import CopyStatement
    from ._operating import OperatingConnection

PIECE: Final = 64 * 1024
"""Bytes that are sent at once; what is smaller is collected."""

_DOUBT: Final = 1.0
"""Seconds after which something unread can't be the half of a notice any more."""


@final
class CopyIn(ByteSendStream, metaclass=NoPublicConstructor):
    """Data on their way into a table.

    Made by `Connection.copy_in`. Leaving its block completes the COPY; an exception or
    `abort` refuses it, and nothing is stored. Until then other operations on the
    connection raise `anyio.BusyResourceError`.
    """

    def __init__(self, conn: OperatingConnection[Any], statement: CopyStatement) -> None:
        self._conn = conn
        self._statement = statement
        self._cursor = conn.cursor()
        self._occupation = Occupation(conn, "copying into", self._refuse_gen)
        self._buffer = bytearray()
        self._is_binary = False
        self._has_header = False
        self._has_rows = False
        self._is_closed = False
        self._is_aborted = False
        self._reason = "left half-way"
        self._hear: Callable[[PGresult], None] | None = None
        self._notices = 0
        self._unread_since: float | None = None
        self._row_count = 0

    @property
    def row_count(self) -> int:
        """How many rows were stored, once the block has been left; 0 before, and if none were."""
        return self._row_count

    async def send(self, item: bytes) -> None:
        """Send some data, in the format that the statement names; any piece of them will do.

        Small pieces are collected. What the server finds wrong may come out of a later call,
        or of the end of the block.

        Raises:
            anyio.ClosedResourceError: if the COPY was left, aborted or cancelled, or the
                connection was closed.
            anyio.BusyResourceError: if another task is sending.
            ConnectionLostError: if the connection has failed.
            psycopg.Error: what the server says.

        Cancellation:
            A checkpoint. A cancelled call refuses the COPY: nothing is stored, and within
            ``cancel_timeout`` the connection is idle or has failed.
        """
        self._check()
        await self._occupation.checkpoint()
        self._has_header = True
        if len(item) < PIECE:
            self._buffer += item
            if len(self._buffer) >= PIECE:
                await self._send(self._take())
        else:
            await self._send(self._take(), item)

    async def send_row(self, row: Sequence[Any]) -> None:
        """Send a row of Python objects, in Postgres' text or binary format.

        Args:
            row: One value for each column of the statement.

        Raises:
            psycopg.ProgrammingError: if the statement asks for another format than these,
                or a value can't be adapted.
            Exception: as `send`.

        Cancellation:
            As `send`.
        """
        self._check()
        await self._occupation.checkpoint()
        if self._format(row) >= PIECE:
            await self._send(self._take())

    def set_types(self, types: Sequence[int | str]) -> None:
        """Say what types the columns have, by name or OID; binary COPY doesn't cast.

        Args:
            types: One for each column of `send_row`.
        """
        psycopg.AsyncCopy(self._cursor).set_types(types)

    async def abort(self, reason: str) -> None:
        """Refuse the COPY: nothing is stored. Leaving the block is no error then.

        In a transaction block the transaction has failed, as with every error.

        Args:
            reason: What the server's log says about it.

        Raises:
            ValueError: if the reason is no text, or has a NUL.
            anyio.ClosedResourceError: if it is over already.
            ConnectionLostError: if the connection has failed.

        Cancellation:
            A checkpoint; the COPY is refused in any case. That is shielded, and bounded by
            the connection's ``cancel_timeout``.
        """
        self._check()
        given: Any = reason
        if not isinstance(given, str) or "\0" in given:
            raise ValueError(f"reason must be a str without a NUL in it, not {given!r}")
        self._reason = reason
        await self._occupation.checkpoint()
        self._is_aborted = True
        await self._occupation.end()

    async def aclose(self) -> None:
        """Send nothing more. What becomes of the COPY is up to the end of its block.

        Cancellation:
            A checkpoint; closed in any case.
        """
        self._is_closed = True
        await anyio.lowlevel.checkpoint()

    # ------------------------------------------------------------------ inside

    async def _begin(self) -> None:
        conn = self._conn
        cursor = self._cursor
        pgconn = conn.pgconn
        await self._occupation.begin()
        statement = self._statement.text.encode(conn.info.encoding)
        await self._occupation.run(cursor._start_copy_gen(statement))
        self._occupation.query = cursor._query
        note(conn, cursor._query)
        self._is_binary = bool(psycopg.AsyncCopy(cursor).formatter.format)
        self._hear = pgconn.notice_handler
        pgconn.notice_handler = self._count_notice

    async def _complete(self) -> None:
        if not self._is_aborted:
            await self._occupation.run(self._complete_gen())

    def _count_notice(self, result: PGresult) -> None:
        self._notices += 1
        cast("Any", self._hear)(result)

    async def _end(self) -> None:
        self._is_closed = True
        try:
            await self._occupation.end()
        finally:
            self._unhear()

    def _abandon(self) -> None:
        self._is_closed = True
        self._occupation.abandon()
        self._unhear()

    def _unhear(self) -> None:
        if self._hear is not None:
            self._conn.pgconn.notice_handler = self._hear

    def _check(self) -> None:
        if self._is_closed:
            raise anyio.ClosedResourceError
        self._occupation.check()

    def _take(self) -> bytearray:
        buffer, self._buffer = self._buffer, bytearray()
        return buffer

    def _format(self, row: Sequence[Any]) -> int:
        """Add a row to what is to be sent, and return how many bytes that are."""
        buffer = self._buffer
        mark = len(buffer)
        try:
            if self._is_binary:
                if not self._has_header:
                    buffer += _binary_signature
                format_row_binary(row, self._cursor._tx, buffer)
            elif self._statement.is_plain:
                format_row_text(row, self._cursor._tx, buffer)
            else:
                raise psycopg.ProgrammingError(
                    "rows are sent in Postgres' own text or binary format, and the statement "
                    "asks for another: send bytes"
                )
        except BaseException:
            del buffer[mark:]
            raise
        self._has_header = self._has_rows = True
        return len(buffer)

    async def _send(self, *pieces: Buffer) -> None:
        await self._occupation.run(self._send_gen(*pieces))

    def _send_gen(self, *pieces: Buffer) -> PQGen[None]:
        pgconn = self._conn.pgconn
        for piece in pieces:
            view = memoryview(piece)
            for start in range(0, len(view), PIECE):
                pgconn.put_copy_data(view[start : start + PIECE])
                yield from self._flush_gen()
                if poll_now(pgconn.socket, READ):
                    self._listen()
                if self._has_failed():
                    yield from self._end_gen(b"refused")  # raises what the server has said

    def _flush_gen(self) -> PQGen[None]:
        pgconn = self._conn.pgconn
        while pgconn.flush():
            while not (ready := (yield READ | WRITE)):  # type: ignore[misc]  # psycopg types only its own enum
                pass
            # A server that can't get rid of its notices takes no data either.
            if ready & READ:
                self._listen()

    def _listen(self) -> None:
        notices = self._notices
        self._conn.pgconn.consume_input()
        self._conn.pgconn.is_busy()  # looks at what has been read
        is_heard = self._notices > notices
        self._unread_since = None if is_heard else self._unread_since or perf_counter()

    def _has_failed(self) -> bool:
        since = self._unread_since
        return since is not None and perf_counter() - since > _DOUBT

    def _complete_gen(self) -> PQGen[None]:
        if self._is_binary and not self._has_header:
            self._buffer += _binary_signature + _binary_trailer
        elif self._is_binary and self._has_rows:
            self._buffer += _binary_trailer
        yield from self._send_gen(self._take())
        result = yield from self._end_gen(None)
        self._row_count = result.command_tuples or 0

    def _refuse_gen(self) -> PQGen[None]:
        yield from self._end_gen(self._reason.encode(self._conn.pgconn._encoding, "replace"))

    def _end_gen(self, reason: bytes | None) -> PQGen[PGresult]:
        pgconn = self._conn.pgconn
        pgconn.put_copy_end(reason)
        yield from self._flush_gen()
        return (yield from read_outcome(pgconn))


@asynccontextmanager
async def open_copy_in(
    conn: OperatingConnection[Any], statement: QueryNoTemplate
) -> AsyncGenerator[CopyIn]:
    """Do what `Connection.copy_in` says."""
    conn._check_connection_ok()
    copy = create(CopyIn, conn, read_copy(statement, conn, "FROM"))
    try:
        await copy._begin()
        yield copy
        await copy._complete()
    except BaseException as exc:
        if isinstance(exc, GeneratorExit) and not may_await(exc):
            copy._abandon()
        copy._reason = f"interrupted by {type(exc).__qualname__}"
        raise
    finally:
        await copy._end()  # noqa: ASYNC102 - shielded and bounded inside

# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# What occupies a connection works on its insides.
"""The time in which a stream or a COPY has a connection to itself.

It begins with the connection's lock and ends with an idle connection, or one that has
failed. Everything in between goes through `run`, so that whatever ends the stream early
ends it the same way: an error, a cancellation, the end of the block or of the
transaction around it, the connection's being closed.

==================  =====================================  =================================
while it is         other operations                       its own operations
==================  =====================================  =================================
going on            `anyio.BusyResourceError`              run, one at a time
over                run                                    `anyio.ClosedResourceError`, or
                                                           `ConnectionLostError` if it failed
==================  =====================================  =================================
"""

from __future__ import annotations

from contextlib import suppress
from inspect import CO_ASYNC_GENERATOR
from typing import TYPE_CHECKING, Any, Final, cast, final

import anyio
import psycopg
from psycopg import errors, generators, pq

from ._driving import Work
from ._lifecycle import ConnectionState, find_last_words, last_words
from ._quoting import quote_query
from ._settling import request_cancel

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg._queries import PostgresQuery
    from psycopg.abc import RV, PQGen
    from psycopg.pq.abc import PGconn, PGresult

    from ._operating import OperatingConnection
    from ._waiting import SocketWaiter

_ACTIVE: Final = pq.TransactionStatus.ACTIVE
_BAD: Final = pq.ConnStatus.BAD
_WELL: Final = pq.ExecStatus.COMMAND_OK

_PATIENCE: Final = 0.25
"""Seconds that what was left early has to end by itself, before the server is asked to cancel."""


@final
class Occupation:
    """One stream or COPY on one connection.

    Args:
        conn: The connection.
        action: What is being done, as `anyio.BusyResourceError` says it.
        finish: Makes the generator that ends what was left early, if it is small: it reads
            what is left of a result, or refuses a COPY.
    """

    __slots__ = (
        "_cause",
        "_conn",
        "_finish",
        "_freed",
        "_is_running",
        "action",
        "is_over",
        "query",
    )

    def __init__(
        self, conn: OperatingConnection[Any], action: str, finish: Callable[[], PQGen[None]]
    ) -> None:
        self._conn = conn
        self._finish = finish
        self._is_running = False
        self._freed: anyio.Event | None = None
        self._cause: BaseException | None = None
        self.action: Final = action
        self.is_over = True
        """Whether the connection is free for others again."""
        self.query: PostgresQuery | None = None
        """What errors are about."""

    async def begin(self) -> None:
        """Wait for the connection, and keep others off it.

        Raises:
            anyio.BusyResourceError: if another stream or COPY has it.
            psycopg.OperationalError: if it is closed or has failed.

        Cancellation:
            A checkpoint. A cancelled call has taken nothing.
        """
        conn = self._conn
        await conn._lock.acquire()
        self.is_over = False
        conn._lock.occupant = self
        try:
            if conn._waiter is None:
                conn._attach()
        except psycopg.Error:
            self._hand_over()  # it was closed while others had it
            raise

    def check(self) -> None:
        """See whether an operation may run.

        Raises:
            anyio.ClosedResourceError: if it is over, or the connection was closed.
            anyio.BusyResourceError: if another task runs one.
            ConnectionLostError: if the connection has failed.
        """
        conn = self._conn
        if self.is_over or conn._waiter is None:
            if conn.state is ConnectionState.FAILED:
                raise conn._refusal()
            raise anyio.ClosedResourceError from self._cause
        if self._is_running:
            raise anyio.BusyResourceError(self.action)

    async def checkpoint(self) -> None:
        """Notice a cancellation that is pending; it ends the occupation."""
        try:
            await self._conn._lock.checkpoint_if_cancelled()
        except anyio.get_cancelled_exc_class() as exc:
            self._cause = exc
            await self.end()  # noqa: ASYNC102 - bounded by cancel_timeout inside
            raise

    async def run(self, gen: PQGen[RV]) -> RV:
        """Run a generator on the connection; whatever interrupts it ends the occupation.

        Raises:
            Exception: as `check`, and what ``gen`` raises.

        Cancellation:
            A checkpoint. After a cancelled call the connection is idle or has failed.
        """
        self.check()
        conn = self._conn
        self._is_running = True
        try:
            await conn._lock.checkpoint_if_cancelled()
            value = await conn.wait(_hearing(conn, gen))
        except GeneratorExit:
            raise  # nothing can be awaited any more; the block that is left sees to it
        except psycopg.Error as exc:
            was_over = self.is_over
            await self._end_with(exc)  # noqa: ASYNC120 - shielded and bounded inside
            if was_over or conn.state in {ConnectionState.CLOSING, ConnectionState.CLOSED}:
                raise anyio.ClosedResourceError from exc
            if conn.state is ConnectionState.FAILED and exc.sqlstate is None:
                raise conn._refusal()  # noqa: B904 - its cause is what ended the connection
            raise
        except BaseException as exc:
            await self._end_with(exc)  # noqa: ASYNC102 - bounded by cancel_timeout inside
            raise
        self._stop_running()
        if self.is_over:
            raise anyio.ClosedResourceError
        return value

    async def end(self) -> None:
        """Make the connection idle and let others have it; harmless if that is done.

        What is small is read to its end, and what is not is cancelled on the server.
        Another task that is in `run` is got out of it.

        Cancellation:
            Shielded, and bounded by the connection's ``cancel_timeout``.
        """
        if self.is_over:
            return
        self.is_over = True
        conn = self._conn
        try:
            if self._is_running:
                await self._interrupt()
            if conn._waiter is not None and conn.pgconn.transaction_status == _ACTIVE:
                await self._finish_early()
        finally:
            conn._lock.occupant = None
            if conn._waiter is not None:
                await conn._lock.release()  # noqa: ASYNC102 - bounded by cancel_timeout inside
            else:
                conn._lock.hand_over()

    def abandon(self) -> None:
        """End it without awaiting anything, in a coroutine that is being closed."""
        if not self.is_over:
            if self._conn.pgconn.transaction_status == _ACTIVE:
                self._conn._fail(psycopg.OperationalError("an operation was abandoned half-way"))
            self._hand_over()

    # ------------------------------------------------------------------ inside

    def _hand_over(self) -> None:
        self.is_over = True
        self._conn._lock.occupant = None
        self._conn._lock.hand_over()

    def _stop_running(self) -> None:
        self._is_running = False
        if self._freed is not None:
            self._freed.set()

    async def _end_with(self, exc: BaseException) -> None:
        self._stop_running()
        self._cause = exc
        quote_query(exc, self.query)
        await self.end()

    async def _interrupt(self) -> None:
        """Get another task out of `run`: what it waits for is cancelled on the server."""
        conn = self._conn
        self._freed = anyio.Event()
        with anyio.move_on_after(conn._cancel_timeout, shield=True):
            with suppress(psycopg.Error, OSError):
                await request_cancel(conn.pgconn)
            await self._freed.wait()
        if self._is_running:
            conn._fail(psycopg.OperationalError("a task that uses it couldn't be interrupted"))

    async def _finish_early(self) -> None:
        conn = self._conn
        if conn._cleaned_up_for:
            conn._renew_budget()
        started = anyio.current_time()
        patience = min(_PATIENCE, max(conn._cancel_timeout - conn._cleaned_up_for, 0.0))
        work = Work(_hearing(conn, self._finish()))
        try:
            # Closed by another task, which also reads what is left.
            with suppress(anyio.ClosedResourceError, anyio.BusyResourceError):
                with anyio.move_on_after(patience, shield=True):
                    await work.advance(cast("SocketWaiter", conn._waiter))
        finally:
            conn._cleaned_up_for += anyio.current_time() - started
            if not work.is_done:
                await conn._settle(work, may_cancel=True)  # noqa: ASYNC102 - bounded inside
        if work.error is not None and conn._state is ConnectionState.OPEN:
            conn._take_note(work.error)


def may_await(exc: GeneratorExit) -> bool:
    """Tell whether a block that ``exc`` ends may still await; for who has caught it around a yield.

    It may in an async generator that is closed, and not in a coroutine that is. Where ``exc``
    was raised tells which of them it is.
    """
    flags, traceback = 0, exc.__traceback__
    while traceback is not None and (traceback := traceback.tb_next) is not None:
        flags = traceback.tb_frame.f_code.co_flags
    return bool(flags & CO_ASYNC_GENERATOR)


def read_outcome(pgconn: PGconn) -> PQGen[PGresult]:
    """Read a statement's results to their end.

    Returns:
        The first, which says that it went well.

    Raises:
        psycopg.Error: what the server says instead; at once if the session ends with it.
    """
    outcome = cast("PGresult", (yield from generators.fetch(pgconn)))
    if last_words(outcome, pgconn._encoding) is None:
        yield from generators.fetch(pgconn)  # None: that was all
    if outcome.status != _WELL:
        raise errors.error_from_result(outcome, encoding=pgconn._encoding)
    return outcome


def _hearing(conn: OperatingConnection[Any], gen: PQGen[RV]) -> PQGen[RV]:
    """Run ``gen``; where the session ends under it, raise what the server said to that.

    libpq reports the end of the stream before it looks at what has come ahead of it. Asked
    once more it gives the rest: as a result, or in the middle of a COPY as a notice.
    """
    try:
        return (yield from gen)
    except psycopg.OperationalError as exc:
        pgconn = conn.pgconn
        if pgconn.status != _BAD or find_last_words(exc) is not None:
            raise
        words = None
        with suppress(psycopg.Error):
            while (result := pgconn.get_result()) is not None:
                words = words or last_words(result, pgconn._encoding)
            pgconn.is_busy()
        words = words or conn._last_words
        if words is None:
            raise
        raise words from exc

# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# A pool has to know whether a connection is as it was, and that is written inside of it.
"""What a pool has to know of its connections; for this library's rooms only.

A connection that comes back is to be as it was when it was new. What psycopg keeps in
Python is compared, which costs no round trip. What the session keeps on the server can't
be looked at without one, so statements leave traces; see `_traces`.
"""

from __future__ import annotations

import math
import select
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, final

import anyio
import psycopg
from psycopg import errors, generators, pq
from psycopg.errors import ConnectionTimeout

from ._driving import Work
from ._lending import Statement, is_session_pooled
from ._lifecycle import ConnectionState
from ._traces import Trace, note_statements
from ._watching import take_news

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg.abc import PQGen

    from ._connection import Connection
    from ._waiting import SocketWaiter

_ACTIVE: Final = pq.TransactionStatus.ACTIVE
_IDLE: Final = int(pq.TransactionStatus.IDLE)  # plain: compared for every loan
_GOOD: Final = (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK)
_CHECK_SETTLES: Final = 1.0
"""Seconds that the answer to a check is waited for after nobody wants to know any more."""


def set_characteristics(
    conn: Connection[Any],
    isolation_level: psycopg.IsolationLevel | None,
    read_only: bool | None,  # noqa: FBT001 - three of a kind
    deferrable: bool | None,  # noqa: FBT001
) -> None:
    """Say how the next transactions are to be begun; None for the server's default."""
    conn._isolation_level = isolation_level
    conn._read_only = read_only
    conn._deferrable = deferrable
    conn._begin_statement = b""


_settings_of: Final = attrgetter(
    "_autocommit",
    "row_factory",
    "_isolation_level",
    "_read_only",
    "_deferrable",
    "cursor_factory",
    "server_cursor_factory",
    "_pipeline",
    "_prepared",
    "_tpc",
)


@final
class PooledConnection:
    """A connection of a pool, and how it is to be when nobody has it.

    Args:
        conn: The connection; nothing has been run on it yet.
    """

    __slots__ = (
        "_baseline",
        "_lock",
        "_noted",
        "_notice_handlers",
        "_notify_handlers",
        "_pgconn",
        "_poll",
        "_preparing",
        "conn",
        "interruption",
    )

    def __init__(self, conn: Connection[Any]) -> None:
        self.conn: Final = conn
        self.interruption: BaseException | None = None
        """A native cancellation that came while it was made as it is to be."""
        self._pgconn = conn.pgconn
        self._lock = conn._lock
        self._noted = note_statements(conn)
        self.keep_as_is()
        poller = select.poll()
        poller.register(conn.pgconn.socket, select.POLLIN)
        self._poll = poller.poll

    @property
    def pools_transactions(self) -> bool:
        """Whether each transaction may have another session of the server's."""
        return self.conn.behind_pooler and not is_session_pooled(self.conn)

    @property
    def is_busy(self) -> bool:
        """Whether an operation is on it."""
        conn = self.conn
        return conn._lock.locked() or conn.pgconn.transaction_status == _ACTIVE

    def keep_as_is(self) -> None:
        """Take what it is like now for what it is to be."""
        conn, noted = self.conn, self._noted
        self._baseline = _settings_of(conn)
        self._preparing = (noted.prepare_threshold, noted.prepared_max)
        self._notice_handlers = list(conn._notice_handlers)
        self._notify_handlers = list(conn._notify_handlers)
        noted.forget()

    def is_untouched(self) -> bool:
        """Tell whether it is idle, and as it is to be; asks nobody."""
        conn, noted = self.conn, self._noted
        after_commit = conn._after_commit
        return (
            self._pgconn.transaction_status == _IDLE  # which it is only if it lives
            and not noted.traces
            and not noted.is_blind
            and not self._lock.is_taken
            and not after_commit.callbacks
            and not after_commit.given_before
            and _settings_of(conn) == self._baseline
            and (noted.prepare_threshold, noted.prepared_max) == self._preparing
            and conn._notice_handlers == self._notice_handlers
            and conn._notify_handlers == self._notify_handlers
        )

    def is_at_rest(self) -> bool:
        """Tell whether nobody uses it: not even a task that has kept it after its block."""
        return self._pgconn.transaction_status == _IDLE and not self._lock.is_taken

    def is_quiet(self) -> bool:
        """Tell whether nothing has come while it was idle; asks nobody."""
        return not self._poll(0)

    def is_alive(self) -> bool:
        """Tell whether it lives as far as is known here; asks nobody.

        What the server has said unasked is read, so there must be no operation on it.
        """
        conn = self.conn
        while conn.state is ConnectionState.OPEN and self._poll(0):
            take_news(conn)
            if conn._last_words is not None:
                conn._fail(conn._last_words)
        return conn._state is ConnectionState.OPEN

    async def answers(self, limit: float) -> bool:
        """Ask the server for a sign of life, for ``limit`` seconds; without it, it has failed.

        Cancellation:
            A checkpoint. A question that is under way is waited for a second longer; the
            connection is then as usable as before, or has failed.
        """
        settle_timeout = min(limit / 2, _CHECK_SETTLES)
        question = Statement(self.conn, "SELECT 1", settle_timeout=settle_timeout)
        with anyio.move_on_after(limit - settle_timeout):
            try:
                await question.run_to_end()
            except psycopg.Error:
                self.discard()
        return self.conn.state is ConnectionState.OPEN

    async def roll_back(self) -> bool:
        """End a transaction that is open; return whether the connection is usable.

        Cancellation:
            What is cancelled has failed at once: to be shielded, with a deadline. A native
            cancellation, which gets through a shield, is kept in ``interruption``.
        """
        return await self._run(self.conn._rollback_gen)

    async def restore(self) -> Trace | None:
        """Make it as it is to be.

        Returns:
            The traces that were wiped; None if it can't be made so.

        Cancellation:
            As `roll_back`.
        """
        conn = self.conn
        traces = self._noted.sum_up()
        if conn._num_transactions or conn._pipeline is not None or not await self.roll_back():
            return None
        if self.pools_transactions:
            traces = Trace.NONE  # they are in another's session by now
        elif traces:
            text = _reset_statement(traces, is_pooled=conn.behind_pooler)
            if text is None or not await self._run(partial(self._reset_gen, text)):
                return None
        self._noted.forget()
        conn._after_commit.drop()
        if conn._notifies_backlog:
            conn._notifies_backlog.clear()
        self._set_back()
        return traces

    def discard(self) -> None:
        """Close it now, without waiting; for one on which nothing runs."""
        if self.conn.state is ConnectionState.OPEN:
            self.conn._discard()

    async def aclose(self) -> None:
        """Close it; what runs on it is cancelled first.

        Cancellation:
            Shielded, and bounded by the connection's ``close_timeout``.
        """
        await self.conn.aclose()

    # ------------------------------------------------------------ inside

    def _set_back(self) -> None:
        conn = self.conn
        (
            conn._autocommit,
            conn.row_factory,
            conn._isolation_level,
            conn._read_only,
            conn._deferrable,
            conn.cursor_factory,
            conn.server_cursor_factory,
            conn._pipeline,
            conn._prepared,
            conn._tpc,
        ) = self._baseline
        self._noted.prepare_threshold, self._noted.prepared_max = self._preparing
        conn._begin_statement = b""
        conn._notice_handlers[:] = self._notice_handlers
        conn._notify_handlers[:] = self._notify_handlers

    async def _run(self, start: Callable[[], PQGen[None]]) -> bool:
        """Run a generator that nothing may interrupt; return whether it has ended well."""
        conn = self.conn
        work = Work(start())
        try:
            async with conn._lock:
                waiter = conn._waiter or conn._attach()
                while not work.is_done:
                    await self._advance(work, waiter)
                if work.error is not None:
                    conn._take_note(work.error)
        except (psycopg.Error, anyio.ClosedResourceError):
            return False
        return work.succeeded and conn.state is ConnectionState.OPEN

    async def _advance(self, work: Work[None], waiter: SocketWaiter) -> None:
        try:
            await work.advance(waiter)
        except anyio.get_cancelled_exc_class() as exc:
            if anyio.current_effective_deadline() != -math.inf:
                self.interruption = exc  # native: it gets through a shield
                return  # noqa: ASYNC104 - raised by the pool
            self.conn._fail(ConnectionTimeout("it could not be made as it was in time"))
            work.abandon()
            raise

    def _reset_gen(self, text: bytes) -> PQGen[None]:
        pgconn = self.conn.pgconn
        pgconn.send_query(text)
        results = yield from generators.execute(pgconn)
        for result in results:
            if result.status not in _GOOD:
                raise errors.error_from_result(result, encoding=pgconn._encoding)


def _reset_statement(traces: Trace, *, is_pooled: bool) -> bytes | None:
    """Return what undoes ``traces``; None where a new connection has to take its place."""
    if Trace.PREPARED in traces or (is_pooled and Trace.TEMPORARY in traces):
        return None
    parts = [b"SELECT pg_advisory_unlock_all()", b"CLOSE ALL", b"UNLISTEN *"]
    if Trace.SETTINGS in traces:
        parts += [b"SET SESSION AUTHORIZATION DEFAULT", b"RESET ALL"]
    if Trace.TEMPORARY in traces:
        parts.append(b"DISCARD TEMP")
    return b"; ".join(parts)

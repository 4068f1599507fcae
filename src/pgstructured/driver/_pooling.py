# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# A pool has to know whether a connection is as it was, and that is written inside of it.
"""What a pool has to know of its connections; for this library's rooms only.

A connection that comes back is to be as it was when it was new. What psycopg keeps in
Python is compared, which costs no round trip. What the session keeps on the server can't
be looked at without one, so the text of each statement is: one that sets, listens, locks,
or makes a temporary table is a *trace*, and only a connection with traces is reset. What
happens inside of functions leaves none, but for ``DO`` and ``CALL``, which are one.
"""

from __future__ import annotations

import re
import select
from enum import IntFlag
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, final

import anyio
import psycopg
from psycopg import errors, generators, pq
from psycopg._preparing import PrepareManager

from ._driving import Work
from ._lending import Statement, is_session_pooled
from ._lifecycle import ConnectionState
from ._watching import take_news

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg._preparing import Key, Prepare
    from psycopg._queries import PostgresQuery
    from psycopg.abc import PQGen

    from ._connection import Connection

_ACTIVE: Final = pq.TransactionStatus.ACTIVE
_OK: Final = pq.ConnStatus.OK
_IDLE: Final = pq.TransactionStatus.IDLE
_GOOD: Final = (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK)
_CHECK_SETTLES: Final = 1.0
"""Seconds that the answer to a check is waited for after nobody wants to know any more."""


class Trace(IntFlag):
    """What a statement may have left in the session."""

    NONE = 0
    SESSION = 1
    """Advisory locks, LISTEN, cursors WITH HOLD."""
    SETTINGS = 2
    """SET and its like."""
    TEMPORARY = 4
    """Temporary tables."""
    PREPARED = 8
    """PREPARE, which can't be undone without psycopg's own statements."""


_BEGINS: Final = rb"(?:^|;|\*/|--[^\n]*\n)\s*"
_SIGNS: Final = tuple(
    (re.compile(pattern, re.IGNORECASE), trace)
    for pattern, trace in (
        (rb"pg_(?:try_)?advisory_lock|\bwith\s+hold\b", Trace.SESSION),
        (_BEGINS + rb"listen\s", Trace.SESSION),
        (_BEGINS + rb"set\s+(?!local\s|transaction\s|constraints\s)", Trace.SETTINGS),
        (_BEGINS + rb"reset\s|\bset_config\s*\(", Trace.SETTINGS),
        (rb"\b(?:create|into)\s+(?:local\s+|global\s+)?temp|\bpg_temp", Trace.TEMPORARY),
        (_BEGINS + rb"prepare\s+(?!transaction\s)", Trace.PREPARED),
        (_BEGINS + rb"(?:do|call)\s", Trace.SESSION | Trace.SETTINGS | Trace.TEMPORARY),
    )
)
_LOOKED_AT: Final = 16_384
"""Bytes at the beginning of a statement; what is longer carries data."""
_REMEMBERED: Final = 1024
_REMEMBERED_BYTES: Final = 2048
"""Statements that are longer are looked at each time."""

_traces_of: Final[dict[bytes, Trace]] = {}


def find_traces(text: bytes) -> Trace:
    """Return what the statement ``text`` may leave in its session."""
    found = _traces_of.get(text)
    if found is None:
        found = Trace.NONE
        for sign, trace in _SIGNS:
            if sign.search(text, 0, _LOOKED_AT):
                found |= trace
        if len(text) <= _REMEMBERED_BYTES:
            if len(_traces_of) >= _REMEMBERED:
                _traces_of.clear()
            _traces_of[text] = found
    return found


class _NotingPrepareManager(PrepareManager):
    """psycopg's, which sees every statement that a cursor runs."""

    def __init__(self) -> None:
        super().__init__()
        self.traces = Trace.NONE

    def maybe_add_to_cache(self, query: PostgresQuery, prep: Prepare, name: bytes) -> Key | None:
        text = query.query
        traces = _traces_of.get(text)
        if traces is None:
            traces = find_traces(text)
        if traces:
            self.traces |= traces
        return super().maybe_add_to_cache(query, prep, name)


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
        "_handlers",
        "_lock",
        "_noted",
        "_pgconn",
        "_poll",
        "_preparing",
        "conn",
    )

    def __init__(self, conn: Connection[Any]) -> None:
        self.conn: Final = conn
        self._pgconn = conn.pgconn
        self._lock = conn._lock
        self._noted = _NotingPrepareManager()
        self._noted.prepare_threshold = conn.prepare_threshold
        conn._prepared = self._noted
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
        self._handlers = (len(conn._notice_handlers), len(conn._notify_handlers))
        noted.traces = Trace.NONE

    def is_untouched(self) -> bool:
        """Tell whether it is idle, and as it is to be; asks nobody."""
        conn, noted = self.conn, self._noted
        return (
            self._pgconn.transaction_status == _IDLE  # which it is only if it lives
            and not noted.traces
            and not self._lock.locked()
            and _settings_of(conn) == self._baseline
            and (noted.prepare_threshold, noted.prepared_max) == self._preparing
            and (len(conn._notice_handlers), len(conn._notify_handlers)) == self._handlers
        )

    def is_quiet(self) -> bool:
        """Tell whether nothing has happened to it while it was idle; asks nobody."""
        return self._pgconn.status == _OK and not self._poll(0)

    def is_alive(self) -> bool:
        """Tell whether it lives as far as is known here; asks nobody.

        What the server has said unasked is read; only an idle connection may be asked about.
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
        question = Statement(self.conn, "SELECT 1", settle_timeout=min(limit, _CHECK_SETTLES))
        with anyio.move_on_after(limit):
            try:
                await question.run_to_end()
            except psycopg.Error:
                self.discard()
        return self.conn.state is ConnectionState.OPEN

    async def roll_back(self) -> bool:
        """End a transaction that is open; return whether the connection is usable.

        Cancellation:
            What is cancelled has failed at once: to be shielded, with a deadline.
        """
        return await self._run(self.conn._rollback_gen)

    async def restore(self) -> Trace | None:
        """Make it as it is to be.

        Returns:
            The traces that there were; None if it can't be made so.

        Cancellation:
            As `roll_back`.
        """
        conn = self.conn
        traces = self._noted.traces
        if conn._num_transactions or conn._pipeline is not None or not await self.roll_back():
            return None
        if traces and not self.pools_transactions:
            text = _reset_statement(traces, is_pooled=conn.behind_pooler)
            if text is None or not await self._run(partial(self._reset_gen, text)):
                return None
        self._noted.traces = Trace.NONE
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
        del conn._notice_handlers[self._handlers[0] :]
        del conn._notify_handlers[self._handlers[1] :]

    async def _run(self, start: Callable[[], PQGen[None]]) -> bool:
        """Run a generator that nothing may interrupt; return whether it has ended well."""
        conn = self.conn
        limit, conn._cancel_timeout = conn._cancel_timeout, 0.0
        try:
            async with conn._lock:
                await conn._finish(Work(start()))
        except psycopg.Error:
            return False
        finally:
            conn._cancel_timeout = limit
        return conn.state is ConnectionState.OPEN

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

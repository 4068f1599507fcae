# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# What is lent here are the insides of a connection.
"""What locks need of a connection that is the user's own; for this library's rooms only."""

from __future__ import annotations

from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final, TypeAlias, final
from weakref import WeakSet

import psycopg
from psycopg import errors, generators, pq
from psycopg.conninfo import make_conninfo

from ._driving import Work
from ._lifecycle import last_words

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from psycopg.abc import PQGen

    from ._connection import Connection

TextRow: TypeAlias = tuple[str | None, ...]

_GOOD: Final = (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK)

_session_pooled: Final[WeakSet[Connection[Any]]] = WeakSet()


def declare_session_pooled(conn: Connection[Any]) -> None:
    """Take note that the user has declared a session pooler in front of ``conn``."""
    _session_pooled.add(conn)


def is_session_pooled(conn: Connection[Any]) -> bool:
    """Tell whether another backend than the announced one answers for good on ``conn``."""
    return conn in _session_pooled


def conninfo_of(conn: Connection[Any]) -> str:
    """Return what connects to where ``conn`` is connected, its password included."""
    params = {
        option.keyword.decode(): option.val.decode()
        for option in conn.pgconn.info
        if option.val is not None and option.keyword != b"application_name"
    }
    return make_conninfo("", **params)


@asynccontextmanager
async def hold_turn(conn: Connection[Any]) -> AsyncGenerator[None]:
    """Keep other operations off ``conn`` for the length of a block of `Statement`.

    Cancellation:
        Entering is a checkpoint.
    """
    async with conn._lock:
        yield


@final
class Statement:
    """One bare statement on a user's connection.

    It passes by everything that the user may have set there: row and cursor factories,
    adapters, and the transaction that psycopg would begin without autocommit.

    Args:
        conn: The connection.
        text: SQL that gives one result.
        settle_timeout: Seconds in which it is to settle where it is cancelled, if the
            connection's ``cancel_timeout`` isn't shorter; after that the connection has
            failed. At once, for 0.
        in_turn: It runs in a block of `hold_turn`.
    """

    def __init__(
        self, conn: Connection[Any], text: str, *, settle_timeout: float, in_turn: bool = False
    ) -> None:
        self._conn = conn
        self._in_turn = in_turn
        self._text = text
        self._settle_timeout = settle_timeout
        self.rows: list[TextRow] | None = None
        """What it gave, every value as the server's text; None before it has ended well."""
        self.was_sent: bool = False
        """Whether the server may have got it."""

    async def run(self) -> list[TextRow]:
        """Run it, when it is its turn on the connection.

        Returns:
            Its rows.

        Raises:
            psycopg.Error: what the server says, or why the connection can't be used.

        Cancellation:
            A checkpoint. A cancelled statement is cancelled on the server too, and its
            outcome is not known.
        """
        return await self._run(to_end=False)

    async def run_to_end(self) -> list[TextRow]:
        """Run it, and once it has begun don't let a cancellation end it.

        As `run`, but:

        Cancellation:
            Checked before it begins. Later it is waited for, for ``settle_timeout`` at most;
            then ``rows`` tells, or the connection has failed.
        """
        return await self._run(to_end=True)

    async def _run(self, *, to_end: bool) -> list[TextRow]:
        conn = self._conn
        async with nullcontext() if self._in_turn else conn._lock:
            limit = conn._cancel_timeout
            # Not before it is our turn: nobody else's operation is to be bound by this.
            conn._cancel_timeout = min(limit, self._settle_timeout)
            try:
                if to_end:
                    await conn._finish(Work(self._generate()))
                else:
                    await conn.wait(self._generate())
            finally:
                conn._cancel_timeout = limit
        return self.rows or []

    def _generate(self) -> PQGen[None]:
        pgconn = self._conn.pgconn
        self._conn._check_connection_ok()
        if pgconn.pipeline_status:
            raise psycopg.ProgrammingError("locks can't be taken or released in a pipeline block")
        self.was_sent = True
        pgconn.send_query(self._text.encode())
        result, *more = yield from generators.execute(pgconn)
        if more:
            # A pooler's farewell to a session that was killed has come before the answer.
            if (words := last_words(result, pgconn._encoding)) is not None:
                raise words
            raise psycopg.InternalError(
                f"received {1 + len(more)} results from command {self._text!r}"
            )
        if result.status not in _GOOD:
            raise errors.error_from_result(result, encoding=pgconn._encoding)
        self.rows = [
            tuple(_text(result.get_value(row, column)) for column in range(result.nfields))
            for row in range(result.ntuples)
        ]


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "surrogateescape")

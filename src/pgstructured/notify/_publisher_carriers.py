"""What carries a publisher's batches to the server: a session, a connection, a pool.

A carrier runs the delivery as long as it has something to send on, and says which
errors another attempt may heal. It doesn't know what a batch is for, and the delivery
doesn't know where it goes.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, final

import anyio
import psycopg

from pgstructured._util import open_background
from pgstructured.driver import (
    Connection,
    ConnectionState,
    Statement,
    hold_turn,
    open_session,
    resolve_conninfo,
)
from pgstructured.errors import (
    ConnectionLostError,
    PoolTimeoutError,
    TooManyWaitingError,
)
from pgstructured.pool import Pool
from pgstructured.supervise import heals

from ._options import find_target
from ._publisher_statement import MAKE_ROOM, NOTIFY_FOR_SESSION

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from pgstructured.driver import Conninfo, Session

    from ._publisher_statement import Batch

    Send = Callable[[Batch], Awaitable[None]]
    Deliver = Callable[[Send], Coroutine[Any, Any, None]]

_NAME: Final = "pgstructured/publisher"
_CONNECT_TIMEOUT: Final = 10.0
_HEARTBEAT: Final = 10.0
_HEARTBEAT_TIMEOUT: Final = 5.0
_SETTLE_TIMEOUT: Final = 1.0
_PAUSE: Final = 0.02
# Data, syntax and access rules: the same statement will be refused again.
_REFUSALS: Final = ("22", "42")


class Carrier(Protocol):
    """See the module's text."""

    async def carry(self, deliver: Deliver, live: Callable[[], object]) -> None:
        """Run ``deliver`` with a way to send, for as long as there is one.

        Args:
            deliver: Sends one batch after the other.
            live: Called as soon as there is a way to send.

        Raises:
            Exception: why there is none any more.

        Cancellation:
            A checkpoint; leaves nothing of its own behind.
        """
        ...

    def heals(self, error: BaseException) -> bool:
        """Tell whether another attempt may succeed."""
        ...


async def find_carrier(source: Conninfo | Connection[Any] | Pool) -> Carrier:
    """Return what carries batches to ``source``.

    Raises:
        ConninfoError: if it is a connection string that can't be understood.
    """
    if isinstance(source, Connection):
        return ConnectionCarrier(source)  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(source, Pool):
        return PoolCarrier(source)
    given: object = source
    if isinstance(source, str):
        find_target(await resolve_conninfo(source))  # a mistake here does not heal
    elif not callable(given):
        raise TypeError(
            f"a publisher takes a conninfo, a Connection or a Pool, not {type(given).__name__}"
        )
    return SessionCarrier(source)


def may_heal(error: BaseException) -> bool:
    """Tell whether the server may take the same batch another time."""
    sqlstate = error.sqlstate if isinstance(error, psycopg.Error) else None
    return heals(error) and not (sqlstate or "").startswith(_REFUSALS)


# ---------------------------------------------------------------- sessions


@final
class SessionCarrier:
    """A session of the publisher's own; each attempt makes a new one."""

    def __init__(self, conninfo: Conninfo) -> None:
        self._conninfo = conninfo
        self._conninfo_error: Exception | None = None

    async def carry(self, deliver: Deliver, live: Callable[[], object]) -> None:
        deadline = anyio.current_time() + _CONNECT_TIMEOUT
        conninfo = await self._resolve(deadline)
        async with open_session(
            conninfo,
            application_name=_NAME,
            connect_timeout=deadline - anyio.current_time(),
            heartbeat=_HEARTBEAT,
            heartbeat_timeout=_HEARTBEAT_TIMEOUT,
            close_timeout=0.0,  # a batch in flight needs no ending
            **find_target(conninfo),
        ) as session:
            live()
            try:
                async with open_background() as tasks:
                    tasks.start_soon(deliver, partial(_send_on_session, session))
                    await session.wait_closed()
            except ConnectionLostError:
                pass  # the session's own failure says more
        raise session.failure or psycopg.OperationalError("the session has ended")

    def heals(self, error: BaseException) -> bool:
        """Tell whether another session may do better."""
        return error is self._conninfo_error or may_heal(error)

    async def _resolve(self, deadline: float) -> str:
        try:
            with anyio.CancelScope(deadline=deadline):
                return await resolve_conninfo(self._conninfo)
            raise psycopg.errors.ConnectionTimeout("connection timeout expired in conninfo()")
        except Exception as exc:
            self._conninfo_error = exc
            raise


async def _send_on_session(session: Session, batch: Batch) -> None:
    arrays = [array.encode() for array in batch.arrays()]
    try:
        if session.behind_pooler:  # another backend each time, which has prepared nothing
            await session.execute(NOTIFY_FOR_SESSION.text.decode(), arrays)
            return
        command = session.send_prepared(NOTIFY_FOR_SESSION, arrays)
        await command.wait()
        command.result()
    except psycopg.errors.ProgramLimitExceeded:
        # For the next attempt; cancelled, there is none.
        await session.execute(MAKE_ROOM)  # noqa: ASYNC120 - see above
        raise


# ---------------------------------------------------------------- connections


@final
class ConnectionCarrier:
    """The user's own connection, whenever it is in no transaction; there is only this one."""

    def __init__(self, conn: Connection[Any]) -> None:
        self._conn = conn

    async def carry(self, deliver: Deliver, live: Callable[[], object]) -> None:
        live()
        await deliver(partial(_send_between_transactions, self._conn))

    def heals(self, error: BaseException) -> bool:
        """Tell whether the connection is still there to try again."""
        return self._conn.state is ConnectionState.OPEN and may_heal(error)


@final
class PoolCarrier:
    """A pool's connections, one for each batch."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def carry(self, deliver: Deliver, live: Callable[[], object]) -> None:
        live()
        await deliver(self._send)

    def heals(self, error: BaseException) -> bool:
        """Tell whether another connection may do better."""
        return isinstance(error, (PoolTimeoutError, TooManyWaitingError)) or may_heal(error)

    async def _send(self, batch: Batch) -> None:
        async with self._pool.acquire() as conn:
            await _send_between_transactions(conn, batch)


async def _send_between_transactions(conn: Connection[Any], batch: Batch) -> None:
    """Send when ``conn`` is idle: in a transaction a rollback would take the batch with it."""
    is_open = conn.state is ConnectionState.OPEN  # else the statement says why it isn't
    encoding = conn.info.parameter_status("server_encoding") if is_open else None
    text = batch.statement(as_bytes=encoding == "SQL_ASCII")
    while True:
        try:
            async with hold_turn(conn):
                # A connection that is lost has no status; then the statement says why.
                is_free = conn.info.transaction_status.name in {"IDLE", "UNKNOWN"}
                if is_free and not conn.pgconn.pipeline_status:
                    await _run(conn, text)
                    return
        except anyio.BusyResourceError:
            pass  # a stream or a COPY has it
        await anyio.sleep(_PAUSE)


async def _run(conn: Connection[Any], text: str) -> None:
    try:
        await Statement(conn, text, settle_timeout=_SETTLE_TIMEOUT, in_turn=True).run()
    except psycopg.errors.ProgramLimitExceeded:
        # As on a session.
        room = Statement(conn, MAKE_ROOM, settle_timeout=_SETTLE_TIMEOUT, in_turn=True)
        await room.run()  # noqa: ASYNC120 - ditto
        raise

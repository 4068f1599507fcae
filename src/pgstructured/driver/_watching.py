# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# The watcher is a part of the connection, and looks after its state.
"""Watching a connection while no operation is in flight.

A connection at rest reads nothing, so it would learn only from its next query that
its session was killed. The watcher waits for the socket in the meantime, gives way
to every operation, and takes what the server says unasked: notifications, notices,
changed settings, the end.

A network that is gone says nothing at all. The heartbeat asks, with an empty query
after some silent seconds, and where nothing comes back closes the socket.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, cast
from weakref import WeakKeyDictionary

import anyio
import psycopg
from psycopg import errors, generators, pq

from pgstructured.observe import emit

from ._driving import Work
from ._lifecycle import ConnectionState
from ._waiting import READ, poll_now

if TYPE_CHECKING:
    from ._connection import Connection
    from ._waiting import SocketWaiter

_IDLE_STATES: Final = (
    pq.TransactionStatus.IDLE,
    pq.TransactionStatus.INTRANS,
    pq.TransactionStatus.INERROR,
)
_PAUSE: Final = 0.002
"""Seconds between an operation and watching again, so that a row of them is not slowed down."""
_LONGEST_PAUSE: Final = 0.1
"""Seconds between looks whether a pipeline, which may be open for long, has ended."""

_watched: Final[WeakKeyDictionary[Connection[Any], anyio.Event]] = WeakKeyDictionary()
"""The connections that somebody watches, with what is set when that ends."""


async def watch(conn: Connection[Any], heartbeat: float | None, heartbeat_timeout: float) -> None:
    """Watch ``conn`` until it is closed or has failed.

    Args:
        conn: The connection.
        heartbeat: Silent seconds after which the server is asked for a sign of life.
        heartbeat_timeout: Seconds that it has for it.

    Cancellation:
        A checkpoint. A cancelled call leaves a heartbeat in flight; closing ends it.
    """
    ended = _watched[conn] = anyio.Event()
    try:
        await _watch(conn, heartbeat, heartbeat_timeout)
    finally:
        del _watched[conn]
        ended.set()


async def keep_watched(conn: Connection[Any]) -> None:
    """See to it that ``conn`` is watched, without a heartbeat if nobody else does.

    Args:
        conn: The connection; an operation has been run on it.

    Cancellation:
        A checkpoint. Nothing is left behind.
    """
    while (ended := _watched.get(conn)) is not None:
        await ended.wait()
    await watch(conn, None, 0.0)


async def _watch(conn: Connection[Any], heartbeat: float | None, heartbeat_timeout: float) -> None:
    if heartbeat is not None:
        conn._lock.clock = anyio.current_time
    if conn._waiter is None and conn.state is ConnectionState.OPEN:
        conn._attach()  # no operation has been run on it yet
    heard_at = anyio.current_time()
    while (waiter := conn._waiter) is not None:
        await _wait_until_idle(conn)
        remaining = None
        if heartbeat is not None:
            remaining = max(heard_at, conn._lock.left_at) + heartbeat - anyio.current_time()
        is_readable = False
        try:
            with anyio.move_on_after(remaining) as silence:
                is_readable = await waiter.wait_idle()
        except anyio.ClosedResourceError:
            return
        if _is_busy(conn):
            continue
        if is_readable:
            take_news(conn)
            heard_at = anyio.current_time()
        elif silence.cancelled_caught and _is_silent(conn, heard_at, heartbeat):
            await _beat(conn, heartbeat_timeout)
            heard_at = anyio.current_time()


def _is_busy(conn: Connection[Any]) -> bool:
    return (
        conn._lock.locked()
        or conn._pipeline is not None
        or conn.pgconn.transaction_status not in _IDLE_STATES
    )


async def _wait_until_idle(conn: Connection[Any]) -> None:
    pause = _PAUSE
    while conn._waiter is not None and _is_busy(conn):
        await conn._lock.wait_free()
        await anyio.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE)


def _is_silent(conn: Connection[Any], heard_at: float, heartbeat: float | None) -> bool:
    latest = max(heard_at, conn._lock.left_at)
    return heartbeat is not None and anyio.current_time() - latest >= heartbeat


def take_news(conn: Connection[Any]) -> None:
    """Read what has come unasked; the end of the session is one such thing."""
    pgconn = conn.pgconn
    try:
        pgconn.consume_input()
        # Asking for notifications is what makes libpq look at what it has read.
        while (notification := pgconn.notifies()) is not None:
            cast("Any", pgconn.notify_handler)(notification)
    except psycopg.Error as exc:
        conn._fail(exc)


async def _beat(conn: Connection[Any], limit: float) -> None:
    """Ask for a sign of life; no answer is the end of the connection."""
    conn._lock.try_acquire()  # free, as `_is_busy` has just said
    waiter = cast("SocketWaiter", conn._waiter)
    work = Work(generators.execute(conn.pgconn))
    began = perf_counter()  # finer than some event loops' clocks
    try:
        conn.pgconn.send_query(b"")
        with anyio.move_on_after(limit):
            await work.advance(waiter)
        if not work.is_done and poll_now(waiter.fd, READ):  # pragma: no cover - trio, at times
            # The event loop was late, not the server: its answer is here, unread.
            with anyio.move_on_after(limit):
                await work.advance(waiter)
        if not work.is_done:
            conn._fail(errors.ConnectionTimeout(f"no answer to a heartbeat within {limit:.3g} s"))
            work.abandon()
        elif work.error is not None:
            raise work.error
        else:
            emit("driver.heartbeat", backend_pid=conn._backend_pid, took=perf_counter() - began)
    except (psycopg.Error, anyio.ClosedResourceError) as exc:
        conn._fail(exc)
    finally:
        conn._lock.hand_over()

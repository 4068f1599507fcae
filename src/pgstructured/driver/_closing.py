"""Closing a connection so that nothing runs on at the server."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

import anyio
import psycopg
from psycopg import pq

from ._driving import discard_pipeline, discard_results, drive
from ._settling import request_cancel

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn

    from ._locking import OperationLock
    from ._waiting import SocketWaiter

_ACTIVE: Final = pq.TransactionStatus.ACTIVE
_FIRST_PAUSE: Final = 0.05


async def close_politely(
    pgconn: PGconn, waiter: SocketWaiter, lock: OperationLock, *, limit: float
) -> None:
    """Cancel the statement that is running and wait for its end; the caller closes the socket.

    A server that only loses its client goes on with the statement until it has something
    to say.

    Cancellation:
        Shielded, at most ``limit`` seconds.
    """
    pause = _FIRST_PAUSE
    with anyio.move_on_after(limit, shield=True):
        while pgconn.transaction_status == _ACTIVE:
            # A request that overtakes its statement is lost, so it is repeated.
            with suppress(psycopg.Error, OSError):
                await request_cancel(pgconn)
            with anyio.move_on_after(pause):
                await _see_it_end(pgconn, waiter, lock)
            pause *= 2


async def _see_it_end(pgconn: PGconn, waiter: SocketWaiter, lock: OperationLock) -> None:
    discard = discard_pipeline if pgconn.pipeline_status else discard_results
    try:
        with suppress(psycopg.Error):  # the connection has ended
            await drive(waiter, discard(pgconn))
    except anyio.BusyResourceError:
        await lock.wait_free()  # the operation's own task reads the end of it

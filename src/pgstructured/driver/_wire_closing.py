"""Closing a wire that may still be at work: a closed socket alone ends nothing on the server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import psycopg

from ._lifecycle import ConnectionState
from ._settling import request_cancel

if TYPE_CHECKING:
    from ._wire import Wire


async def close(wire: Wire, close_timeout: float) -> None:
    """Close a wire; what still runs on the server is cancelled first, if there is time for that.

    Idempotent, and without effect on one that has failed.

    Cancellation:
        Shielded: takes up to ``close_timeout`` seconds even in a cancelled scope.
    """
    if wire.state is ConnectionState.OPEN:
        wire.begin_closing()
        try:
            if wire.commands and close_timeout > 0:
                with anyio.move_on_after(close_timeout, shield=True):
                    await _settle_commands(wire)
        finally:
            wire.end(ConnectionState.CLOSED)
    await anyio.lowlevel.checkpoint()


async def _settle_commands(wire: Wire) -> None:
    pause = 0.05
    while wire.commands and wire.state is ConnectionState.CLOSING:
        try:
            await request_cancel(wire.pgconn)
        except psycopg.Error as exc:
            wire.fail(exc)
            return
        # A request that overtakes its statement is lost, so it is repeated.
        with anyio.move_on_after(pause):
            await wire.settled.wait()
        pause = min(pause * 2, 1.0)

"""Asking a server session for signs of life, where it gives none by itself."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

import anyio
import psycopg

from pgstructured.errors import ConnectionLostError
from pgstructured.observe import emit

from ._lifecycle import ConnectionState

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._wire import Wire


async def beat(
    wire: Wire, interval: float, patience: Callable[[], float], ask: Callable[[], str]
) -> None:
    """Ask for a sign of life when no answer was one for ``interval`` seconds, until the end.

    Args:
        wire: The session.
        interval: Seconds of silence.
        patience: Returns the seconds in which something has to arrive then; else the session
            has failed.
        ask: Returns what to ask with.

    Cancellation:
        A checkpoint; the session stays as it is.
    """
    while wire.state is ConnectionState.OPEN:
        # A lease runs from what was confirmed; notifications, however many, confirm nothing.
        silent = wire.now() - min(wire.last_received_at, wire.last_confirmed)
        if silent < interval:
            await anyio.sleep(interval - silent)
        elif any(command.may_block for command in wire.commands):
            await anyio.sleep(interval)
        else:
            await _beat_once(wire, patience, ask)


async def _beat_once(wire: Wire, patience: Callable[[], float], ask: Callable[[], str]) -> None:
    began = perf_counter()  # finer than some event loops' clocks
    try:
        command = wire.send([(ask(), ())])
    except ConnectionLostError:
        return  # found by sending, and told to everybody who has to do with the session
    while wire.state is ConnectionState.OPEN:
        # Whatever arrives is life: the answer may be queued behind a flood.
        limit = patience()
        left = max(command.sent_at, wire.last_received_at) + limit - wire.now()
        with anyio.move_on_after(max(left, 0.0)):
            await command.wait()
            if command.error is None:  # else the session has ended without an answer
                wire.heartbeat_rtt = perf_counter() - began
                emit("driver.heartbeat", backend_pid=wire.backend_pid, took=wire.heartbeat_rtt)
            return
        if not wire.read_now() and left <= 0:
            wire.fail(
                psycopg.errors.ConnectionTimeout(
                    f"the server fell silent: no answer within {limit:g} s"
                )
            )

"""Turns on a connection that several tasks share.

An operation that is more than one statement is a transaction, and may have settings in force. What
another task's operation ran on the connection meanwhile would be in it, and with these settings:
another tenant's. So operations of stores take turns, whatever table they are for.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Final, final

import anyio

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

    from pgstructured.driver import Connection

_turns: Final[dict[Connection[Any], Turn]] = {}


@final
class Turn:
    """Whose turn it is on one connection."""

    __slots__ = ("_lock", "_streaming", "users")

    def __init__(self) -> None:
        # Without waiting it is no checkpoint: the operation has its own.
        self._lock = anyio.Lock(fast_acquire=True)
        self._streaming: int | None = None
        self.users = 0
        """Who has it, or waits for it."""

    @asynccontextmanager
    async def taken(self) -> AsyncGenerator[None]:
        """Have the turn for a block; wait for it.

        Raises:
            anyio.BusyResourceError: Another task is streaming, which may go on for long.

        Cancellation:
            Entering is a checkpoint where it has to wait.
        """
        self._check()
        async with self._lock:
            self._check()
            yield

    @contextmanager
    def streaming(self) -> Generator[None]:
        """Refuse other tasks for a block; this one may take its turns in it."""
        before = self._streaming
        self._streaming = anyio.get_current_task().id
        try:
            yield
        finally:
            self._streaming = before

    def _check(self) -> None:
        if self._streaming not in {None, anyio.get_current_task().id}:
            raise anyio.BusyResourceError("streaming from")


@contextmanager
def turn_on(conn: Connection[Any]) -> Generator[Turn]:
    """Have what says whose turn it is on a connection for a block."""
    turn = _turns.get(conn)
    if turn is None:
        turn = _turns[conn] = Turn()
    turn.users += 1
    try:
        yield turn
    finally:
        turn.users -= 1
        if not turn.users:
            del _turns[conn]


def is_anyones(conn: Connection[Any]) -> bool:
    """Tell whether it is somebody's turn on a connection."""
    return bool(_turns) and conn in _turns

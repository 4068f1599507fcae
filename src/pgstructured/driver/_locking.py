"""The lock that operations of one connection take in turns.

Not `anyio.Lock`, for four reasons. psycopg's async generators hold it across
their yields, and may be finalised by another task, so it can have no owner. A
pending cancellation must be noticed *before* it is taken and nowhere between
there and the first step of an operation, whose books would go wrong. It must be
cheap. And leaving it is where a connection is made idle that something else
than a cancellation has left busy: a COPY that was not read to its end, a
generator whose callback raised.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, final

import anyio
from anyio.lowlevel import checkpoint_if_cancelled
from psycopg import pq

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from psycopg.pq.abc import PGconn

    from ._occupying import Occupation

_ACTIVE: Final = pq.TransactionStatus.ACTIVE


@final
class OperationLock:
    """First come, first served; see the module's text.

    Args:
        pgconn: The connection whose operations take turns.
        make_idle: Called on leaving if a command is still in flight.
    """

    __slots__ = (
        "_freed",
        "_make_idle",
        "_pgconn",
        "_turns",
        "checkpoint_if_cancelled",
        "clock",
        "is_taken",
        "left_at",
        "occupant",
    )

    def __init__(self, pgconn: PGconn, make_idle: Callable[[], Awaitable[None]]) -> None:
        self._pgconn = pgconn
        self._make_idle = make_idle
        self.is_taken: bool = False
        """Whether an operation holds the lock; as `locked`, and cheaper."""
        self._turns: deque[anyio.Event] = deque()
        self._freed: anyio.Event | None = None
        self.checkpoint_if_cancelled: Callable[[], Awaitable[None]] = checkpoint_if_cancelled
        """AnyIO's, or a faster one of the event loop in use."""
        self.clock: Callable[[], float] | None = None
        """Set to have ``left_at`` kept."""
        self.left_at = 0.0
        """When the lock was last left, by ``clock``."""
        self.occupant: Occupation | None = None
        """The stream or COPY that has the lock: nobody waits for it, but while it ends."""

    def locked(self) -> bool:
        """Tell whether an operation holds the lock."""
        return self.is_taken

    async def acquire(self) -> None:
        """Take the lock once it is this task's turn.

        Raises:
            anyio.BusyResourceError: if a stream or COPY has it: that may be for long, and
                in this very task.

        Cancellation:
            Checked before the lock is taken, never after. A cancelled call has not taken it.
        """
        await self.checkpoint_if_cancelled()
        if not self.is_taken:
            self.is_taken = True
            return
        if self.occupant is not None and not self.occupant.is_over:
            raise anyio.BusyResourceError(self.occupant.action)
        turn = anyio.Event()
        self._turns.append(turn)
        try:
            await turn.wait()
        except BaseException:
            if turn.is_set():  # pragma: no cover - given in the very step of its cancellation
                self.hand_over()
            else:
                self._turns.remove(turn)
            raise

    def try_acquire(self) -> bool:
        """Take the lock if nobody has it."""
        if self.is_taken:
            return False
        self.is_taken = True
        return True

    async def release(self) -> None:
        """Make the connection idle if it is not, and let the next task have the lock.

        Cancellation:
            Not a checkpoint. Making the connection idle is shielded and bounded.
        """
        try:
            if self._pgconn.transaction_status == _ACTIVE and not self._pgconn.pipeline_status:
                await self._make_idle()
        finally:
            self.hand_over()

    async def __aenter__(self) -> None:
        await self.checkpoint_if_cancelled()
        if self.is_taken:
            await self.acquire()
        self.is_taken = True

    async def __aexit__(self, *_: object) -> None:
        if self._pgconn.transaction_status == _ACTIVE:
            await self.release()  # noqa: ASYNC102 - bounded by cancel_timeout inside
        else:
            self.hand_over()

    async def wait_free(self) -> None:
        """Wait until no operation holds the lock; it may be taken again at once.

        Cancellation:
            A checkpoint only if the lock is taken.
        """
        while self.is_taken:
            if self._freed is None:
                self._freed = anyio.Event()
            await self._freed.wait()

    def hand_over(self) -> None:
        """Let the next task have the lock, whatever the connection does."""
        if self.clock is not None:
            self.left_at = self.clock()
        if self._turns:
            self._turns.popleft().set()
            return
        self.is_taken = False
        if self._freed is not None:
            self._freed.set()
            self._freed = None

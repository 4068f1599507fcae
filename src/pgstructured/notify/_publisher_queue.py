"""What was published and is not confirmed yet: a bounded line, left in batches.

A notification goes from one place to the next, in the order in which it was put:

===========  ====================================================  ==================
place        leaves it when                                        counted as
===========  ====================================================  ==================
waiting      there is room, or its publisher is cancelled          nothing
pending      a batch is due: the first of it has waited for        ``max_pending``
             ``interval``, it is full, or somebody flushes
in flight    the server has confirmed it, or refused it for good   ``max_batch``
===========  ====================================================  ==================

What is in flight stays there while the server is away, so that it is sent again first.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, final

import anyio

if TYPE_CHECKING:
    from ._publisher_statement import Item


@final
class PublisherQueue:
    """See the module's text.

    Args:
        interval: Seconds for which the first notification of a batch waits for more.
        max_batch: How many go in one batch.
        max_pending: How many may be pending.
    """

    def __init__(self, *, interval: float, max_batch: int, max_pending: int) -> None:
        self._interval = interval
        self._max_batch = max_batch
        # Where nothing more has room, there is nothing to wait for.
        self._enough = min(max_batch, max_pending)
        self._max_pending = max_pending
        self._turn = anyio.Lock(fast_acquire=True)
        """Held by the first who waits for room; the others stand in line for it."""
        self._room = anyio.Event()
        self._pending: deque[Item] = deque()
        self._since = 0.0
        """When the first of a batch was put."""
        self.in_flight: list[Item] = []
        """What was sent, or is to be sent again, and is not confirmed."""
        self.accepted: int = 0
        """How many were put, in all."""
        self.delivered: int = 0
        """How many the server has confirmed."""
        self.refused: int = 0
        """How many the server has refused for good."""
        self.refusal: BaseException | None = None
        """What it said about the last one."""
        self.failure: BaseException | None = None
        """Why nothing can be delivered any more."""
        self.is_closed: bool = False
        """Whether the owner has left."""
        self._is_over = False
        self._wanted: float = 0
        """How many, of those ever put, are not to wait for more."""
        self._news = anyio.Event()
        self._progress = anyio.Event()

    @property
    def pending(self) -> int:
        """How many are pending."""
        return len(self._pending)

    @property
    def settled(self) -> int:
        """How many are confirmed or refused."""
        return self.delivered + self.refused

    @property
    def tasks_waiting(self) -> int:
        """How many tasks wait for room."""
        return int(self._turn.locked()) + self._turn.statistics().tasks_waiting

    # ------------------------------------------------------------ for publishers

    def check(self) -> None:
        """Raise what a publisher is told when nothing can be published any more."""
        if self.failure is not None:
            raise anyio.BrokenResourceError(
                f"the publisher has ended: {self.failure}"
            ) from self.failure
        if self.is_closed:
            raise anyio.ClosedResourceError

    async def put(self, item: Item) -> None:
        """Put a notification in line as soon as there is room.

        Cancellation:
            A checkpoint. A cancelled call has put nothing.
        """
        self.check()
        await anyio.lowlevel.checkpoint()
        self.check()
        if len(self._pending) < self._max_pending and not self._turn.locked():
            self._append(item)
            return
        async with self._turn:
            self.check()
            while len(self._pending) >= self._max_pending:
                self._room = anyio.Event()
                await self._room.wait()
                self.check()
            self._append(item)

    def put_nowait(self, item: Item) -> None:
        """Put a notification in line.

        Raises:
            anyio.WouldBlock: if there is no room.
        """
        self.check()
        if len(self._pending) >= self._max_pending:
            raise anyio.WouldBlock
        self._append(item)

    def _append(self, item: Item) -> None:
        if not self._pending:
            self._since = anyio.current_time()
            self._news.set()
        self._pending.append(item)
        self.accepted += 1
        if len(self._pending) == self._enough:
            self._news.set()

    async def wait_settled(self, count: int) -> None:
        """Wait until the first ``count`` ever put are settled, or none can be any more."""
        if count > self.settled:
            self._wanted = max(self._wanted, count)
            self._news.set()
        while self.settled < count and not self._is_over:
            await self._progress.wait()

    # ------------------------------------------------------------ for the delivery

    async def fill(self) -> None:
        """Wait until there is a batch in flight; there may be one from before."""
        while not self.in_flight:
            if self._is_due():
                self._take()
                return
            self._news = anyio.Event()
            deadline = self._since + self._interval if self._pending else math.inf
            with anyio.CancelScope(deadline=deadline):
                await self._news.wait()

    def confirm(self, count: int) -> None:
        """Take note that the server has confirmed the first ``count`` in flight."""
        del self.in_flight[:count]
        self.delivered += count
        self._tell()

    def refuse(self, error: BaseException) -> None:
        """Take note that the server will never take the first in flight."""
        del self.in_flight[0]
        self.refused += 1
        self.refusal = error
        self._tell()

    def fail(self, error: BaseException) -> None:
        """Take note that nothing can be delivered any more."""
        self.failure = error
        self.end()

    def close(self) -> None:
        """Take nothing more; what is there doesn't wait for more."""
        self.is_closed = True
        self._wanted = math.inf
        self._news.set()
        self._room.set()  # whoever waits for it is told

    def end(self) -> None:
        """Deliver nothing more."""
        self._is_over = True
        self._tell()
        self._room.set()  # whoever waits for it is told

    def _is_due(self) -> bool:
        if not self._pending:
            return False
        return (
            len(self._pending) >= self._enough
            or self._wanted > self.accepted - len(self._pending)
            or anyio.current_time() >= self._since + self._interval
        )

    def _take(self) -> None:
        pending = self._pending
        if len(pending) <= self._max_batch:
            self.in_flight = list(pending)
            pending.clear()
        else:
            self.in_flight = [pending.popleft() for _ in range(self._max_batch)]
        self._room.set()

    def _tell(self) -> None:
        self._progress.set()
        self._progress = anyio.Event()

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
from typing import TYPE_CHECKING, Final, final

import anyio

from ._publisher_statement import Batch

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
_TURNS: Final = 32
"""How many are put before the others get a turn, where there is room."""


@final
class PublisherQueue:
    """See the module's text.

    Args:
        interval: Seconds for which the first notification of a batch waits for more.
        max_batch: How many go in one batch.
        max_pending: How many may be pending.
    """

    def __init__(self, *, interval: float, max_batch: int, max_pending: int) -> None:
        backend = anyio.lowlevel.current_token().backend_class
        self._checkpoint_if_cancelled: Callable[[], Awaitable[None]]
        self._checkpoint_if_cancelled = backend.checkpoint_if_cancelled
        self._now: Callable[[], float] = backend.current_time
        self._calls = 0
        self._interval = interval
        self._max_batch = max_batch
        # Where nothing more has room, there is nothing to wait for.
        self._enough = min(max_batch, max_pending)
        self._max_pending = max_pending
        self._turn = anyio.Lock(fast_acquire=True)
        """Held by the first who waits for room; the others stand in line for it."""
        self._room = anyio.Event()
        self._pending = Batch()
        self.pending: int = 0
        """How many are pending."""
        self.tasks_waiting: int = 0
        """How many tasks wait for room."""
        self._since = 0.0
        """When the first of a batch was put."""
        self.in_flight: Batch = Batch()
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
        self._nap = anyio.CancelScope()
        self._progress = anyio.Event()

    @property
    def settled(self) -> int:
        """How many are confirmed or refused."""
        return self.delivered + self.refused

    # ------------------------------------------------------------ for publishers

    def check(self) -> None:
        """Raise what a publisher is told when nothing can be published any more."""
        if self.failure is not None:
            raise anyio.BrokenResourceError(
                f"the publisher has ended: {self.failure}"
            ) from self.failure
        if self.is_closed:
            raise anyio.ClosedResourceError("the block of open_publisher was left")

    def checkpoint(self) -> Awaitable[None]:
        """Return what notices a cancellation, always, and lets others run each 32nd time."""
        self._calls += 1
        if self._calls % _TURNS:
            return self._checkpoint_if_cancelled()
        return anyio.lowlevel.checkpoint()

    def offer(self, name: str, payload: str) -> bool:
        """Put a notification in line if there is room; return whether there was."""
        if self.is_closed or self.failure is not None:
            self.check()
        if self.pending >= self._max_pending or self.tasks_waiting:
            return False
        self._append(name, payload)
        return True

    async def put(self, name: str, payload: str) -> None:
        """Put a notification in line as soon as there is room.

        Cancellation:
            A checkpoint where it has to wait. A cancelled call has put nothing.
        """
        self.tasks_waiting += 1
        try:
            async with self._turn:
                self.check()
                while self.pending >= self._max_pending:
                    self._room = anyio.Event()
                    await self._room.wait()
                    self.check()
                self._append(name, payload)
        finally:
            self.tasks_waiting -= 1

    def _append(self, name: str, payload: str) -> None:
        batch = self._pending
        batch.names.append(name)
        batch.payloads.append(payload)
        self.accepted += 1
        self.pending = count = self.pending + 1
        if count == 1:
            self._since = self._now()
            self._news.set()
        if count == self._enough:
            self._hurry()

    async def wait_settled(self, count: int) -> None:
        """Wait until the first ``count`` ever put are settled, or none can be any more."""
        if count > self.settled:
            self._wanted = max(self._wanted, count)
            self._hurry()
        while self.settled < count and not self._is_over:
            await self._progress.wait()

    # ------------------------------------------------------------ for the delivery

    async def fill(self) -> None:
        """Wait until there is a batch in flight; there may be one from before."""
        while not self.in_flight:
            if not self.pending:
                self._news = anyio.Event()
                await self._news.wait()
            elif self._is_due():
                self._take()
            else:
                # Not a deadline, for on most loops to sleep is cheaper than to be cancelled.
                with anyio.CancelScope() as self._nap:
                    await anyio.sleep(max(self._since + self._interval - self._now(), 0.0))

    def confirm(self, count: int) -> None:
        """Take note that the server has confirmed the first ``count`` in flight."""
        self.in_flight.drop(count)
        self.delivered += count
        self._tell()

    def refuse(self, error: BaseException) -> None:
        """Take note that the server will never take the first in flight."""
        self.in_flight.drop(1)
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
        self._hurry()
        self._room.set()  # whoever waits for it is told

    def end(self) -> None:
        """Deliver nothing more."""
        self._is_over = True
        self._tell()
        self._room.set()  # whoever waits for it is told

    def _is_due(self) -> bool:
        return (
            self.pending >= self._enough
            or self._wanted > self.accepted - self.pending
            or self._now() >= self._since + self._interval
        )

    def _take(self) -> None:
        self.in_flight = self._pending.head(self._max_batch)
        self._pending.drop(self._max_batch)
        self.pending = len(self._pending)
        self._room.set()

    def _hurry(self) -> None:
        """Have the batch looked at now: it is full, or somebody flushes."""
        self._nap.cancel()

    def _tell(self) -> None:
        self._progress.set()
        self._progress = anyio.Event()

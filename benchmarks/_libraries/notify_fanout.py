"""What fan-out workloads have in common: parked receivers, counted deliveries."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable


class Deliveries:
    """Counts what all receivers have got, and says when it is all."""

    def __init__(self) -> None:
        self.count = 0
        self.wanted = 0
        self.complete = anyio.Event()

    def expect(self, count: int) -> None:
        """Begin to count anew."""
        self.count, self.wanted, self.complete = 0, count, anyio.Event()

    def note(self, count: int = 1) -> None:
        """Count so many."""
        self.count += count
        if self.count >= self.wanted:
            self.complete.set()


async def receive_each(stream: Any, deliveries: Deliveries) -> None:
    """Receive one by one, for ever."""
    receive = stream.receive
    while True:
        await receive()
        deliveries.count += 1
        if deliveries.count == deliveries.wanted:
            deliveries.complete.set()


async def receive_many(stream: Any, deliveries: Deliveries) -> None:
    """Receive all that is there, for ever."""
    while True:
        deliveries.note(len(await stream.receive_many()))


@asynccontextmanager
async def receivers(
    streams: list[Any], receive: Callable[[Any, Deliveries], Awaitable[None]]
) -> AsyncGenerator[Deliveries]:
    """Yield the count of what a task for each stream receives."""
    deliveries = Deliveries()
    async with anyio.create_task_group() as tasks:
        for stream in streams:
            tasks.start_soon(receive, stream, deliveries)
        await anyio.wait_all_tasks_blocked()
        yield deliveries
        tasks.cancel_scope.cancel()

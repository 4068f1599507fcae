"""asyncpg's `add_listener`, and a queue to a task: where code can await, as under the bus."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from .notify_arrivals import workloads
from .notify_asyncpg import receiving

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from benchmarks._batch import Options


@asynccontextmanager
async def _receiving(options: Options, on_payload: Callable[[str], None]) -> AsyncGenerator[None]:
    queue: asyncio.Queue[str] = asyncio.Queue()

    async def receive() -> None:
        while True:
            on_payload(await queue.get())

    async with receiving(options, queue.put_nowait), anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        yield
        tasks.cancel_scope.cancel()


WORKLOADS = workloads(_receiving)

"""asyncpg-listen: a handler for each channel, reconnecting."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import asyncpg
import asyncpg_listen

from benchmarks._notifier import notifier

from .notify_arrivals import workloads

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from benchmarks._batch import Options


@asynccontextmanager
async def _receiving(options: Options, on_payload: Callable[[str], None]) -> AsyncGenerator[None]:
    listening = anyio.Event()

    async def handle(notification: asyncpg_listen.NotificationOrTimeout) -> None:
        if not isinstance(notification, asyncpg_listen.Notification):
            return
        if listening.is_set():
            on_payload(notification.payload or "")
        listening.set()

    async def connect() -> asyncpg.Connection:
        return await asyncpg.connect(**options.asyncpg_arguments())

    listener = asyncpg_listen.NotificationListener(connect)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listener.run, {options.channel: handle})
        with notifier(options.dsn, options.channel) as send:
            while not listening.is_set():  # it doesn't say when it listens
                await anyio.sleep(0.1)
                send(1)
            await anyio.sleep(0.3)
        yield
        tasks.cancel_scope.cancel()


WORKLOADS = workloads(_receiving)

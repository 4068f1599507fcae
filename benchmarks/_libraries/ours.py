"""pgstructured: `Connection`, `Session` and the bus, on every loop."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from benchmarks._batch import Batch, Options, expect, one_by_one

from ._psycopg import workloads

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    import psycopg


async def _connect(dsn: str) -> psycopg.AsyncConnection[Any]:
    from pgstructured.driver import connect

    return await connect(dsn)


@asynccontextmanager
async def _session_execute(options: Options) -> AsyncGenerator[Batch]:
    from pgstructured.driver import open_session

    async with open_session(options.dsn) as session:

        async def operation() -> None:
            await session.execute("SELECT 1")

        yield one_by_one(operation)


@asynccontextmanager
async def _bus_notifications(options: Options) -> AsyncGenerator[Batch]:
    from pgstructured.notify import open_notify_bus

    async with (
        open_notify_bus(options.dsn) as bus,
        bus.subscribe(options.channel, buffer=options.scale, gaps="raise") as subscription,
    ):

        async def batch(count: int) -> None:
            received = size = 0
            while received < count:
                for notification in await subscription.receive_many():
                    size += len(notification.payload)
                    received += 1
            expect("payload bytes", size, count * 100)

        yield batch


WORKLOADS = {
    **workloads(_connect),
    "session-execute": _session_execute,
    "bus-notifications": _bus_notifications,
}

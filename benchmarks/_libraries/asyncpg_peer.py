"""asyncpg, on asyncio and uvloop."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import asyncpg

from benchmarks._batch import Batch, Options, expect, one_by_one

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from benchmarks._batch import Workload


def _select_one(**arguments: int) -> Workload:
    @asynccontextmanager
    async def workload(options: Options) -> AsyncGenerator[Batch]:
        connection = await asyncpg.connect(**options.asyncpg_arguments(), **arguments)

        async def operation() -> None:
            await connection.fetchval("SELECT 1")

        try:
            expect("SELECT 1", await connection.fetchval("SELECT 1"), 1)
            yield one_by_one(operation)
        finally:
            await connection.close()

    return workload


@asynccontextmanager
async def _fetch(options: Options) -> AsyncGenerator[Batch]:
    connection = await asyncpg.connect(**options.asyncpg_arguments())

    async def operation() -> None:
        expect("rows", len(await connection.fetch("SELECT * FROM bench_rows")), options.scale)

    try:
        yield one_by_one(operation)
    finally:
        await connection.close()


@asynccontextmanager
async def _notifications(options: Options) -> AsyncGenerator[Batch]:
    connection = await asyncpg.connect(**options.asyncpg_arguments())
    received = size = 0
    wanted = 0
    complete = anyio.Event()

    def on_notification(_connection: object, _pid: int, _channel: str, payload: str) -> None:
        nonlocal received, size
        size += len(payload)
        received += 1
        if received == wanted:
            complete.set()

    async def batch(count: int) -> None:
        nonlocal received, size, wanted, complete
        received, size, wanted, complete = 0, 0, count, anyio.Event()
        await complete.wait()
        expect("payload bytes", size, count * 100)

    await connection.add_listener(options.channel, on_notification)
    try:
        yield batch
    finally:
        await connection.close()


WORKLOADS = {
    "select-one-prepared": _select_one(),
    "select-one-unprepared": _select_one(statement_cache_size=0),
    "fetch": _fetch,
    "notifications": _notifications,
}

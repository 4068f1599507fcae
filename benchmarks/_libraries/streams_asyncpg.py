"""asyncpg's cursors and COPY, on asyncio and uvloop."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import asyncpg

from benchmarks._batch import Batch, Options, expect, one_by_one

from .streams_psycopg import (
    MAKE_LINES,
    MAKE_SINK,
    READ_BEFORE_PAUSE,
    ROWS,
    WIDE_ROWS,
    lines_query,
    make_rows,
    measure_pause,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from benchmarks._batch import Workload


@asynccontextmanager
async def _connected(options: Options) -> AsyncGenerator[Any]:
    connection = await asyncpg.connect(**options.asyncpg_arguments())
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def _stream(options: Options) -> AsyncGenerator[Batch]:
    async with _connected(options) as connection:

        async def operation() -> None:
            count = 0
            async with connection.transaction():
                async for _ in connection.cursor(ROWS.format(options.scale), prefetch=100):
                    count += 1
            expect("rows", count, options.scale)

        yield one_by_one(operation)


@asynccontextmanager
async def _paused(options: Options) -> AsyncGenerator[Batch]:
    async with _connected(options) as connection:

        async def read(pause: Callable[[], Awaitable[None]]) -> None:
            async with connection.transaction():
                rows = await connection.cursor(WIDE_ROWS.format(options.scale))
                for _ in range(READ_BEFORE_PAUSE // 100):
                    await rows.fetch(100)
                await pause()

        yield measure_pause(read)


@asynccontextmanager
async def _copy_out(options: Options) -> AsyncGenerator[Batch]:
    async with _connected(options) as connection:
        await connection.execute(MAKE_LINES)

        async def operation() -> None:
            size = 0

            async def take(data: bytes) -> None:
                nonlocal size
                size += len(data)

            await connection.copy_from_query(lines_query(options), output=take)
            expect("bytes", size, options.scale * 100)

        yield one_by_one(operation)


@asynccontextmanager
async def _copy_in(options: Options) -> AsyncGenerator[Batch]:
    rows = make_rows(options)
    async with _connected(options) as connection:
        await connection.execute(MAKE_SINK)

        async def operation() -> None:
            await connection.execute("TRUNCATE sink")
            status = await connection.copy_records_to_table(
                "sink", records=rows, columns=["i", "t"]
            )
            expect("status", status, f"COPY {options.scale}")

        yield one_by_one(operation)


WORKLOADS: dict[str, Workload] = {
    "stream": _stream,
    "paused": _paused,
    "copy-out": _copy_out,
    "copy-in": _copy_in,
}

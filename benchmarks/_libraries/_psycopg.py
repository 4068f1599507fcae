"""What any `psycopg.AsyncConnection` can be asked: used for stock psycopg's and for ours."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from psycopg import sql

from benchmarks._batch import Batch, Options, expect, one_by_one

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    import psycopg

    from benchmarks._batch import Workload

    Connect = Callable[[str], Awaitable[psycopg.AsyncConnection[Any]]]


@asynccontextmanager
async def _connected(
    connect: Connect, options: Options
) -> AsyncGenerator[psycopg.AsyncConnection[Any]]:
    connection = await connect(options.dsn)
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def _select_one(
    connect: Connect, options: Options, *, prepare: bool | None
) -> AsyncGenerator[Batch]:
    async with _connected(connect, options) as connection:

        async def operation() -> None:
            cursor = await connection.execute("SELECT 1", prepare=prepare)
            await cursor.fetchone()

        cursor = await connection.execute("SELECT 1", prepare=prepare)
        expect("SELECT 1", await cursor.fetchone(), (1,))
        yield one_by_one(operation)


@asynccontextmanager
async def _fetch(connect: Connect, options: Options) -> AsyncGenerator[Batch]:
    async with _connected(connect, options) as connection:

        async def operation() -> None:
            cursor = await connection.execute("SELECT * FROM bench_rows", prepare=True)
            expect("rows", len(await cursor.fetchall()), options.scale)

        yield one_by_one(operation)


@asynccontextmanager
async def _copy_out(connect: Connect, options: Options) -> AsyncGenerator[Batch]:
    statement = sql.SQL(
        "COPY (SELECT line FROM bench_lines, generate_series(1, {})) TO STDOUT"
    ).format(options.scale // 10_000)
    async with _connected(connect, options) as connection:

        async def operation() -> None:
            size = 0
            async with connection.cursor().copy(statement) as copy:
                async for data in copy:
                    size += len(data)
            expect("bytes copied", size, options.scale * 100)

        yield one_by_one(operation)


@asynccontextmanager
async def _notifications(connect: Connect, options: Options) -> AsyncGenerator[Batch]:
    async with _connected(connect, options) as connection:
        await connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(options.channel)))

        async def batch(count: int) -> None:
            received = size = 0
            stream = connection.notifies()
            async for notification in stream:
                size += len(notification.payload)
                received += 1
                if received == count:
                    break
            await stream.aclose()
            expect("payload bytes", size, count * 100)

        yield batch


def workloads(connect: Connect) -> dict[str, Workload]:
    """Return the workloads, on connections that ``connect`` makes (in autocommit)."""
    return {
        "select-one": partial(_select_one, connect, prepare=None),
        "select-one-prepared": partial(_select_one, connect, prepare=True),
        "select-one-unprepared": partial(_select_one, connect, prepare=False),
        "fetch": partial(_fetch, connect),
        "copy-out": partial(_copy_out, connect),
        "notifications": partial(_notifications, connect),
    }

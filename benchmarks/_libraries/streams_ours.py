"""pgstructured's streams and COPY, on every loop."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

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
    from pgstructured.driver import Connection, RowStream


@asynccontextmanager
async def _connected(options: Options) -> AsyncGenerator[Connection[Any]]:
    from pgstructured.driver import connect

    connection = await connect(options.dsn)
    try:
        yield connection
    finally:
        await connection.aclose()


async def _iterate(rows: RowStream[Any]) -> int:
    count = 0
    async for _ in rows:
        count += 1
    return count


async def _receive(rows: RowStream[Any]) -> int:
    count = 0
    while True:
        try:
            await rows.receive()
        except anyio.EndOfStream:
            return count
        count += 1


async def _receive_many(rows: RowStream[Any]) -> int:
    count = 0
    while True:
        try:
            count += len(await rows.receive_many())
        except anyio.EndOfStream:
            return count


@asynccontextmanager
async def _stream(
    read: Callable[[RowStream[Any]], Awaitable[int]], options: Options
) -> AsyncGenerator[Batch]:
    async with _connected(options) as connection:

        async def operation() -> None:
            async with connection.stream(ROWS.format(options.scale), batch_size=100) as rows:
                expect("rows", await read(rows), options.scale)

        yield one_by_one(operation)


@asynccontextmanager
async def _paused(options: Options) -> AsyncGenerator[Batch]:
    async with _connected(options) as connection:

        async def read(pause: Callable[[], Awaitable[None]]) -> None:
            async with connection.stream(WIDE_ROWS.format(options.scale), batch_size=100) as rows:
                for _ in range(READ_BEFORE_PAUSE):
                    await rows.receive()
                await pause()

        yield measure_pause(read)


@asynccontextmanager
async def _copy_out(options: Options, *, by_row: bool = False) -> AsyncGenerator[Batch]:
    async with _connected(options) as connection:
        await connection.execute(MAKE_LINES)

        async def operation() -> None:
            size = 0
            statement = f"COPY ({lines_query(options)}) TO STDOUT"
            async with connection.copy_out(statement) as copy:
                if by_row:
                    async for (line,) in copy.rows():
                        size += len(line) + 1
                else:
                    async for data in copy:
                        size += len(data)
            expect("bytes", size, options.scale * 100)

        yield one_by_one(operation)


@asynccontextmanager
async def _copy_in(options: Options, *, one_by_one_row: bool = False) -> AsyncGenerator[Batch]:
    rows = make_rows(options)
    async with _connected(options) as connection:
        await connection.execute(MAKE_SINK)

        async def operation() -> None:
            await connection.execute("TRUNCATE sink")
            if one_by_one_row:
                async with connection.copy_in("COPY sink (i, t) FROM STDIN") as copy:
                    for row in rows:
                        await copy.send_row(row)
                count = copy.row_count
            else:
                count = await connection.copy_in_rows("sink", ["i", "t"], rows)
            expect("rows", count, options.scale)

        yield one_by_one(operation)


WORKLOADS: dict[str, Workload] = {
    "stream": partial(_stream, _iterate),
    "stream-one": partial(_stream, _receive),
    "stream-many": partial(_stream, _receive_many),
    "paused": _paused,
    "copy-out": _copy_out,
    "copy-out-rows": partial(_copy_out, by_row=True),
    "copy-in": _copy_in,
    "copy-in-one": partial(_copy_in, one_by_one_row=True),
}

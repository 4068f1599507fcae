"""psycopg's `stream()` and `copy()`, on asyncio and uvloop; also what the other two share."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import psycopg

from benchmarks._batch import Batch, Options, expect, one_by_one

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from benchmarks._batch import Workload

ROWS: Final = "SELECT i, i + 1 FROM generate_series(1, {}) AS t(i)"
WIDE_ROWS: Final = "SELECT i, repeat('x', 1000) FROM generate_series(1, {}) AS t(i)"
READ_BEFORE_PAUSE: Final = 1_000
PAUSE: Final = 1.0
MAKE_LINES: Final = (
    "CREATE TEMP TABLE lines AS SELECT lpad(i::text, 99, 'x') FROM generate_series(1, 10000) i"
)
LINES: Final = "SELECT lines.* FROM lines, generate_series(1, {})"
MAKE_SINK: Final = "CREATE TEMP TABLE sink (i int, t text)"


def lines_query(options: Options) -> str:
    """Return what gives as many lines of 100 bytes as are wanted."""
    return LINES.format(options.scale // 10_000)


def make_rows(options: Options) -> list[tuple[int, str]]:
    """Return as many rows as are wanted."""
    return [(i, f"name of number {i}") for i in range(options.scale)]


def resident_mib() -> float:
    """Return how much memory this process has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def measure_pause(read: Callable[[Callable[[], Awaitable[None]]], Awaitable[None]]) -> Batch:
    """Return a batch that reads and pauses; ``read`` awaits what it is given at its pause."""

    async def batch(_count: int) -> dict[str, float]:
        more = 0.0
        before = resident_mib()

        async def pause() -> None:
            nonlocal more
            await anyio.sleep(PAUSE)
            more = resident_mib() - before

        await read(pause)
        return {"MiB more": more}

    return batch


@asynccontextmanager
async def _connected(options: Options) -> AsyncGenerator[psycopg.AsyncConnection[Any]]:
    async with await psycopg.AsyncConnection.connect(options.dsn, autocommit=True) as connection:
        yield connection


@asynccontextmanager
async def _stream(options: Options) -> AsyncGenerator[Batch]:
    async with _connected(options) as connection:

        async def operation() -> None:
            count = 0
            async for _ in connection.cursor().stream(ROWS.format(options.scale), size=100):
                count += 1
            expect("rows", count, options.scale)

        yield one_by_one(operation)


@asynccontextmanager
async def _paused(options: Options) -> AsyncGenerator[Batch]:
    async with _connected(options) as connection:

        async def read(pause: Callable[[], Awaitable[None]]) -> None:
            count = 0
            rows: Any = connection.cursor().stream(WIDE_ROWS.format(options.scale), size=100)
            async for _ in rows:
                count += 1
                if count == READ_BEFORE_PAUSE:
                    await pause()
                    break
            await rows.aclose()

        yield measure_pause(read)


@asynccontextmanager
async def _copy_out(options: Options) -> AsyncGenerator[Batch]:
    async with _connected(options) as connection:
        await connection.execute(MAKE_LINES)

        async def operation() -> None:
            size = 0
            statement = f"COPY ({lines_query(options)}) TO STDOUT"
            async with connection.cursor().copy(statement) as copy:
                async for data in copy:
                    size += len(data)
            expect("bytes", size, options.scale * 100)

        yield one_by_one(operation)


@asynccontextmanager
async def _copy_in(options: Options) -> AsyncGenerator[Batch]:
    rows = make_rows(options)
    async with _connected(options) as connection:
        await connection.execute(MAKE_SINK)

        async def operation() -> None:
            await connection.execute("TRUNCATE sink")
            cursor = connection.cursor()
            async with cursor.copy("COPY sink (i, t) FROM STDIN") as copy:
                for row in rows:
                    await copy.write_row(row)
            expect("rows", cursor.rowcount, options.scale)

        yield one_by_one(operation)


WORKLOADS: dict[str, Workload] = {
    "stream": _stream,
    "paused": _paused,
    "copy-out": _copy_out,
    "copy-in": _copy_in,
}

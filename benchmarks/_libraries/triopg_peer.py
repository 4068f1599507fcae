"""triopg (asyncpg through trio-asyncio), on trio. Unmaintained: 0.6.0 is from 2021."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio_asyncio
import triopg

from benchmarks._batch import Batch, Options, expect, one_by_one

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from benchmarks._batch import Workload


def _select_one(**arguments: int) -> Workload:
    @asynccontextmanager
    async def workload(options: Options) -> AsyncGenerator[Batch]:
        async with (
            trio_asyncio.open_loop(),
            triopg.connect(**options.asyncpg_arguments(), **arguments) as connection,
        ):

            async def operation() -> None:
                await connection.fetchval("SELECT 1")

            expect("SELECT 1", await connection.fetchval("SELECT 1"), 1)
            yield one_by_one(operation)

    return workload


@asynccontextmanager
async def _fetch(options: Options) -> AsyncGenerator[Batch]:
    async with (
        trio_asyncio.open_loop(),
        triopg.connect(**options.asyncpg_arguments()) as connection,
    ):

        async def operation() -> None:
            rows = await connection.fetch("SELECT * FROM bench_rows")
            expect("rows", len(rows), options.scale)

        yield one_by_one(operation)


WORKLOADS = {
    "select-one-prepared": _select_one(),
    "select-one-unprepared": _select_one(statement_cache_size=0),
    "fetch": _fetch,
}

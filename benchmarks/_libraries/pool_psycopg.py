"""psycopg_pool, on asyncio and uvloop."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import psycopg_pool

from benchmarks._pooling import Peer, workloads

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from benchmarks._batch import Options

# It tells of every connection that it throws away.
logging.getLogger("psycopg").setLevel(logging.CRITICAL)


async def _select(conn: Any, query: str) -> Any:
    cursor = await conn.execute(query)
    return (await cursor.fetchone())[0]


@asynccontextmanager
async def _open(options: Options, size: int) -> AsyncGenerator[Peer]:
    opened: list[int] = []

    async def configure(conn: Any) -> None:
        opened.append(conn.info.backend_pid)

    async with psycopg_pool.AsyncConnectionPool(
        options.dsn,
        min_size=size,
        max_size=size,
        kwargs={"autocommit": True},
        configure=configure,
        open=False,
    ) as pool:
        await pool.wait()
        yield Peer(pool.connection, _select, opened)


WORKLOADS = workloads(_open)

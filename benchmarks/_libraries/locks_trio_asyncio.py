"""psycopg by hand on trio, through trio-asyncio: a connection for each lock.

The only way to have it there. Each of the two round trips crosses over once, with all that
it awaits.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import trio_asyncio  # isort: skip - before psycopg, which takes what it replaces in asyncio

import psycopg

from benchmarks._batch import Batch, Options, expect, one_by_one

from .locks_ours import in_tasks

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    Connection = psycopg.AsyncConnection[Any]


async def _connect(dsn: str) -> Connection:
    return await psycopg.AsyncConnection.connect(dsn, autocommit=True)


async def _ask(connection: Connection, function: str, key: int) -> None:
    cursor = await connection.execute(f"SELECT {function}(%s)".encode(), [key])
    expect(function, await cursor.fetchone(), (True,))


async def _take_and_release(connection: Connection, key: int) -> None:
    ask = trio_asyncio.aio_as_trio(_ask)
    await ask(connection, "pg_try_advisory_lock", key)
    await ask(connection, "pg_advisory_unlock", key)


@asynccontextmanager
async def _connections(dsn: str, count: int) -> AsyncGenerator[list[Connection]]:
    async with trio_asyncio.open_loop():
        connections = [await trio_asyncio.aio_as_trio(_connect)(dsn) for _ in range(count)]
        try:
            yield connections
        finally:
            for connection in connections:
                await trio_asyncio.aio_as_trio(connection.close)()


@asynccontextmanager
async def _uncontended(options: Options) -> AsyncGenerator[Batch]:
    async with _connections(options.dsn, 1) as (connection,):
        yield one_by_one(partial(_take_and_release, connection, hash(options.channel) >> 1))


@asynccontextmanager
async def _many_keys(options: Options) -> AsyncGenerator[Batch]:
    async with _connections(options.dsn, 100) as connections:
        by_key = {f"{options.channel} {number}": conn for number, conn in enumerate(connections)}

        async def take(key: str, times: int) -> None:
            for _ in range(times):
                await _take_and_release(by_key[key], hash(key) >> 1)

        yield in_tasks(options, take)


WORKLOADS = {"uncontended": _uncontended, "many-keys": _many_keys}

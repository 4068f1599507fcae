"""psycopg by hand: a connection for each lock, and Postgres' functions on it."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg

from benchmarks._batch import Batch, Options, expect, one_by_one
from benchmarks._handoff import Take, measured

from .locks_ours import in_tasks

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


async def _connect(dsn: str) -> psycopg.AsyncConnection[Any]:
    return await psycopg.AsyncConnection.connect(dsn, autocommit=True)


async def _take_and_release(connection: psycopg.AsyncConnection[Any], key: int) -> None:
    cursor = await connection.execute("SELECT pg_try_advisory_lock(%s)", [key])
    expect("the lock", await cursor.fetchone(), (True,))
    cursor = await connection.execute("SELECT pg_advisory_unlock(%s)", [key])
    expect("the unlock", await cursor.fetchone(), (True,))


@asynccontextmanager
async def _uncontended(options: Options) -> AsyncGenerator[Batch]:
    async with await _connect(options.dsn) as connection:
        key = hash(options.channel) >> 1
        yield one_by_one(partial(_take_and_release, connection, key))


@asynccontextmanager
async def _many_keys(options: Options) -> AsyncGenerator[Batch]:
    connections: dict[str, psycopg.AsyncConnection[Any]] = {}

    async def take(key: str, times: int) -> None:
        for _ in range(times):
            await _take_and_release(connections[key], hash(key) >> 1)

    async with AsyncExitStack() as stack:
        for number in range(100):
            connection = await stack.enter_async_context(await _connect(options.dsn))
            connections[f"{options.channel} {number}"] = connection
        yield in_tasks(options, take)


@asynccontextmanager
async def handoff_side(dsn: str, key: str) -> AsyncGenerator[Take]:
    """Yield how one of two processes takes the key: in the server's queue."""
    number = int.from_bytes(key.encode()[-7:], "big")

    @asynccontextmanager
    async def take() -> AsyncGenerator[None]:
        await connection.execute("SELECT pg_advisory_lock(%s)", [number])
        yield
        await connection.execute("SELECT pg_advisory_unlock(%s)", [number])

    async with await _connect(dsn) as connection:
        yield take


WORKLOADS = {
    "uncontended": _uncontended,
    "many-keys": _many_keys,
    "handoff": partial(measured, __name__),
}

"""sqlalchemy-dlock on psycopg: an `AsyncConnection` of SQLAlchemy for each lock."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import sqlalchemy
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy_dlock import create_async_sadlock

from benchmarks._batch import Batch, Options, one_by_one

from .locks_ours import in_tasks

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine


def make_url(dsn: str) -> sqlalchemy.URL:
    """Return the server as SQLAlchemy takes it, to be reached by psycopg."""
    given = {name: value for name, value in conninfo_to_dict(dsn).items() if value is not None}
    names = {"host": "host", "port": "port", "user": "username", "password": "password"}
    arguments = {theirs: given.pop(ours) for ours, theirs in names.items() if ours in given}
    database = given.pop("dbname", None)
    port = int(arguments.pop("port", 5432))
    return sqlalchemy.URL.create(
        "postgresql+psycopg",
        database=None if database is None else str(database),
        port=port,
        query={name: str(value) for name, value in given.items()},
        **{name: str(value) for name, value in arguments.items()},
    )


@asynccontextmanager
async def _engine(options: Options) -> AsyncGenerator[AsyncEngine]:
    # The cheapest way to use it: statements that need no BEGIN and no COMMIT.
    engine = create_async_engine(make_url(options.dsn), pool_size=100, isolation_level="AUTOCOMMIT")
    try:
        yield engine
    finally:
        await engine.dispose()


async def _take_and_release(connection: AsyncConnection, key: str) -> None:
    async with create_async_sadlock(connection, key):
        pass


@asynccontextmanager
async def _uncontended(options: Options) -> AsyncGenerator[Batch]:
    async with _engine(options) as engine, engine.connect() as connection:

        async def operation() -> None:
            await _take_and_release(connection, options.channel)

        yield one_by_one(operation)


@asynccontextmanager
async def _many_keys(options: Options) -> AsyncGenerator[Batch]:
    connections: dict[str, AsyncConnection] = {}

    async def take(key: str, times: int) -> None:
        for _ in range(times):
            await _take_and_release(connections[key], key)

    async with _engine(options) as engine, AsyncExitStack() as stack:
        for number in range(100):
            connection = await stack.enter_async_context(engine.connect())
            connections[f"{options.channel} {number}"] = connection
        yield in_tasks(options, take)


WORKLOADS = {"uncontended": _uncontended, "many-keys": _many_keys}

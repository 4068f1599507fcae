"""pgstructured's ways of publishing, on every loop."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio

from benchmarks._batch import Batch, Options, expect
from benchmarks._durable import durable_server

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    import psycopg

    Write = Callable[[psycopg.AsyncConnection[Any], int], Awaitable[object]]

WRITERS = 32
TABLE = "bench_published"


def one_by_one_on(connection: psycopg.AsyncConnection[Any], options: Options) -> Batch:
    """Return a batch that sends each notification in a statement, and transaction, of its own."""

    async def batch(count: int) -> None:
        for _ in range(count):
            for number in range(options.scale):
                await connection.execute(
                    "SELECT pg_notify(%s, %s)", [options.channel, f"notification {number}"]
                )

    return batch


@asynccontextmanager
async def _execute(options: Options) -> AsyncGenerator[Batch]:
    from pgstructured import connect

    async with await connect(options.dsn) as connection:
        yield one_by_one_on(connection, options)


@asynccontextmanager
async def _notify_many(options: Options) -> AsyncGenerator[Batch]:
    from pgstructured import connect
    from pgstructured.notify import notify_many

    async with await connect(options.dsn) as connection:

        async def batch(count: int) -> None:
            for _ in range(count):
                items = ((options.channel, f"notification {n}") for n in range(options.scale))
                expect("notifications", await notify_many(connection, items), options.scale)

        yield batch


@asynccontextmanager
async def _publisher(options: Options) -> AsyncGenerator[Batch]:
    from pgstructured import open_publisher

    async with open_publisher(options.dsn) as publisher:

        async def batch(count: int) -> None:
            before = publisher.statistics().delivered
            for _ in range(count):
                for number in range(options.scale):
                    await publisher.publish(options.channel, f"notification {number}")
                await publisher.flush()
            delivered = publisher.statistics().delivered - before
            expect("notifications", delivered, count * options.scale)

        yield batch


# ---------------------------------------------------------------- beside writes


@asynccontextmanager
async def _writers(dsn: str, options: Options) -> AsyncGenerator[Callable[[Write], Batch]]:
    """Yield what makes a batch: 32 connections that insert rows, all at once."""
    from pgstructured import connect

    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(await connect(dsn)) for _ in range(WRITERS)]
        await connections[0].execute(f"DROP TABLE IF EXISTS {TABLE}")
        await connections[0].execute(f"CREATE TABLE {TABLE} (number int, name text)")

        def make(write: Write) -> Batch:
            async def work(connection: psycopg.AsyncConnection[Any], numbers: range) -> None:
                for number in numbers:
                    await write(connection, number)

            async def batch(count: int) -> None:
                for _ in range(count):
                    async with anyio.create_task_group() as tasks:
                        for first, connection in enumerate(connections):
                            numbers = range(first, options.scale, WRITERS)
                            tasks.start_soon(work, connection, numbers)

            return batch

        yield make
        await connections[0].execute(f"DROP TABLE {TABLE}")


INSERT = f"INSERT INTO {TABLE} VALUES (%s, 'a row of some length, as rows are')"


async def _insert_row(connection: psycopg.AsyncConnection[Any], number: int) -> None:
    async with connection.transaction():
        await connection.execute(INSERT, [number])


@asynccontextmanager
async def _insert(options: Options) -> AsyncGenerator[Batch]:
    with durable_server(options.dsn) as dsn:
        async with _writers(dsn, options) as make:
            yield make(_insert_row)


@asynccontextmanager
async def _insert_notify(options: Options) -> AsyncGenerator[Batch]:
    """The notification in the transaction: in the same statement, so that it costs no more."""
    statement = f"{INSERT} RETURNING pg_notify(%s, %s)"

    async def write(connection: psycopg.AsyncConnection[Any], number: int) -> None:
        async with connection.transaction():
            await connection.execute(statement, [number, options.channel, str(number)])

    with durable_server(options.dsn) as dsn:
        async with _writers(dsn, options) as make:
            yield make(write)


@asynccontextmanager
async def _insert_publish(options: Options) -> AsyncGenerator[Batch]:
    """Each notification after the commit; the batch ends when all have been delivered."""
    from pgstructured import open_publisher

    with durable_server(options.dsn) as dsn:
        async with _writers(dsn, options) as make, open_publisher(dsn) as publisher:

            async def write(connection: psycopg.AsyncConnection[Any], number: int) -> None:
                await _insert_row(connection, number)
                await publisher.publish(options.channel, str(number))

            insert = make(write)

            async def batch(count: int) -> None:
                before = publisher.statistics().delivered
                await insert(count)
                await publisher.flush()
                delivered = publisher.statistics().delivered - before
                expect("notifications", delivered, count * options.scale)

            yield batch


WORKLOADS = {
    "execute": _execute,
    "notify-many": _notify_many,
    "publisher": _publisher,
    "insert": _insert,
    "insert-notify": _insert_notify,
    "insert-publish": _insert_publish,
}

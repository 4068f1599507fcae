"""The event log, and the same by hand on the same connections."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

import anyio
from psycopg.types.json import Jsonb

from benchmarks._appender import appender
from benchmarks._batch import Batch, Options, expect
from benchmarks._durable import durable_server

from .notify_arrivals import percentiles

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from benchmarks._batch import Workload
    from pgstructured import EventLog
    from pgstructured.driver import Connection

    Append = Callable[[Connection[Any], Any], Awaitable[object]]
    Receive = Callable[[Callable[[int, int], None]], Awaitable[None]]

WRITERS = 32
RATE = 1000
THINK = 0.03
TOPIC = "orders"
LATE_MS = 2000
"""Milliseconds after the last commit at which what has not come counts as lost."""


def _payload(number: int) -> dict[str, Any]:
    return {"number": number, "name": "a row of some length, as rows are", "is_new": True}


@asynccontextmanager
async def _created(
    dsn: str, options: Options, *, partition_size: int | None = None, **more: Any
) -> AsyncGenerator[EventLog]:
    """Create a log of this worker's own."""
    from pgstructured import EventLog, connect

    log = EventLog(f"{options.channel}_event", **more)
    tables = ", ".join(f"{options.channel}_event{s}" for s in ("", "_state", "_trimmed", "_cursor"))
    async with await connect(dsn) as conn:
        await conn.execute(f"DROP TABLE IF EXISTS {tables}")
        await log.create(conn, partition_size=partition_size)
    yield log
    async with await connect(dsn) as conn:
        await conn.execute(f"DROP TABLE {tables}")


# ---------------------------------------------------------------- appending


def _appending(way: str) -> Workload:
    """Let 32 writers append on a server that waits for its disk, each in transactions."""

    @asynccontextmanager
    async def workload(options: Options) -> AsyncGenerator[Batch]:
        from pgstructured import connect, open_publisher

        async with AsyncExitStack() as stack:
            dsn = stack.enter_context(durable_server(options.dsn))
            publisher = await stack.enter_async_context(open_publisher(dsn))
            more = {"publisher": publisher} if way == "append" else {}
            log = await stack.enter_async_context(_created(dsn, options, **more))
            connections = [
                await stack.enter_async_context(await connect(dsn)) for _ in range(WRITERS)
            ]
            insert: Any = (
                f"INSERT INTO {options.channel}_event (topic, payload) VALUES (%s, %s) RETURNING id"
            )

            async def append_by_hand(connection: Connection[Any], payload: Any) -> object:
                cursor = await connection.execute(insert, (TOPIC, Jsonb(payload)))
                return await cursor.fetchone()

            async def append(connection: Connection[Any], payload: Any) -> object:
                return await log.append(connection, TOPIC, payload)

            do = append_by_hand if way == "insert" else append

            async def write(connection: Connection[Any], numbers: range) -> None:
                for number in numbers:
                    async with connection.transaction():
                        await do(connection, _payload(number))

            async def batch(count: int) -> None:
                for _ in range(count):
                    async with anyio.create_task_group() as tasks:
                        for first, connection in enumerate(connections):
                            tasks.start_soon(
                                write, connection, range(first, options.scale, WRITERS)
                            )
                await publisher.flush()

            yield batch

    return workload


# ---------------------------------------------------------------- reading


@asynccontextmanager
async def _filled(options: Options) -> AsyncGenerator[tuple[EventLog, Connection[Any]]]:
    from pgstructured import connect

    async with _created(options.dsn, options) as log, await connect(options.dsn) as conn:
        for first in range(0, options.scale, 10_000):
            numbers = range(first, min(first + 10_000, options.scale))
            await log.append_many(conn, ((TOPIC, _payload(number)) for number in numbers))
        await conn.execute("VACUUM ANALYZE")
        yield log, conn


@asynccontextmanager
async def _read(options: Options) -> AsyncGenerator[Batch]:
    from pgstructured.log import Cursor

    async with _filled(options) as (log, conn):

        async def batch(count: int) -> None:
            for _ in range(count):
                cursor, received = Cursor.beginning(), 0
                while True:
                    page = await log.read(conn, cursor)
                    if not page.events:
                        break
                    cursor = page.cursor
                    received += len(page.events)
                expect("events", received, options.scale)

        yield batch


@asynccontextmanager
async def _follow_all(options: Options) -> AsyncGenerator[Batch]:
    from pgstructured import open_notify_bus, open_pool
    from pgstructured.log import Cursor

    async with (
        _filled(options) as (log, _),
        open_notify_bus(options.dsn) as bus,
        open_pool(options.dsn) as pool,
    ):

        async def batch(count: int) -> None:
            for _ in range(count):
                async with log.follow(bus, pool, Cursor.beginning()) as following:
                    for _ in range(options.scale):
                        await following.receive()

        yield batch


def _select(size: int | None) -> Workload:
    """Select the same columns, all at once or in pages by id."""

    @asynccontextmanager
    async def workload(options: Options) -> AsyncGenerator[Batch]:
        async with _filled(options) as (_, conn):
            columns = f"SELECT id, topic, payload, body, appended_at FROM {options.channel}_event"
            query: Any = f"{columns} WHERE id > %s ORDER BY id LIMIT %s"

            async def batch(count: int) -> None:
                for _ in range(count):
                    last, received = 0, 0
                    while True:
                        cursor = await conn.execute(query, (last, size or options.scale))
                        rows = await cursor.fetchall()
                        if not rows:
                            break
                        last = rows[-1][0]
                        received += len(rows)
                    expect("rows", received, options.scale)

            yield batch

    return workload


# ---------------------------------------------------------------- following


@asynccontextmanager
async def _following(options: Options, log: EventLog, *, is_naive: bool) -> AsyncGenerator[Receive]:
    """Yield what receives for ever: ids and payloads, from now on."""
    from pgstructured import open_notify_bus, open_pool

    select: Any = f"SELECT id, payload FROM {options.channel}_event WHERE id > %s ORDER BY id"
    newest: Any = f"SELECT coalesce(max(id), 0) FROM {options.channel}_event"

    async with open_notify_bus(options.dsn) as bus, open_pool(options.dsn) as pool:

        async def follow(take: Callable[[int, int], None], task_status: Any) -> None:
            async with pool.acquire() as conn:
                cursor = await log.now(conn)
            async with log.follow(bus, pool, cursor) as following:
                task_status.started()
                async for event in following:
                    take(event.id, event.payload)

        async def follow_ids(take: Callable[[int, int], None], task_status: Any) -> None:
            async with log.wake_ups(bus) as wakes:
                async with pool.acquire() as conn:
                    (last,) = await (await conn.execute(newest)).fetchone() or (0,)
                task_status.started()
                async for _ in wakes:
                    async with pool.acquire() as conn:
                        rows = await (await conn.execute(select, (last,))).fetchall()
                    for event_id, payload in rows:
                        take(event_id, payload)
                        last = event_id

        async def receive(
            take: Callable[[int, int], None], *, task_status: Any = anyio.TASK_STATUS_IGNORED
        ) -> None:
            await (follow_ids if is_naive else follow)(take, task_status)

        yield receive


@asynccontextmanager
async def _unrelated(dsn: str) -> AsyncGenerator[None]:
    """Keep a transaction open that has written something, and has nothing to do with the log."""
    from pgstructured import connect

    async with await connect(dsn) as conn, conn.transaction(force_rollback=True):
        await conn.execute("SELECT pg_current_xact_id()")
        yield


def _latency(*, is_naive: bool = False, beside: bool = False) -> Workload:
    """Measure from just before the append to the consumer's code, a thousand times a second."""

    @asynccontextmanager
    async def workload(options: Options) -> AsyncGenerator[Batch]:
        async with AsyncExitStack() as stack:
            log = await stack.enter_async_context(_created(options.dsn, options))
            receive = await stack.enter_async_context(_following(options, log, is_naive=is_naive))
            if beside:
                await stack.enter_async_context(_unrelated(options.dsn))
            process = stack.enter_context(appender(options.dsn, f"{options.channel}_event"))

            async def batch(_: int) -> dict[str, float]:
                late: list[float] = []
                received: set[int] = set()

                def take(event_id: int, payload: int) -> None:
                    late.append((monotonic_ns() - payload) / 1e6)
                    received.add(event_id)

                async with anyio.create_task_group() as tasks:
                    await tasks.start(receive, take)
                    process.begin(options.scale, rate=RATE)
                    ids = await anyio.to_thread.run_sync(process.ids)
                    await _wait_for(received, ids)
                    tasks.cancel_scope.cancel()
                cuts = percentiles(late)
                lost = len(ids - received) / len(ids) * 100
                return {"p50 ms": cuts["p50 us"], "p99 ms": cuts["p99 us"], "lost %": lost}

            yield batch

    return workload


def _loss(*, is_naive: bool) -> Workload:
    """Count what does not come while eight writers think up to 30 ms before they commit."""

    @asynccontextmanager
    async def workload(options: Options) -> AsyncGenerator[Batch]:
        async with AsyncExitStack() as stack:
            log = await stack.enter_async_context(_created(options.dsn, options))
            receive = await stack.enter_async_context(_following(options, log, is_naive=is_naive))
            process = stack.enter_context(appender(options.dsn, f"{options.channel}_event"))

            async def batch(_: int) -> dict[str, float]:
                received: set[int] = set()
                count = 0

                def take(event_id: int, _: int) -> None:
                    nonlocal count
                    received.add(event_id)
                    count += 1

                async with anyio.create_task_group() as tasks:
                    await tasks.start(receive, take)
                    process.begin(options.scale, think=THINK)
                    ids = await anyio.to_thread.run_sync(process.ids)
                    await _wait_for(received, ids)
                    tasks.cancel_scope.cancel()
                lost = len(ids - received) / len(ids) * 100
                return {"lost %": lost, "twice": float(count - len(received))}

            yield batch

    return workload


async def _wait_for(received: set[int], ids: set[int]) -> None:
    with anyio.move_on_after(LATE_MS / 1000):
        while not ids <= received:  # noqa: ASYNC110 - it comes as it comes
            await anyio.sleep(0.005)


# ---------------------------------------------------------------- trimming


def _trim(*, in_partitions: bool) -> Workload:
    """Trim a log that is wholly old: all rows of one table, or a partition for each tenth."""

    @asynccontextmanager
    async def workload(options: Options) -> AsyncGenerator[Batch]:
        from pgstructured import connect

        size = options.scale // 10 if in_partitions else None
        async with _created(options.dsn, options, partition_size=size) as log:

            async def batch(_: int) -> dict[str, float]:
                async with await connect(options.dsn) as conn:
                    for _ in range(10):
                        await conn.execute(
                            f"INSERT INTO {options.channel}_event (topic, payload)"
                            " SELECT 'orders', jsonb_build_object('number', i, 'name', 'a row')"
                            f" FROM generate_series(1, {options.scale // 10}) AS i"
                        )
                        await log.trim(conn, 3600)  # as it is called now and then: makes partitions
                    began = monotonic_ns()
                    expect("events removed", await log.trim(conn, 0), options.scale)
                    took = monotonic_ns() - began
                    cursor = await conn.execute(
                        "SELECT sum(pg_total_relation_size(oid)) / 1024.0 / 1024.0 FROM pg_class"
                        " WHERE relkind = 'r' AND relname LIKE %s",
                        (rf"{options.channel}\_event%",),
                    )
                    (left,) = await cursor.fetchone() or (0,)
                return {"trim ms": took / 1e6, "MiB left": float(left)}

            yield batch

    return workload


WORKLOADS = {
    "insert": _appending("insert"),
    "append": _appending("append"),
    "append-notify": _appending("append-notify"),
    "select": _select(None),
    "select-pages": _select(1000),
    "read": _read,
    "follow-all": _follow_all,
    "latency": _latency(),
    "latency-beside": _latency(beside=True),
    "latency-naive": _latency(is_naive=True),
    "loss": _loss(is_naive=False),
    "loss-naive": _loss(is_naive=True),
    "trim": _trim(in_partitions=False),
    "trim-partitions": _trim(in_partitions=True),
}

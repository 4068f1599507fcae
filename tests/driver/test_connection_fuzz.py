"""Random operations on a `Connection`, cancelled at random: it is always usable, or FAILED."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, cast

import anyio
import psycopg
import pytest
from anyio.lowlevel import checkpoint

from pgstructured.driver import Connection, ConnectionState, connect

if TYPE_CHECKING:
    from pgstructured.testing import Cluster

IDLE = psycopg.pq.TransactionStatus.IDLE
SECONDS = float(os.environ.get("PGSTRUCTURED_FUZZ_SECONDS", "2"))
WORKERS = 4

Operation = Callable[[Connection[Any], random.Random], Awaitable[object]]


async def select(conn: Connection[Any], _: random.Random) -> None:
    for i in range(20):
        cursor = await conn.execute("SELECT %s::int", [i])
        assert await cursor.fetchone() == (i,)


async def sleep(conn: Connection[Any], rng: random.Random) -> None:
    await conn.execute("SELECT pg_sleep(%s)", [rng.random() * 0.1])


async def big_result(conn: Connection[Any], _: random.Random) -> None:
    await conn.execute("SELECT i, repeat('x', 100) FROM generate_series(1, 5000) AS t(i)")


async def big_parameter(conn: Connection[Any], _: random.Random) -> None:
    cursor = await conn.execute("SELECT length(%s)", ["x" * 2_000_000])
    assert await cursor.fetchone() == (2_000_000,)


async def failing(conn: Connection[Any], _: random.Random) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        await conn.execute("SELECT 1/0")


async def transaction(conn: Connection[Any], rng: random.Random) -> None:
    # Two rows or none.
    async with conn.transaction():
        await conn.execute("INSERT INTO pairs VALUES (1)")
        await anyio.sleep(rng.random() * 0.005)
        await conn.execute("INSERT INTO pairs VALUES (1)")


async def nested(conn: Connection[Any], rng: random.Random) -> None:
    async with conn.transaction():
        await conn.execute("INSERT INTO pairs VALUES (1)")
        with suppress(ZeroDivisionError):
            async with conn.transaction():
                await conn.execute("INSERT INTO pairs VALUES (1)")
                if rng.random() < 0.5:
                    raise ZeroDivisionError
        async with conn.transaction(force_rollback=True):
            await conn.execute("INSERT INTO pairs VALUES (1)")
        await conn.execute("INSERT INTO pairs SELECT 1 WHERE (SELECT count(*) FROM pairs) % 2 = 1")


async def not_autocommit(conn: Connection[Any], _: random.Random) -> None:
    try:
        await conn.set_autocommit(False)
        await conn.execute("INSERT INTO pairs VALUES (1), (1)")
        await conn.commit()
        await conn.execute("INSERT INTO pairs VALUES (1)")
        await conn.rollback()
    finally:
        with anyio.CancelScope(shield=True):
            if conn.state is ConnectionState.OPEN:
                await conn.rollback()
                await conn.set_autocommit(True)


async def pipeline(conn: Connection[Any], rng: random.Random) -> None:
    async with conn.pipeline() as block:
        cursors = [await conn.execute("SELECT %s::int", [i]) for i in range(rng.randrange(20))]
        if rng.random() < 0.3:
            await block.sync()
        for i, cursor in enumerate(cursors):
            assert await cursor.fetchone() == (i,)


async def pipeline_sleeping(conn: Connection[Any], rng: random.Random) -> None:
    async with conn.pipeline():
        await conn.execute("SELECT pg_sleep(0.02)")
        async with conn.pipeline():
            cursor = await conn.execute("SELECT pg_sleep(0.02)")
            if rng.random() < 0.5:
                await cursor.fetchone()


async def pipeline_transaction(conn: Connection[Any], _: random.Random) -> None:
    async with conn.pipeline(), conn.transaction():
        await conn.execute("INSERT INTO pairs VALUES (1)")
        await conn.execute("SELECT pg_sleep(0.005)")
        await conn.execute("INSERT INTO pairs VALUES (1)")


async def executemany(conn: Connection[Any], rng: random.Random) -> None:
    rows = ((i,) for i in range(rng.randrange(3000)))
    await conn.cursor().executemany("SELECT %s::int", rows, returning=rng.random() < 0.5)


async def copy_in(conn: Connection[Any], rng: random.Random) -> None:
    async with conn.cursor().copy("COPY copied FROM STDIN") as copy:
        for _ in range(rng.randrange(200)):
            await copy.write(b"x" * 5000 + b"\n")


async def copy_out(conn: Connection[Any], rng: random.Random) -> None:
    stop = rng.randrange(20_000)
    async with conn.cursor().copy(
        "COPY (SELECT repeat('x', 100) FROM generate_series(1, 10000)) TO STDOUT"
    ) as copy:
        for _ in range(stop):
            if not await copy.read():
                break


async def stream(conn: Connection[Any], rng: random.Random) -> None:
    stop = rng.randrange(5000)
    rows = conn.cursor().stream(
        "SELECT i, repeat('x', 100) FROM generate_series(1, 3000) AS t(i)", size=rng.choice([1, 50])
    )
    async with aclosing(cast("AsyncGenerator[Any]", rows)):
        async for row in rows:
            if row[0] == stop:
                break
            if row[0] % 100 == 0:
                await checkpoint()


async def server_cursor(conn: Connection[Any], rng: random.Random) -> None:
    async with conn.transaction(), conn.cursor("named") as cursor:
        await cursor.execute("SELECT generate_series(1, 500)")
        for _ in range(rng.randrange(8)):
            await cursor.fetchmany(100)


async def notifies(conn: Connection[Any], rng: random.Random) -> None:
    await conn.execute("LISTEN here")
    await conn.execute("NOTIFY here")
    async with aclosing(conn.notifies(timeout=rng.random() * 0.05)) as notifications:
        async for _ in notifications:
            break
    await conn.execute("UNLISTEN *")


async def together(conn: Connection[Any], rng: random.Random) -> None:
    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(conn.execute, "SELECT pg_sleep(%s)", [rng.random() * 0.01])


OPERATIONS: list[Operation] = [
    select, sleep, big_result, big_parameter, failing, transaction, nested, not_autocommit,
    pipeline, pipeline_sleeping, pipeline_transaction, executemany, copy_in, copy_out, stream,
    server_cursor, notifies, together,
]  # fmt: skip


async def cancel_by_scope(run: Callable[[], Awaitable[object]], delay: float) -> bool:
    with anyio.move_on_after(delay) as scope:
        await run()
    return scope.cancelled_caught


async def cancel_natively(run: Callable[[], Awaitable[object]], delay: float) -> bool:
    import asyncio

    task = asyncio.ensure_future(run())
    await asyncio.wait([task], timeout=delay)
    if task.done():
        await task
        return False
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return True


@pytest.mark.parametrize("how", [cancel_by_scope, cancel_natively])
@pytest.mark.parametrize("seed", [1])
async def test_random_cancellation(
    pg_dsn: str, pg_cluster: Cluster, anyio_backend_name: str, seed: int, how: Any
) -> None:
    if how is cancel_natively and anyio_backend_name != "asyncio":
        pytest.skip("native cancellation is asyncio's")
    with psycopg.connect(pg_dsn, autocommit=True) as conn:
        conn.execute("CREATE TABLE pairs (i int); CREATE TABLE copied (t text)")
    figures = {"operations": 0, "cancelled": 0}

    async def work(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        conn = await connect(pg_dsn)
        try:
            while anyio.current_time() < deadline or figures["operations"] <= 20:
                run = rng.choice(OPERATIONS)
                delay = rng.random() ** 2 * 0.1
                with anyio.fail_after(20):
                    try:
                        figures["cancelled"] += await how(lambda run=run: run(conn, rng), delay)
                    except BaseException as exc:
                        exc.add_note(f"operation: {run.__name__}, delay {delay}")
                        raise
                    figures["operations"] += 1
                    told = f"{run.__name__}, cancelled after {delay}: {conn.failure!r}"
                    assert conn.state is ConnectionState.OPEN, told
                    assert conn.pgconn.transaction_status == IDLE, told
                    assert not conn.pgconn.pipeline_status, told
                    assert not conn._num_transactions, told
                    assert not conn._lock.locked(), told
                    cursor = await conn.execute("SELECT 42")
                    assert await cursor.fetchone() == (42,), told
        finally:
            await conn.aclose()

    deadline = anyio.current_time() + SECONDS
    async with anyio.create_task_group() as tasks:
        for number in range(WORKERS):
            tasks.start_soon(work, number)
    with psycopg.connect(pg_dsn) as conn:
        row = conn.execute("SELECT count(*) %% 2 FROM pairs", []).fetchone()
        assert row == (0,), "a transaction was committed by half"
    assert figures["operations"] > 20
    assert figures["cancelled"] > 0

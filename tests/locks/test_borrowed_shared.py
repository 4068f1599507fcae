"""A lock on a connection that other tasks use too: what is theirs stays theirs."""

from __future__ import annotations

import anyio
import psycopg
import pytest

from pgstructured.driver import ConnectionState, connect, hold_turn
from pgstructured.errors import LockTimeout
from pgstructured.locks import pg_lock


@pytest.fixture
def holder(pg_dsn):
    with psycopg.connect(pg_dsn, autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(77)")
        yield other


async def test_a_timeout_in_a_transaction_loses_nobodys_rows(pg_dsn, holder) -> None:
    conn = await connect(pg_dsn)
    await conn.execute("CREATE TABLE t (n int)")

    async def insert() -> None:
        for number in range(5):
            await conn.execute("INSERT INTO t VALUES (%s)", [number])
            await anyio.sleep(0.02)

    async with conn.transaction(), anyio.create_task_group() as tg:
        tg.start_soon(insert)
        with pytest.raises(LockTimeout):
            async with pg_lock(conn, 77, acquire_timeout=0.3):
                pytest.fail("granted")
    rows = await (await conn.execute("SELECT n FROM t ORDER BY n")).fetchall()
    assert rows == [(0,), (1,), (2,), (3,), (4,)]
    await conn.aclose()


async def test_a_timeout_ends_nobodys_query(pg_dsn, holder) -> None:
    conn = await connect(pg_dsn)

    async def query() -> None:
        await conn.execute("SELECT pg_sleep(1)")

    async with anyio.create_task_group() as tg:
        with pytest.raises(LockTimeout):
            async with pg_lock(conn, 77, acquire_timeout=0.2):
                tg.start_soon(query)
                pytest.fail("granted")
        tg.start_soon(query)
        with pytest.raises(LockTimeout):
            async with pg_lock(conn, 77, acquire_timeout=0.2):
                pytest.fail("granted")
    assert conn.state is ConnectionState.OPEN
    await conn.aclose()


async def test_a_timeout_leaves_no_savepoint(pg_dsn, holder) -> None:
    conn = await connect(pg_dsn, autocommit=False)
    await conn.execute("SELECT 1")
    with pytest.raises(LockTimeout):
        async with pg_lock(conn, 77, acquire_timeout=0.05):
            pytest.fail("granted")
    with pytest.raises(psycopg.errors.InvalidSavepointSpecification):
        await conn.execute("RELEASE SAVEPOINT pgstructured_lock")
    await conn.aclose()


async def test_an_error_between_the_try_and_the_wait_does_not_close_it(pg_dsn, holder) -> None:
    """It is another task's turn there, in the same transaction."""
    conn = await connect(pg_dsn, autocommit=False)
    await conn.execute("SELECT 1")

    async def take() -> None:
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            async with pg_lock(conn, 77):
                pytest.fail("granted")

    async def fail() -> None:
        with pytest.raises(psycopg.errors.DivisionByZero):
            await conn.execute("SELECT 1/0")

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tg:
            async with hold_turn(conn):
                for task in (take, fail):
                    tg.start_soon(task)
                    await anyio.wait_all_tasks_blocked()
    assert conn.state is ConnectionState.OPEN
    await conn.aclose()

"""Locks of the caller's transaction."""

from __future__ import annotations

import anyio
import psycopg
import pytest

from pgstructured.driver import connect, open_connection
from pgstructured.errors import LockDeadlockError, LockError, LockKeyError
from pgstructured.locks import pg_lock, pg_try_lock, pg_try_xact_lock, pg_xact_lock
from pgstructured.testing import assert_cancellable


async def test_it_ends_with_the_transaction(pg_dsn, pg_cluster):
    async with open_connection(pg_dsn) as conn:
        async with conn.transaction():
            await pg_xact_lock(conn, "a")
            await pg_xact_lock(conn, (-1, 2), shared=True)
            assert len(pg_cluster.advisory_locks(pg_dsn)) == 2
            assert await pg_try_xact_lock(conn, "a")
            async with pg_try_lock(pg_dsn, "a") as lock:
                assert lock is None
        assert not pg_cluster.advisory_locks(pg_dsn)


async def test_try(pg_dsn):
    async with pg_lock(pg_dsn, 1, shared=True), open_connection(pg_dsn) as conn:
        async with conn.transaction():
            assert not await pg_try_xact_lock(conn, 1)
            assert await pg_try_xact_lock(conn, 1, shared=True)


async def test_without_autocommit_a_transaction_begins(pg_dsn, pg_cluster):
    conn = await connect(pg_dsn, autocommit=False)
    await pg_xact_lock(conn, 1)
    assert len(pg_cluster.advisory_locks(pg_dsn)) == 1
    await conn.rollback()
    assert not pg_cluster.advisory_locks(pg_dsn)
    await conn.aclose()


async def test_outside_of_a_transaction(pg_dsn):
    async with open_connection(pg_dsn) as conn:
        with pytest.raises(LockError, match="needs a transaction"):
            await pg_xact_lock(conn, 1)
        with pytest.raises(LockError, match="needs a transaction"):
            await pg_try_xact_lock(conn, 1)

        async def busy() -> None:
            await conn.execute("SELECT pg_sleep(0.1)")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(busy)
            await anyio.sleep(0.02)
            with pytest.raises(LockError, match="needs a transaction"):
                await pg_xact_lock(conn, 1)
        with pytest.raises(LockKeyError):
            await pg_xact_lock(conn, "")


async def test_cancelled(pg_dsn, gone, waiting):
    async with open_connection(pg_dsn) as conn:

        async def take() -> None:
            async with conn.transaction():
                await pg_xact_lock(conn, 1)

        await assert_cancellable(take)
        async with pg_lock(pg_dsn, 1), anyio.create_task_group() as tasks:
            tasks.start_soon(take)
            await waiting()
            tasks.cancel_scope.cancel()
        await gone(sessions=1)
        await conn.execute("SELECT 1")


async def test_deadlock(pg_cluster_private):
    dsn = pg_cluster_private.dsn()
    pg_cluster_private.execute("ALTER SYSTEM SET deadlock_timeout = '50ms'")
    pg_cluster_private.execute("SELECT pg_reload_conf()")
    both = anyio.Event()
    causes = []
    ready = 0

    async def cross(first: int, second: int) -> None:
        nonlocal ready
        async with open_connection(dsn) as conn:
            try:
                async with conn.transaction():
                    await pg_xact_lock(conn, first)
                    ready += 1
                    if ready == 2:
                        both.set()
                    await both.wait()
                    await pg_xact_lock(conn, second)
            except LockDeadlockError as exc:
                causes.append(exc.__cause__)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cross, 1, 2)
        tasks.start_soon(cross, 2, 1)
    assert [type(cause) for cause in causes] == [psycopg.errors.DeadlockDetected]

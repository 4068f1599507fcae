"""Locks on a pool: one connection for the block, and the pool none the worse for it."""

from __future__ import annotations

import anyio
import psycopg
import pytest

from pgstructured.errors import (
    DeliveryError,
    LockLost,
    LockNotHeldError,
    LockTimeout,
    PoolNestedAcquireError,
    PoolTimeoutError,
    SessionRequiredError,
)
from pgstructured.locks import open_locks, pg_lock
from pgstructured.notify import Notification, notify, open_notify_bus
from pgstructured.pool import open_pool

SOON = 15


async def pid_of(conn):
    cursor = await conn.execute("SELECT pg_backend_pid()")
    return (await cursor.fetchone())[0]


async def test_the_tasks_own_queries_run_under_it(pg_dsn):
    async with open_pool(pg_dsn, max_size=1) as pool:
        async with pg_lock(pool, "a") as lock:
            assert lock.connection is not None
            assert await pid_of(lock.connection) == lock.backend_pid
            async with pool.acquire() as conn:
                assert conn is lock.connection
            async with pool.transaction() as conn:
                assert conn is lock.connection
            async with pg_lock(pool, "b") as other:
                assert other.connection is lock.connection
            assert pool.statistics().in_use == 1
        assert pool.statistics().in_use == 0
        async with pool.acquire() as conn:
            assert conn is lock.connection
            with pytest.raises(PoolNestedAcquireError):
                async with pg_lock(pool, "a"):
                    raise AssertionError("entered")
            async with pg_lock(conn, "a"):
                pass
        async with pool.pin() as conn, pg_lock(pool, "a") as lock:
            assert lock.connection is conn


async def test_tasks_have_one_each(pg_dsn):
    async with open_pool(pg_dsn) as pool:
        order = []

        async def take():
            async with pg_lock(pool, "a") as lock:
                order.append(lock.backend_pid)
                await anyio.sleep(0.01)

        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(take)
        assert len(order) == 4
        assert pool.statistics().in_use == 0
        assert pool.statistics().closed_broken == 0


async def test_a_lost_one_is_replaced(pg_dsn, pg_cluster):
    async with open_pool(pg_dsn, min_size=1, max_size=1) as pool:
        with anyio.fail_after(SOON), pytest.raises(LockLost) as caught:
            async with pg_lock(pool, "a") as lock:
                pg_cluster.terminate_backend(lock.backend_pid)
                await anyio.sleep_forever()
        assert caught.value.reason == "terminated"
        assert lock.connection is not None
        assert lock.connection.closed
        async with pool.acquire() as conn:
            assert await pid_of(conn) != lock.backend_pid
        told = pool.statistics()
        assert (told.size, told.in_use, told.closed_broken) == (1, 0, 1)


async def test_a_pool_that_closes(pg_dsn):
    """Like a `Locks`, it cancels the bodies of other tasks."""
    reasons = []

    async def hold(pool, *, task_status):
        with pytest.raises(LockLost) as caught:
            async with pg_lock(pool, "a"):
                task_status.started()
                await anyio.sleep_forever()
        reasons.append(caught.value.reason)

    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            async with open_pool(pg_dsn, close_timeout=0.1) as pool:
                await tasks.start(hold, pool)
    assert reasons == ["closed"]
    assert pool.statistics().in_use == 0


async def test_time_limits(pg_dsn):
    """The lock's is for the connection and the lock; without one the pool's is for the first."""
    async with open_pool(pg_dsn, max_size=1, acquire_timeout=1) as pool:
        await pool.wait_ready()

        async def refused():
            with pytest.raises(LockTimeout):
                async with pg_lock(pool, "a", acquire_timeout=0.1):
                    raise AssertionError("entered")
            with pytest.raises(PoolTimeoutError):
                async with pg_lock(pool, "a"):
                    raise AssertionError("entered")

        async with pool.acquire(), anyio.create_task_group() as tasks:
            tasks.start_soon(refused)
        async with pg_lock(pg_dsn, "a"):
            pass
        async with pg_lock(pool, "a", acquire_timeout=10):
            pass
        assert pool.statistics().in_use == 0


async def test_detached(pg_dsn, pg_cluster):
    """Its connection stays with it, and is the pool's again after the release."""
    async with open_pool(pg_dsn, max_size=2) as pool:
        async with pg_lock(pool, "a") as lock:
            detached = lock.detach()
        told = pool.statistics()
        assert (told.size, told.in_use, told.idle) == (1, 1, 0)
        assert len(pg_cluster.advisory_locks(pg_dsn)) == 1
        async with pool.acquire() as conn:  # the task is free to
            assert conn is not lock.connection
        await detached.release()
        assert not pg_cluster.advisory_locks(pg_dsn)
        assert pool.statistics().in_use == 0
        assert pool.statistics().idle == 2
        with pytest.raises(LockNotHeldError):
            await detached.release()
        # Released within the block
        async with pg_lock(pool, "a") as lock:
            detached = lock.detach()
            await detached.release()
            assert pool.statistics().in_use == 1
        assert pool.statistics().in_use == 0
        # Lost
        async with pg_lock(pool, "a") as lock:
            detached = lock.detach()
        pg_cluster.terminate_backend(detached.backend_pid)
        with anyio.fail_after(SOON):
            assert (await detached.wait_lost()).reason == "terminated"
        assert pool.statistics().in_use == 0
        assert pool.statistics().closed_broken == 1
        # Lost within the block
        async with pg_lock(pool, "a") as lock:
            detached = lock.detach()
            pg_cluster.terminate_backend(detached.backend_pid)
            with anyio.fail_after(SOON):
                await detached.wait_lost()
            assert pool.statistics().in_use == 1
        assert pool.statistics().in_use == 0
        # With what its borrower has left
        async with pg_lock(pool, "a") as lock:
            assert lock.connection is not None
            await lock.connection.execute("LISTEN x")
            detached = lock.detach()
        await detached.release()
        assert pool.statistics().in_use == 0


async def test_a_detached_release_that_is_not_confirmed(pg_dsn, fault_proxy):
    async with open_pool(fault_proxy.dsn(pg_dsn)) as pool:
        async with pg_lock(pool, "a") as lock:
            detached = lock.detach()
        fault_proxy.freeze()
        with anyio.fail_after(SOON), pytest.raises(LockLost):
            await detached.release()
        assert lock.connection is not None
        assert lock.connection.closed
        assert pool.statistics().in_use == 0
        fault_proxy.thaw()


async def test_behind_a_transaction_pooler(pg_dsn, pgbouncer_transaction, pg_cluster):
    """On a session of its own past the pooler, if there is a way; else refused."""
    dsn = pgbouncer_transaction.dsn(pg_dsn)
    async with open_pool(dsn) as pool:
        with pytest.raises(SessionRequiredError, match="direct_conninfo"):
            async with pg_lock(pool, "a"):
                raise AssertionError("entered")
        assert pool.statistics().in_use == 0
        with pytest.raises(SessionRequiredError):
            async with open_locks(pool):
                raise AssertionError("entered")
        with pytest.raises(DeliveryError):
            async with open_notify_bus(pool):
                raise AssertionError("entered")
    async with open_pool(dsn, direct_conninfo=pg_dsn) as pool:
        async with pg_lock(pool, "a", acquire_timeout=10) as lock:
            assert lock.connection is not None
            assert await pid_of(lock.connection) == lock.backend_pid
            (held,) = pg_cluster.advisory_locks(pg_dsn)
            assert held.pid == lock.backend_pid
            async with pool.acquire() as conn:
                assert conn is not lock.connection
        assert not pg_cluster.advisory_locks(pg_dsn)
        assert lock.connection.closed
        async with pg_lock(pool, "a") as lock:
            detached = lock.detach()
        assert len(pg_cluster.advisory_locks(pg_dsn)) == 1
        await detached.release()
        assert lock.connection is not None
        assert lock.connection.closed
        with anyio.fail_after(SOON), pytest.raises(LockLost):
            async with pg_lock(pool, "a") as lock:
                detached = lock.detach()
                pg_cluster.terminate_backend(detached.backend_pid)
                raise await detached.wait_lost()
        async with open_locks(pool) as locks, locks.lock("a"):
            pass
        async with open_notify_bus(pool) as bus, bus.subscribe("c") as subscription:
            async with pool.acquire() as conn:
                await notify(conn, "c", "hello")
            with anyio.fail_after(SOON):
                received = await subscription.receive()
            assert isinstance(received, Notification)
            assert received.payload == "hello"


async def test_where_past_the_pooler_nobody_is(pg_dsn, pgbouncer_transaction):
    dsn = pgbouncer_transaction.dsn(pg_dsn)
    missing = psycopg.conninfo.make_conninfo(pg_dsn, dbname="no_such_db")
    async with open_pool(dsn, direct_conninfo=missing) as pool:
        with pytest.raises(psycopg.OperationalError) as caught:
            async with pg_lock(pool, "a", acquire_timeout=5):
                raise AssertionError("entered")
        assert caught.value.sqlstate == "3D000"
        assert pool.statistics().in_use == 0


async def test_a_pool_of_pooled_sessions(pg_dsn, pgbouncer_session, pg_cluster):
    async with open_pool(pgbouncer_session.dsn(pg_dsn), pooler="session") as pool:
        async with pg_lock(pool, "a"):
            assert len(pg_cluster.advisory_locks(pg_dsn)) == 1
        assert not pg_cluster.advisory_locks(pg_dsn)
        async with open_locks(pool) as locks, locks.lock("a"):
            assert len(pg_cluster.advisory_locks(pg_dsn)) == 1


async def test_sessions_of_their_own_where_the_pool_connects(pg_dsn):
    async with open_pool(pg_dsn) as pool:
        async with open_locks(pool) as locks, locks.lock("a"):
            assert pool.statistics().size == 0
        async with open_notify_bus(pool) as bus, bus.subscribe("c") as subscription:
            async with pool.acquire() as conn:
                await notify(conn, "c", "hello")
            with anyio.fail_after(SOON):
                received = await subscription.receive()
            assert isinstance(received, Notification)
            assert received.payload == "hello"

"""A fenced lock on the user's own connection whose token can't be had: nothing is left on it."""

from __future__ import annotations

import anyio
import psycopg
import pytest

from pgstructured.driver import ConnectionState, connect, open_connection
from pgstructured.errors import ConnectionLostError, FenceTableMissingError
from pgstructured.locks import LockKey

KEY = LockKey.bigint(1)
SOON = 20  # seconds that nothing here takes on any machine


async def take(conn, quick) -> None:
    async with quick(conn, KEY, fenced=True):
        raise AssertionError("it has no token")


@pytest.mark.parametrize("is_held_before", [False, True])
async def test_without_a_table(is_held_before, pg_dsn, pg_cluster, quick):
    """What was counted before stays counted."""
    async with open_connection(pg_dsn) as conn:
        if is_held_before:
            await conn.execute("SELECT pg_advisory_lock(1)")
        with pytest.raises(FenceTableMissingError, match="create_fence_table"):
            await take(conn, quick)
        assert conn.state is ConnectionState.OPEN
        assert len(pg_cluster.advisory_locks(pg_dsn)) == is_held_before
        if is_held_before:
            for is_held in (True, False):
                cursor = await conn.execute("SELECT pg_advisory_unlock(1)")
                assert await cursor.fetchone() == (is_held,)


async def test_cancelled_while_it_waits_for_a_token(guarded, bumping, pg_dsn, quick, gone):
    async with open_connection(pg_dsn) as conn:
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(take, conn, quick)
                await bumping()
                tasks.cancel_scope.cancel()
        assert conn.state is ConnectionState.OPEN
        await gone(sessions=2)
        assert await (await conn.execute("SELECT 1")).fetchone() == (1,)


async def test_its_transaction_goes_on(guarded, bumping, pg_cluster, pg_dsn, quick):
    async with open_connection(pg_dsn) as conn:

        async def lose() -> None:
            with pytest.raises(ConnectionLostError):
                await take(conn, quick)

        async with conn.transaction():
            await conn.execute("CREATE TABLE t ()")
            with anyio.fail_after(SOON):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(lose)
                    pg_cluster.terminate_backend(await bumping())
            assert not pg_cluster.advisory_locks(pg_dsn)
        await conn.execute("SELECT * FROM t")


async def test_under_another_tasks_query_it_is_closed(
    guarded, bumping, pg_cluster, pg_dsn, quick, gone
):
    """Nothing can be unlocked behind that; and the lock may not stay."""
    conn = await connect(pg_dsn)

    async def query() -> None:
        with pytest.raises(psycopg.OperationalError):
            await conn.execute("SELECT pg_sleep(60)")

    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as queries:
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(take, conn, quick)
                    await bumping()
                    queries.start_soon(query)
                    await anyio.wait_all_tasks_blocked()
                    scope.cancel()
            assert scope.cancelled_caught
            assert conn.state is ConnectionState.CLOSED
    await gone(sessions=1)


async def test_on_a_connection_that_is_lost_meanwhile(guarded, bumping, pg_cluster, pg_dsn, quick):
    conn = await connect(pg_dsn)
    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(take, conn, quick)
            await bumping()
            pg_cluster.terminate_backend(conn.info.backend_pid)
            tasks.cancel_scope.cancel()
    assert conn.state is not ConnectionState.OPEN

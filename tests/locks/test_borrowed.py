"""Locks on the user's own connection: counted as Postgres counts, and nothing else changed."""

from __future__ import annotations

from dataclasses import replace

import anyio
import psycopg
import pytest
from psycopg.rows import dict_row

from pgstructured.driver import ConnectionState, connect, open_connection
from pgstructured.errors import LockAlreadyHeldError, LockDeadlockError, LockLost, LockTimeout
from pgstructured.locks import pg_lock, pg_try_lock

from .conftest import PATIENT, SOON, hold


@pytest.fixture(params=[True, False], ids=["autocommit", "no autocommit"])
async def conn(request, pg_dsn):
    async with open_connection(pg_dsn, autocommit=request.param, row_factory=dict_row) as conn:
        yield conn


def status(conn) -> str:
    return str(conn.info.transaction_status.name)


async def test_it_counts(conn, pg_cluster, pg_dsn):
    async with pg_lock(conn, 1):
        async with pg_lock(conn, 1) as again:
            async with pg_try_lock(conn, 1) as third:
                assert third is not None
            await again.release()
            assert len(pg_cluster.advisory_locks(pg_dsn)) == 1
        async with pg_lock(conn, 1, shared=True):
            assert len(pg_cluster.advisory_locks(pg_dsn)) == 2
        assert len(pg_cluster.advisory_locks(pg_dsn)) == 1
    assert not pg_cluster.advisory_locks(pg_dsn)
    assert status(conn) == "IDLE"


async def test_queries_under_it(conn):
    async with pg_lock(conn, 1) as lock:
        assert lock.connection is not None
        cursor = await lock.connection.execute("SELECT 1 AS n")
        assert await cursor.fetchone() == {"n": 1}
        async with conn.transaction():
            await conn.execute("SELECT 2")
            await lock.refresh()
    assert conn.row_factory is dict_row


async def test_its_transaction_is_left_alone(conn, pg_dsn, waiting, pg_cluster):
    """Neither opened, nor ended, nor spoiled by a wait that ends badly."""
    async with pg_lock(conn, 2):
        assert status(conn) == "IDLE"

    async with anyio.create_task_group() as tasks:
        await tasks.start(hold, pg_lock(pg_dsn, 1))
        with pytest.raises(LockTimeout):
            async with pg_lock(conn, 1, acquire_timeout=0.1):
                raise AssertionError("not free")
        assert status(conn) == "IDLE"
        async with conn.transaction():
            await conn.execute("CREATE TABLE t ()")
            with pytest.raises(LockTimeout):
                async with pg_lock(conn, 1, acquire_timeout=0.1):
                    raise AssertionError("not free")
            assert status(conn) == "INTRANS"
            async with pg_lock(conn, 2):
                pass
            assert status(conn) == "INTRANS"
        tasks.cancel_scope.cancel()
    await conn.execute("SELECT * FROM t")
    # A session lock outlives a transaction, whatever ends that.
    async with pg_lock(conn, 3) as lock:
        async with conn.transaction(force_rollback=True):
            pass
        await lock.refresh()


async def test_granted_in_a_transaction(conn, pg_dsn, waiting):
    async def wait() -> None:
        async with conn.transaction(), pg_lock(conn, 1) as lock:
            assert lock.waited > 0

    async with anyio.create_task_group() as tasks, pg_lock(pg_dsn, 1):
        tasks.start_soon(wait)
        await waiting()


async def test_another_session_of_the_same_task(conn, pg_dsn):
    async with pg_lock(conn, 1):
        with pytest.raises(LockAlreadyHeldError):
            async with pg_lock(pg_dsn, 1):
                raise AssertionError("a deadlock")
    async with pg_lock(pg_dsn, 1):
        with pytest.raises(LockAlreadyHeldError):
            async with pg_lock(conn, 1):
                raise AssertionError("a deadlock")


async def test_tasks_that_share_a_connection(conn, pg_cluster, pg_dsn):
    """Counted for each; the last one unlocks."""

    async def take() -> None:
        async with pg_lock(conn, 1):
            await anyio.sleep(0.01)
            assert len(pg_cluster.advisory_locks(pg_dsn)) == 1

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(take)
    assert not pg_cluster.advisory_locks(pg_dsn)


async def test_every_lock_of_a_lost_connection_is_lost(pg_cluster, pg_dsn):
    losses: list[LockLost] = []
    conn = await connect(pg_dsn)
    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            for key in range(3):
                lock = await tasks.start(hold, pg_lock(conn, key), losses)
            pg_cluster.terminate_backend(lock.backend_pid)
    assert [loss.reason for loss in losses] == ["terminated"] * 3


async def test_the_watch_is_handed_on(pg_cluster, pg_dsn):
    """Who watched for the first lock stops with it; the second is watched all the same."""
    losses: list[LockLost] = []
    conn = await connect(pg_dsn)
    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            async with pg_lock(conn, 1):
                lock = await tasks.start(hold, pg_lock(conn, 2), losses)
            await anyio.sleep(0.02)
            pg_cluster.terminate_backend(lock.backend_pid)
    assert len(losses) == 1


async def test_deadlock(pg_cluster_private):
    dsn = pg_cluster_private.dsn()
    pg_cluster_private.execute("ALTER SYSTEM SET deadlock_timeout = '50ms'")
    pg_cluster_private.execute("SELECT pg_reload_conf()")
    causes = []
    both = anyio.Event()
    ready = 0

    async def cross(first: int, second: int) -> None:
        nonlocal ready
        async with open_connection(dsn) as conn, pg_lock(conn, first):
            ready += 1
            if ready == 2:
                both.set()
            await both.wait()
            try:
                async with pg_lock(conn, second):
                    pass
            except LockDeadlockError as exc:
                causes.append(exc.__cause__)
            assert conn.state is ConnectionState.OPEN

    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cross, 1, 2)
            tasks.start_soon(cross, 2, 1)
    assert [type(cause) for cause in causes] == [psycopg.errors.DeadlockDetected]


async def test_the_users_own_lock_timeout_counts(pg_dsn, gone):
    async with open_connection(pg_dsn, options="-c lock_timeout=100ms") as conn:
        refused = anyio.Event()

        async def wait() -> None:
            with pytest.raises(psycopg.errors.LockNotAvailable):
                async with pg_lock(conn, 1):
                    raise AssertionError("not free")
            refused.set()

        async with anyio.create_task_group() as tasks, pg_lock(pg_dsn, 1):
            tasks.start_soon(wait)
            with anyio.fail_after(SOON):
                await refused.wait()
        assert conn.state is ConnectionState.OPEN
        await gone(sessions=1)


async def test_what_can_not_be_used(pg_dsn):
    conn = await connect(pg_dsn)
    async with conn.transaction():
        with pytest.raises(psycopg.errors.DivisionByZero):
            async with conn.transaction():
                await conn.execute("SELECT 1/0")
        await conn.execute("SAVEPOINT s")
        with pytest.raises(psycopg.errors.SyntaxError):
            await conn.execute("SELEKT")
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            async with pg_lock(conn, 1):
                raise AssertionError("a failed transaction")
        await conn.execute("ROLLBACK TO s")
    async with conn.pipeline():
        with pytest.raises(psycopg.ProgrammingError, match="in a pipeline block"):
            async with pg_lock(conn, 1):
                raise AssertionError("a pipeline")
    await conn.aclose()
    with pytest.raises(psycopg.OperationalError, match="closed"):
        async with pg_lock(conn, 1):
            raise AssertionError("closed")


@pytest.mark.parametrize("how", ["hold", "cut"])
async def test_doubt_that_can_not_be_settled_closes_it(
    how, pg_dsn, fault_proxy, quick, waiting, gone, events
):
    """A wait that was cancelled may have been granted; here nobody can ask any more."""
    async with open_connection(fault_proxy.dsn(pg_dsn)) as conn:

        async def wait() -> None:
            async with quick(conn, 1):
                raise AssertionError("not free")

        async with pg_lock(pg_dsn, 1):
            with anyio.fail_after(SOON):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(wait)
                    await waiting()
                    # The cancelled wait still ends, but what it asks then has no answer.
                    fault_proxy.hold(b"57014")
                    getattr(fault_proxy, how)(b"pg_advisory_unlock", "up")
                    tasks.start_soon(_release_held, fault_proxy)
                    tasks.cancel_scope.cancel()
        assert conn.state is not ConnectionState.OPEN
        assert "lock.release_failed" in [name for name, _ in events]
    fault_proxy.release()
    await gone()


@pytest.mark.parametrize("how", ["block", "detached"])
async def test_an_answer_that_comes_late(how, pg_dsn, fault_proxy, quick, events, monkeypatch):
    """An unlock is not given up at once where that would cost the user's connection."""
    options = replace(PATIENT, release_timeout=8.0)
    monkeypatch.setattr("pgstructured.locks._borrowed.ConnectionGrip.patience", 0.1)

    async def answer() -> None:
        await anyio.to_thread.run_sync(fault_proxy.wait_held)
        await anyio.sleep(1.2)  # more than a tenth of it
        fault_proxy.release("down")

    async with open_connection(fault_proxy.dsn(pg_dsn), autocommit=True) as conn:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(answer)
            async with quick(conn, 1, options=options) as lock:
                fault_proxy.hold(b"true", "down")
                if how == "detached":
                    await lock.detach().release()
        assert conn.state is ConnectionState.OPEN
    assert [name for name, _ in events][-1] == "lock.released"


@pytest.mark.parametrize("patience", [0.75, 0.2])
async def test_an_unlock_waits_for_its_turn(patience, pg_dsn, quick, events, monkeypatch):
    """All the time there is; then it closes what another task works on."""
    monkeypatch.setattr("pgstructured.locks._borrowed.ConnectionGrip.patience", patience)
    options = replace(PATIENT, release_timeout=8.0)
    async with open_connection(pg_dsn, autocommit=True) as conn:
        async with anyio.create_task_group() as tasks, quick(conn, 1, options=options):
            tasks.start_soon(conn.execute, "SELECT pg_sleep(2.5)")
            await anyio.wait_all_tasks_blocked()
        assert conn.state is ConnectionState.OPEN
    assert [name for name, _ in events][-1] == "lock.released"


async def _release_held(proxy) -> None:
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(proxy.wait_held)
        proxy.release("down")

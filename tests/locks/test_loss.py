"""A lock that is lost: noticed, said why, its body cancelled, and nothing covered up."""

# Bodies that block the event loop are a part of what is tested; fixtures are many.

from __future__ import annotations

import time
from typing import Any, cast

import anyio
import psycopg
import pytest

from pgstructured.driver import ConnectionState, connect, open_connection
from pgstructured.errors import LockLost, LockNotHeldError
from pgstructured.locks import pg_lock, pg_try_lock
from pgstructured.locks._options import LockOptions

ON_CONNECTIONS = pytest.mark.parametrize(
    "source", ["connection", "unwatched connection"], indirect=True
)
SOON = 25  # seconds that nothing here takes on any machine


async def test_terminated(source, pg_cluster, events):
    told: list[LockLost] = []

    async def watch(lock) -> None:
        told.append(await lock.wait_lost())

    async with anyio.create_task_group() as tasks:
        with anyio.fail_after(SOON), pytest.raises(LockLost) as caught:
            async with pg_lock(source, 1) as lock:
                tasks.start_soon(watch, lock)
                await anyio.sleep(0.01)
                pg_cluster.terminate_backend(lock.backend_pid)
                await anyio.sleep_forever()
    error = caught.value
    assert error.reason == told[0].reason == "terminated"
    assert error.sqlstate == "57P01"
    assert error.certain
    assert error.held_for > 0
    assert error.last_confirmed >= lock.acquired_at - SOON
    assert error.__cause__ is None
    assert "lost after" in str(error)
    assert "terminating connection" in str(error)
    assert lock.is_lost
    assert "lost" in repr(lock)
    assert (await lock.wait_lost()).reason == "terminated"
    with pytest.raises(LockLost):
        await lock.release()
    names = [name for name, _ in events]
    assert names == ["lock.acquire_started", "lock.acquired", "lock.lost"]
    assert events[-1][1]["reason"] == "terminated"
    assert events[-1][1]["sqlstate"] == "57P01"


async def test_a_try_is_watched_the_same_way(source, pg_cluster):
    with anyio.fail_after(SOON), pytest.raises(LockLost):
        async with pg_try_lock(source, 1) as lock:
            assert lock is not None
            pg_cluster.terminate_backend(lock.backend_pid)
            await anyio.sleep_forever()


@pytest.fixture(params=["conninfo", "connection"])
async def private(request, pg_cluster_private):
    """Each kind of source on a server that may be broken."""
    dsn = pg_cluster_private.dsn()
    if request.param == "conninfo":
        yield dsn
    else:
        async with open_connection(dsn) as conn:
            yield conn


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_server_shut_down(private, pg_cluster_private, mode):
    with anyio.fail_after(SOON), pytest.raises(LockLost) as caught:
        async with pg_lock(private, 1):
            await anyio.to_thread.run_sync(pg_cluster_private.restart, mode)
            await anyio.sleep_forever()
    if mode == "immediate" and caught.value.sqlstate is None:
        # Seen on bare sockets too: in every third case or so a server that is stopped like
        # this goes without a word.
        assert caught.value.reason == "disconnected"
    else:
        assert caught.value.reason == "terminated"
        assert caught.value.sqlstate == "57P01"


async def test_backend_crash(private, pg_cluster_private):
    other = pg_cluster_private.dsn()
    losses = {}

    async def hold(source, key, *, task_status) -> None:
        try:
            async with pg_lock(source, key) as lock:
                task_status.started(lock.backend_pid)
                await anyio.sleep_forever()
        except LockLost as exc:
            losses[key] = exc

    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            pid = await tasks.start(hold, private, "killed")
            beside = await tasks.start(hold, other, "beside it")
            # Its answer is here, but it may still be sending; then it would go without a word.
            waits = "SELECT wait_event = 'ClientRead' FROM pg_stat_activity WHERE pid = %s"
            execute = pg_cluster_private.execute
            while execute(waits, [beside]) != [(True,)]:  # noqa: ASYNC110 - it is the server's
                await anyio.sleep(0.01)
            pg_cluster_private.kill_backend(pid)
    assert losses["killed"].reason == "disconnected"
    assert losses["killed"].sqlstate is None
    assert losses["killed"].certain
    assert losses["beside it"].reason == "crashed"
    assert losses["beside it"].sqlstate == "57P02"


@pytest.mark.parametrize("how", ["reset", "fin"])
@pytest.mark.parametrize("kind", ["conninfo", "connection"])
async def test_disconnected(kind, how, pg_dsn, fault_proxy, gone):
    async def lose(source) -> None:
        with anyio.fail_after(SOON), pytest.raises(LockLost) as caught:
            async with pg_lock(source, 1):
                getattr(fault_proxy, how)()
                await anyio.sleep_forever()
        assert caught.value.reason == "disconnected"
        assert caught.value.certain

    dsn = fault_proxy.dsn(pg_dsn)
    if kind == "conninfo":
        await lose(dsn)
    else:
        async with open_connection(dsn) as conn:
            await lose(conn)
    await gone()


@pytest.mark.parametrize("direction", ["up", "down", "both"])
async def test_frozen_network(direction, pg_cluster, pg_dsn, fault_proxy, hasty, gone, events):
    with anyio.fail_after(SOON), pytest.raises(LockLost, match="no sign of life") as caught:
        async with hasty(fault_proxy.dsn(pg_dsn), 1) as lock:
            fault_proxy.freeze(direction)
            try:
                await anyio.sleep_forever()
            finally:
                # The server still has it: nobody else could be inside until now.
                assert len(pg_cluster.advisory_locks(pg_dsn)) == 1
    assert caught.value.reason == "unconfirmed"
    assert not caught.value.certain
    assert caught.value.sqlstate is None
    assert anyio.current_time() - caught.value.last_confirmed >= 0.6
    assert lock.is_lost
    fault_proxy.thaw()
    await gone()
    assert "lock.release_failed" not in [name for name, _ in events]


async def test_frozen_network_under_a_refresh(pg_dsn, fault_proxy, hasty):
    """A refresh in another task than the body's is not left waiting."""

    async def refresh(lock) -> None:
        with pytest.raises(LockLost):
            await lock.refresh()

    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks:
            with pytest.raises(LockLost) as caught:
                async with hasty(fault_proxy.dsn(pg_dsn), 1) as lock:
                    fault_proxy.freeze()
                    tasks.start_soon(refresh, lock)
                    await anyio.sleep_forever()
            assert caught.value.reason == "unconfirmed"
    fault_proxy.thaw()


async def test_frozen_backend(pg_cluster_private, hasty):
    """A false alarm, but a safe one: the lock is still held there."""
    dsn = pg_cluster_private.dsn()
    with anyio.fail_after(SOON), pytest.raises(LockLost) as caught:
        async with hasty(dsn, 1) as lock:
            pid = lock.backend_pid
            pg_cluster_private.freeze(pid)
            await anyio.sleep_forever()
    assert caught.value.reason == "unconfirmed"
    pg_cluster_private.thaw(pid)


async def test_a_quiet_network_is_no_loss(pg_dsn, quick):
    options = LockOptions(heartbeat=0.15, lost_after=1.5, server_timeout=3.0)
    async with quick(pg_dsn, 1, options=options) as lock:
        confirmed = lock.last_confirmed
        with anyio.fail_after(SOON):
            while lock.last_confirmed < confirmed + 1.7:
                await anyio.sleep(0.05)
                lock.assert_held()


async def test_a_blocked_loop_is_judged_by_the_clock(pg_dsn, hasty):
    with pytest.raises(LockLost) as caught:
        async with hasty(pg_dsn, 1):
            time.sleep(0.8)
    assert caught.value.reason == "unconfirmed"


async def test_the_connections_own_heartbeat(pg_dsn, fault_proxy):
    async with open_connection(
        fault_proxy.dsn(pg_dsn), heartbeat=0.1, heartbeat_timeout=1.0
    ) as conn:
        with anyio.fail_after(SOON), pytest.raises(LockLost) as caught:
            async with pg_lock(conn, 1):
                fault_proxy.freeze()
                await anyio.sleep_forever()
    assert caught.value.reason == "unconfirmed"
    assert not caught.value.certain
    fault_proxy.thaw()


@ON_CONNECTIONS
@pytest.mark.parametrize(
    ("setting", "sqlstate"),
    [("idle_session_timeout", "57P05"), ("idle_in_transaction_session_timeout", "25P03")],
)
async def test_idle_timeouts_of_the_users_session(source, setting, sqlstate):
    with anyio.fail_after(SOON), pytest.raises(LockLost) as caught:
        async with pg_lock(source, 1):
            await source.execute(f"SET {setting} = '80ms'")
            if sqlstate == "25P03":
                await source.execute("BEGIN")
            await anyio.sleep_forever()
    assert caught.value.reason == "idle_timeout"
    assert caught.value.sqlstate == sqlstate


async def test_timeouts_of_the_database_do_no_harm(pg_cluster, pg_dsn, quick, waiting):
    name = pg_dsn.rsplit("/", 1)[1]
    for setting in ("statement_timeout", "lock_timeout", "idle_session_timeout"):
        pg_cluster.execute(f"ALTER DATABASE {name} SET {setting} = '100ms'")

    async def second() -> None:
        async with quick(pg_dsn, 1, acquire_timeout=SOON):
            await anyio.sleep(0.3)

    async with anyio.create_task_group() as tasks:
        async with quick(pg_dsn, 1):
            tasks.start_soon(second)
            await waiting()
            await anyio.sleep(0.3)


@ON_CONNECTIONS
async def test_closed_connection(source):
    with anyio.fail_after(SOON), pytest.raises(LockLost) as caught:
        async with pg_lock(source, 1) as lock:
            await source.aclose()
            await anyio.sleep_forever()
    assert caught.value.reason == "closed"
    assert caught.value.certain
    with pytest.raises(LockLost):
        await lock.refresh()


@ON_CONNECTIONS
@pytest.mark.parametrize("noticed_by", ["the end", "refresh", "release"])
async def test_unlocked_behind_its_back(source, noticed_by):
    with pytest.raises(LockLost) as caught:
        async with pg_lock(source, 1) as lock:
            await source.execute("SELECT pg_advisory_unlock_all()")
            lock.assert_held()  # nobody knows yet
            if noticed_by != "the end":
                with pytest.raises(LockLost):
                    await getattr(lock, noticed_by)()
                if noticed_by == "refresh":
                    await anyio.sleep_forever()
    assert caught.value.reason == "closed"
    assert source.state is ConnectionState.OPEN


# ---------------------------------------------------------------- bodies


async def test_a_body_that_shields_itself(source, pg_cluster):
    steps: list[str] = []
    with anyio.fail_after(SOON), pytest.raises(LockLost):
        async with pg_lock(source, 1) as lock:
            with anyio.CancelScope(shield=True):
                pg_cluster.terminate_backend(lock.backend_pid)
                await lock.wait_lost()
                steps.append("went on")
                with pytest.raises(LockLost):
                    lock.assert_held()
            await anyio.lowlevel.checkpoint()
            steps.append("not here")
    assert steps == ["went on"]


async def test_a_body_that_has_finished(source, pg_cluster, events):
    """The loss is on the socket, unread; whoever did the work has to know."""
    with pytest.raises(LockLost) as caught:
        async with pg_lock(source, 1) as lock:
            pg_cluster.terminate_backend(lock.backend_pid)
            time.sleep(0.1)
    assert caught.value.reason == "terminated"
    names = [name for name, _ in events]
    assert names == ["lock.acquire_started", "lock.acquired", "lock.lost"]


async def test_release_of_a_lock_that_is_gone(source, pg_cluster):
    with pytest.raises(LockLost):
        async with pg_lock(source, 1) as lock:
            pg_cluster.terminate_backend(lock.backend_pid)
            time.sleep(0.1)
            with pytest.raises(LockLost):
                await lock.release()
            # A loss that nobody could know of at its release is told at the end as well.


async def test_the_bodys_error_is_the_cause(source, pg_cluster):
    with anyio.fail_after(SOON), pytest.raises(LockLost) as caught:
        async with pg_lock(source, 1) as lock:
            pg_cluster.terminate_backend(lock.backend_pid)
            try:
                await anyio.sleep_forever()
            finally:
                raise ValueError("mine")
    assert isinstance(caught.value.__cause__, ValueError)


async def test_the_bodys_error_before_the_loss_was_known_is_the_cause(source, pg_cluster):
    with anyio.fail_after(SOON), pytest.raises(LockLost) as caught:
        async with pg_lock(source, 1) as lock:
            pg_cluster.terminate_backend(lock.backend_pid)
            time.sleep(0.1)
            raise ValueError("mine")
    assert isinstance(caught.value.__cause__, ValueError)


async def test_an_error_group_of_the_body_is_the_cause(source, pg_cluster):
    async def fail() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError("mine")

    with anyio.fail_after(SOON), pytest.raises(LockLost) as caught:
        async with pg_lock(source, 1) as lock, anyio.create_task_group() as tasks:
            tasks.start_soon(fail)
            await anyio.lowlevel.checkpoint()
            pg_cluster.terminate_backend(lock.backend_pid)
            await anyio.sleep_forever()
    cause = caught.value.__cause__
    assert isinstance(cause, ExceptionGroup)
    assert cause.subgroup(ValueError) is not None


@pytest.mark.parametrize("first", ["loss", "cancellation"])
async def test_a_cancellation_from_outside_wins(source, pg_cluster, first, events):
    with anyio.fail_after(SOON), anyio.CancelScope() as outer:
        async with pg_lock(source, 1) as lock:
            if first == "cancellation":
                outer.cancel()
            with anyio.CancelScope(shield=True):
                pg_cluster.terminate_backend(lock.backend_pid)
                await lock.wait_lost()
            outer.cancel()
            await anyio.sleep_forever()
        raise AssertionError("not reached")
    assert outer.cancelled_caught
    assert [name for name, _ in events][-1] == "lock.lost"


async def test_a_cancellation_that_comes_while_the_body_ends_wins(source, pg_cluster):
    with anyio.fail_after(SOON), anyio.CancelScope() as outer:
        async with pg_lock(source, 1) as lock:
            pg_cluster.terminate_backend(lock.backend_pid)
            try:
                await anyio.sleep_forever()
            finally:
                outer.cancel()
        raise AssertionError("not reached")
    assert outer.cancelled_caught


async def test_a_cancellation_that_the_body_never_met_comes_later(source, pg_cluster):
    with anyio.CancelScope() as outer:
        with pytest.raises(LockLost):
            async with pg_lock(source, 1) as lock:
                with anyio.CancelScope(shield=True):
                    pg_cluster.terminate_backend(lock.backend_pid)
                    await lock.wait_lost()
                    outer.cancel()
        await anyio.lowlevel.checkpoint()
        raise AssertionError("not reached")
    assert outer.cancelled_caught


async def test_native_cancellation_wins(source, pg_cluster, anyio_backend_name, gone):
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no other")
    import asyncio

    async def hold() -> None:
        async with pg_lock(source, 1) as lock:
            pg_cluster.terminate_backend(lock.backend_pid)
            try:
                await anyio.sleep_forever()
            finally:
                cast("Any", asyncio.current_task()).cancel()
                await asyncio.sleep(0)

    task = asyncio.ensure_future(hold())
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
    await gone(beside=source)


async def test_native_cancellation_releases(source, anyio_backend_name, gone):
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no other")
    import asyncio

    async def hold() -> None:
        async with pg_lock(source, 1):
            cast("Any", asyncio.current_task()).cancel()
            await anyio.sleep_forever()

    task = asyncio.ensure_future(hold())
    with pytest.raises(asyncio.CancelledError):
        await task
    await gone(beside=source)


# ---------------------------------------------------------------- release


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("kind", ["conninfo", "connection"])
async def test_release_without_an_answer(kind, early, pg_dsn, fault_proxy, quick, gone, events):
    async def release(source) -> None:
        with anyio.fail_after(SOON):
            async with quick(source, 1) as lock:
                fault_proxy.freeze("down")
                if early:
                    await lock.release()
                    with pytest.raises(LockNotHeldError):
                        lock.assert_held()

    dsn = fault_proxy.dsn(pg_dsn)
    if kind == "conninfo":
        await release(dsn)
    else:
        conn = await connect(dsn)
        await release(conn)
        assert conn.state is not ConnectionState.OPEN
    assert [name for name, _ in events][-1] == "lock.release_failed"
    await gone()
    fault_proxy.thaw()


async def test_release_without_an_answer_after_the_ttl(pg_dsn, fault_proxy, quick, gone, events):
    with anyio.fail_after(SOON), pytest.raises(LockLost) as caught:
        async with quick(fault_proxy.dsn(pg_dsn), 1, ttl=0.05):
            fault_proxy.freeze("down")
            await anyio.sleep_forever()
    assert caught.value.reason == "expired"
    assert [name for name, _ in events][-1] == "lock.release_failed"
    await gone()
    fault_proxy.thaw()


@ON_CONNECTIONS
async def test_release_in_a_transaction_that_failed(source, gone, events):
    """Postgres refuses it; only the end of the session can release."""
    with pytest.raises(psycopg.errors.DivisionByZero):
        async with source.transaction(), pg_lock(source, 1):
            await source.execute("SELECT 1/0")
    assert source.state is not ConnectionState.OPEN
    assert events[-1][0] == "lock.release_failed"
    assert isinstance(events[-1][1]["error"], psycopg.errors.InFailedSqlTransaction)
    await gone()


@ON_CONNECTIONS
async def test_refresh_in_a_transaction_that_failed(source):
    async with pg_lock(source, 1) as lock:
        await source.execute("BEGIN")
        with pytest.raises(psycopg.errors.DivisionByZero):
            await source.execute("SELECT 1/0")
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            await lock.refresh()
        lock.assert_held()
        await source.execute("ROLLBACK")
        await lock.refresh()

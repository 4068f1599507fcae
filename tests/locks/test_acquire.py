"""Taking a lock: cancelled, failed, raced, retried; and nothing of it left on the server."""

# Fixtures are many here, and a process that is only started does not block for long.

from __future__ import annotations

import random
import time

import anyio
import psycopg
import pytest

from pgstructured import locks
from pgstructured.driver import ConnectionState, connect, open_connection, open_session
from pgstructured.errors import (
    ConninfoError,
    LockCapacityError,
    LockTimeout,
    NotPrimaryError,
    SessionRequiredError,
)
from pgstructured.locks import pg_lock, pg_try_lock
from pgstructured.locks._options import LockOptions
from pgstructured.testing import Cluster, FaultProxy

SOON = 25  # seconds that nothing here takes on any machine


@pytest.mark.parametrize("contended", [False, True])
@pytest.mark.parametrize("kind", ["conninfo", "connection", "in a transaction"])
async def test_cancelled_at_every_await(kind, contended, cancel_at, pg_dsn, waiting, gone):
    """Of taking, holding and releasing: no lock and no waiting session is left."""

    async def take(source) -> None:
        async with pg_lock(source, 1) as lock:
            await anyio.lowlevel.checkpoint()
            await lock.refresh()

    async def take_on(source, other) -> None:
        if kind == "in a transaction":
            async with source.transaction():
                await take(source)
        else:
            await take(source)

    async def hold(*, task_status) -> None:
        async with pg_lock(pg_dsn, 1):
            task_status.started()
            await waiting()

    number = 0
    is_over = False
    while not is_over:
        assert number < 300
        async with open_connection(pg_dsn) as conn:
            source = pg_dsn if kind == "conninfo" else conn
            with anyio.fail_after(SOON):
                async with anyio.create_task_group() as tasks:
                    if contended:
                        await tasks.start(hold)
                    with anyio.CancelScope() as scope:
                        await cancel_at(take_on(source, conn), scope, number)
                    tasks.cancel_scope.cancel()
            # Where the cancellation has come too late to matter, there is nothing more to try.
            is_over = not scope.cancel_called
            assert conn.state is ConnectionState.OPEN
            await gone(sessions=1)
            assert (await (await conn.execute("SELECT 1")).fetchone()) == (1,)
        number += 1
    assert number > 2


@pytest.mark.parametrize("kind", ["conninfo", "connection"])
async def test_grant_and_cancellation_race(kind, pg_cluster, pg_dsn, waiting, gone):
    """Whoever wins, the loser leaves nothing; the server's refusal alone would prove nothing."""
    seed = 20260
    rng = random.Random(seed)
    won = lost = 0
    async with open_session(pg_dsn) as holder, open_connection(pg_dsn) as conn:

        async def wait(source, scope: anyio.CancelScope) -> None:
            nonlocal won, lost
            was_granted = False
            with scope:  # which may also end the release, after a grant
                async with pg_lock(source, 1):
                    was_granted = True
            won += was_granted
            lost += not was_granted

        number, window = 0, 0.002
        while number < 60 or (not (won and lost) and number < 200):
            await holder.execute("SELECT pg_advisory_lock(1)")
            scope, won_before = anyio.CancelScope(), won
            with anyio.fail_after(SOON):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(wait, pg_dsn if kind == "conninfo" else conn, scope)
                    await waiting()
                    holder.send([("SELECT pg_advisory_unlock(1)", ())])
                    # Around the time that the grant takes to come back.
                    until = time.perf_counter() + rng.uniform(0, window)
                    while time.perf_counter() < until:
                        await anyio.lowlevel.checkpoint()
                    scope.cancel()
            await gone(sessions=2)
            assert conn.state is ConnectionState.OPEN, f"seed {seed}, round {number}"
            # To where they meet, on whatever machine.
            window *= 0.9 if won > won_before else 1.1
            number += 1
    assert won + lost == number
    assert won > 0
    assert lost > 0


@pytest.mark.parametrize("kind", ["conninfo", "connection"])
async def test_timeout_and_grant_race(kind, pg_dsn, waiting, gone):
    rng = random.Random(7)
    limit = 0.08
    outcomes: list[str] = []
    async with open_session(pg_dsn) as holder, open_connection(pg_dsn) as conn:

        async def wait() -> None:
            try:
                async with pg_lock(source, 1, acquire_timeout=limit):
                    outcomes.append("had it")
            except LockTimeout:
                outcomes.append("timed out")

        source = pg_dsn if kind == "conninfo" else conn
        while len(outcomes) < 25 or (len(set(outcomes)) < 2 and len(outcomes) < 60):
            await holder.execute("SELECT pg_advisory_lock(1)")
            with anyio.fail_after(SOON):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(wait)
                    await anyio.sleep(rng.uniform(0.05, 0.11))
                    holder.send([("SELECT pg_advisory_unlock(1)", ())])
            # To where they meet, on whatever machine.
            limit *= 0.9 if outcomes[-1] == "had it" else 1.1
            await gone(sessions=2)
            assert conn.state is ConnectionState.OPEN
    assert set(outcomes) == {"had it", "timed out"}


# ---------------------------------------------------------------- a network that is gone


@pytest.mark.parametrize("kind", ["conninfo", "connection"])
@pytest.mark.parametrize("direction", ["up", "down", "both"])
async def test_cancelled_while_frozen(kind, direction, pg_dsn, fault_proxy, quick, waiting, gone):
    """Returns within release_timeout (a connection: and its close) though nothing answers."""
    dsn = fault_proxy.dsn(pg_dsn)

    async def wait(source, *, task_status) -> None:
        with anyio.CancelScope() as scope:
            task_status.started(scope)
            async with quick(source, 1):
                raise AssertionError("not free")

    async with pg_lock(pg_dsn, 1):
        conn = await connect(dsn)
        async with anyio.create_task_group() as tasks:
            scope = await tasks.start(wait, dsn if kind == "conninfo" else conn)
            await waiting()
            fault_proxy.freeze(direction)
            began = anyio.current_time()
            scope.cancel()
        assert anyio.current_time() - began < 10  # though the network is silent still
        fault_proxy.thaw()
        await conn.aclose()
    await gone(within=SOON)


async def test_cancelled_while_connecting_to_nobody(pg_dsn, fault_proxy, gone):
    fault_proxy.freeze()
    with anyio.move_on_after(0.1) as scope:
        async with pg_lock(fault_proxy.dsn(pg_dsn), 1):
            raise AssertionError("not reached")
    assert scope.cancelled_caught
    fault_proxy.thaw()
    await gone()


async def test_a_try_on_a_frozen_connection(pg_dsn, fault_proxy, quick, gone):
    """The try is let come to its end, but not for ever."""
    async with open_connection(fault_proxy.dsn(pg_dsn)) as conn:
        await conn.execute("SELECT 1")
        fault_proxy.freeze("down")
        with anyio.fail_after(SOON), anyio.move_on_after(0.1) as scope:
            async with quick(conn, 1):
                raise AssertionError("no answer")
        assert scope.cancelled_caught
        assert conn.state is ConnectionState.FAILED
    fault_proxy.thaw()
    await gone()


# ---------------------------------------------------------------- connecting


async def test_connecting_is_tried_again(pg_dsn, fault_proxy):
    fault_proxy.refuse()

    async def accept() -> None:
        await anyio.sleep(0.2)
        fault_proxy.accept()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(accept)
        async with pg_lock(fault_proxy.dsn(pg_dsn), 1, acquire_timeout=SOON):
            pass
        fault_proxy.refuse()
        tasks.start_soon(accept)
        async with pg_try_lock(fault_proxy.dsn(pg_dsn), 1) as lock:
            assert lock is not None


async def test_connecting_ends_with_the_time(pg_dsn, fault_proxy, quick):
    fault_proxy.refuse()
    dsn = fault_proxy.dsn(pg_dsn)
    for limit in (0, 0.2):
        with pytest.raises(LockTimeout, match="for want of a session") as caught:
            async with quick(dsn, 1, acquire_timeout=limit):
                raise AssertionError("nobody there")
        assert isinstance(caught.value.__cause__, psycopg.OperationalError)
    with pytest.raises(psycopg.OperationalError) as failed:
        async with quick(dsn, 1, options=LockOptions(connect_timeout=1.0)):
            raise AssertionError("nobody there")
    # Or its time was over in the middle of an attempt.
    timed_out = isinstance(failed.value, psycopg.errors.ConnectionTimeout)
    assert timed_out or "refused" in str(failed.value)
    fault_proxy.accept()
    fault_proxy.freeze()
    with pytest.raises(LockTimeout) as caught:
        async with quick(dsn, 1, acquire_timeout=0.2):
            raise AssertionError("nobody there")
    assert isinstance(caught.value.__cause__, psycopg.errors.ConnectionTimeout)
    fault_proxy.thaw()


async def test_malformed_conninfo():
    with pytest.raises(ConninfoError):
        async with pg_lock("host=a nonsense=b", 1):
            raise AssertionError("never")


async def test_conninfo_from_a_callable(pg_dsn, fault_proxy, quick):
    asked = 0

    async def conninfo() -> str:
        nonlocal asked
        asked += 1
        return str(pg_dsn if asked > 2 else fault_proxy.dsn(pg_dsn))

    fault_proxy.refuse()
    async with pg_lock(conninfo, 1):
        assert asked == 3  # at each attempt anew

    async def never() -> str:
        await anyio.sleep_forever()
        raise AssertionError

    with pytest.raises(LockTimeout):
        async with pg_lock(never, 1, acquire_timeout=0.1):
            raise AssertionError("never")

    async def fail() -> str:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        async with pg_lock(fail, 1):
            raise AssertionError("never")


async def test_a_waiter_that_is_killed_queues_anew(pg_cluster, pg_dsn, waiting, gone):
    async def wait() -> None:
        async with pg_lock(pg_dsn, 1) as lock:
            assert lock.backend_pid not in killed

    async def next_waiter() -> int:
        while True:
            (waiter,) = await waiting()
            if waiter.pid not in killed:
                return int(waiter.pid)
            await anyio.sleep(0.01)

    killed: list[int] = []
    with anyio.fail_after(2 * SOON):
        async with anyio.create_task_group() as tasks:
            async with pg_lock(pg_dsn, 1):
                tasks.start_soon(wait)
                for _ in range(2):
                    killed.append(await next_waiter())
                    pg_cluster.terminate_backend(killed[-1])
                await next_waiter()
    await gone()


async def test_a_waiter_on_the_users_connection_that_is_killed(pg_cluster, pg_dsn, waiting):
    """There is no other session to queue on."""

    async def wait() -> None:
        async with open_connection(pg_dsn) as conn:
            with pytest.raises(psycopg.errors.AdminShutdown):
                async with pg_lock(conn, 1):
                    raise AssertionError("not free")

    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks, pg_lock(pg_dsn, 1):
            tasks.start_soon(wait)
            (waiter,) = await waiting()
            pg_cluster.terminate_backend(waiter.pid)
            await waiting(0)


async def test_a_wait_that_an_administrator_cancels(source, pg_cluster, pg_dsn, waiting, gone):
    async def wait() -> None:
        with pytest.raises(psycopg.errors.QueryCanceled):
            async with pg_lock(source, 1):
                raise AssertionError("not free")

    with anyio.fail_after(SOON):
        async with anyio.create_task_group() as tasks, pg_lock(pg_dsn, 1):
            tasks.start_soon(wait)
            (waiter,) = await waiting()
            pg_cluster.execute("SELECT pg_cancel_backend(%s)", [waiter.pid])
            await waiting(0)
    await gone(beside=source)


# ---------------------------------------------------------------- servers that won't do


async def test_lock_table_full():
    settings = {"max_connections": "10", "max_locks_per_transaction": "10"}
    with (
        Cluster(settings=settings) as cluster,
        FaultProxy(cluster.host, cluster.port) as proxy,
        psycopg.connect(cluster.dsn(), autocommit=True) as full,
    ):

        async def take(source) -> None:
            with pytest.raises(LockCapacityError, match="max_locks_per_transaction") as caught:
                async with pg_lock(source, -1):
                    raise AssertionError("full")
            assert isinstance(caught.value.__cause__, psycopg.errors.OutOfMemory)

        async with open_connection(cluster.dsn()) as conn, anyio.create_task_group() as tasks:
            # Connecting needs the table too: it is filled only then.
            proxy.hold(b"pg_try_advisory_lock", "up")
            tasks.start_soon(take, proxy.dsn(cluster.dsn()))
            await anyio.to_thread.run_sync(proxy.wait_held)
            with pytest.raises(psycopg.errors.OutOfMemory):
                for first in range(0, 10**6, 500):
                    full.execute(
                        "SELECT pg_advisory_lock(n) FROM generate_series(%s::int8, %s) n",
                        [first, first + 499],
                    )
            proxy.release()
            await take(conn)
            assert conn.state is ConnectionState.OPEN


async def test_standby_and_primary():
    with Cluster() as primary:
        standby = primary.standby()
        async with open_connection(standby.dsn()) as conn:
            for source in (standby.dsn(), conn):
                for open_lock in (pg_lock, pg_try_lock):
                    with pytest.raises(NotPrimaryError, match="connect to the primary"):
                        async with open_lock(source, 1):
                            raise AssertionError("a standby")
            async with conn.transaction():
                with pytest.raises(NotPrimaryError):
                    await locks.pg_xact_lock(conn, 1)
            assert not standby.advisory_locks("postgres")
        both = (
            f"host={standby.host},{primary.host} port={standby.port},{primary.port}"
            " user=postgres dbname=postgres"
        )
        async with pg_lock(both, 1):
            assert len(primary.advisory_locks("postgres")) == 1


async def test_transaction_pooler(pg_dsn, pgbouncer_transaction):
    dsn = pgbouncer_transaction.dsn(pg_dsn)
    with pytest.raises(SessionRequiredError, match="transaction pooler"):
        async with pg_lock(dsn, 1):
            raise AssertionError("no session")
    async with open_connection(dsn) as conn:
        with pytest.raises(SessionRequiredError):
            async with pg_lock(conn, 1):
                raise AssertionError("no session")
        async with conn.transaction():
            await locks.pg_xact_lock(conn, 1)


async def test_session_pooler(pg_dsn, pgbouncer_session, pg_cluster):
    dsn = pgbouncer_session.dsn(pg_dsn)
    async with open_connection(dsn, pooler="session") as conn:
        async with pg_lock(conn, 1) as lock:
            (held,) = pg_cluster.advisory_locks(pg_dsn)
            assert held.pid == lock.backend_pid


# ---------------------------------------------------------------- the session


async def test_the_session_of_its_own(pg_cluster, pg_dsn, monkeypatch):
    async with pg_lock(pg_dsn, 1):
        (session,) = pg_cluster.sessions(pg_dsn)
        assert session.application_name == "pgstructured/locks"
        assert session.state == "idle"
    async with pg_lock(f"{pg_dsn}?application_name=mine&connect_timeout=3", 1):
        (session,) = pg_cluster.sessions(pg_dsn)
        assert session.application_name == "mine"
    # libpq's own environment counts as well
    monkeypatch.setenv("PGTARGETSESSIONATTRS", "any")
    monkeypatch.setenv("PGHOST", f"{pg_cluster.host},{pg_cluster.host}")
    monkeypatch.setenv("PGPORT", str(pg_cluster.port))
    name = pg_dsn.rsplit("/", 1)[1]
    async with pg_lock(f"user=postgres dbname={name}", 1):
        pass


async def test_over_a_unix_socket(pg_cluster, pg_dsn):
    name = pg_dsn.rsplit("/", 1)[1]
    dsn = f"host={pg_cluster.socket_directory} port={pg_cluster.port} user=postgres dbname={name}"
    async with pg_lock(dsn, 1) as lock:
        await lock.refresh()


async def test_the_client_that_vanished_loses_its_place_in_the_queue(pg_dsn, waiting):
    """SIGKILL of a process that waits: the server notices, without being granted first."""
    import subprocess
    import sys

    program = (
        "import anyio, sys\n"
        "from pgstructured.locks import pg_lock\n"
        "async def main():\n"
        "    async with pg_lock(sys.argv[1], 1): pass\n"
        "anyio.run(main)\n"
    )
    async with pg_lock(pg_dsn, 1):
        process = subprocess.Popen([sys.executable, "-c", program, pg_dsn])
        try:
            await waiting(1)
        finally:
            process.kill()
            process.wait()
        await waiting(0)  # at most client_connection_check_interval later

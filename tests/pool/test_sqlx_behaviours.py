"""What sqlx's pool does and tests, one test each, in our form.

From its ``tests/any/pool.rs``, the tests of pools, COPY and locks in
``tests/postgres/postgres.rs``, and what its ``PoolOptions`` and ``Pool`` say. Where ours does
otherwise on purpose the test is of ours, and its text says why.
"""

from __future__ import annotations

import random
from typing import Any

import anyio
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgstructured.errors import (
    LockTimeout,
    PoolClosedError,
    PoolTimeoutError,
    TooManyWaitingError,
)
from pgstructured.locks import pg_lock, pg_try_lock
from pgstructured.notify import open_notify_bus
from pgstructured.pool import open_pool

# ------------------------------------------------------------ tests/any/pool.rs


async def test_pool_should_invoke_after_connect(pg_dsn):
    """Once for each connection; theirs releases later and may connect twice, ours doesn't."""
    calls = []

    async def on_connect(conn):
        calls.append(conn)

    async with open_pool(pg_dsn, on_connect=on_connect) as pool:
        for _ in range(4):
            async with pool.acquire() as conn:
                assert calls == [conn]


async def test_pool_should_be_returned_failed_transactions(pg_dsn, kit):
    async with open_pool(pg_dsn, max_size=2, acquire_timeout=3) as pool:
        for _ in range(3):
            with pytest.raises(psycopg.errors.SyntaxError):
                async with pool.transaction() as conn:
                    await conn.execute("blah blah")
        assert pool.statistics().opened == 1
        assert kit.held(pool) == (0, 0, 0)


async def test_pool_callbacks(pg_dsn, kit):
    """Their order, and that they may refuse a connection.

    Hooks of ours are given the connection alone: ages are the pool's business. They refuse it
    by closing it, not by a result, so that to forget a ``return`` refuses nothing. And
    ``on_acquire`` is called for a connection that has just been made, too: a hook that says
    whose turn it is must not leave out the first.
    """
    made = iter(range(100))
    numbers: dict[Any, int] = {}

    async def count(conn, column):
        await conn.execute(f"UPDATE conn_stats SET {column} = {column} + 1")
        return await kit.fetch(conn, f"SELECT {column} FROM conn_stats")

    async def on_connect(conn):
        numbers[conn] = number = next(made)
        await conn.execute(
            "CREATE TEMP TABLE conn_stats (id int, acquired int DEFAULT 0, released int DEFAULT 0)"
        )
        await conn.execute("INSERT INTO conn_stats (id) VALUES (%s)", (number,))

    async def on_acquire(conn):
        calls = await count(conn, "acquired")
        if numbers[conn] % 2 == 0 and calls >= 3:
            await conn.close()

    async def on_release(conn):
        calls = await count(conn, "released")
        if numbers[conn] % 2 == 1 and calls >= 4:
            await conn.close()

    pattern = [
        (0, 1, 0),
        (0, 2, 1),
        (1, 1, 0),  # that of an even number was refused
        (1, 2, 1),
        (1, 3, 2),
        (1, 4, 3),
        (2, 1, 0),  # that of an odd number did not come back
        (2, 2, 1),
        (3, 1, 0),
    ]
    async with open_pool(
        pg_dsn, max_size=1, on_connect=on_connect, on_acquire=on_acquire, on_release=on_release
    ) as pool:
        for expected in pattern:
            async with pool.acquire() as conn:
                cursor = await conn.execute("SELECT * FROM conn_stats")
                assert await cursor.fetchone() == expected
        assert kit.held(pool) == (0, 0, 0)
        assert pool.statistics().opened == 4


async def test_connection_maintenance(pg_dsn, kit):
    """Past their lifetime they are closed in the background, and min_size is kept."""
    async with open_pool(pg_dsn, max_lifetime=0.4, min_size=3) as pool:
        await kit.borrow_at_once(pool, 5)
        old = {member.conn for member in pool._lender.ledger.idle}
        await kit.eventually(lambda: all(conn.closed for conn in old))
        await kit.eventually(lambda: pool.statistics().size == 3)
        async with pool.acquire() as conn:
            assert conn not in old


# ------------------------------------------------------------ tests/postgres/postgres.rs


async def test_it_executes_with_pool(pg_dsn):
    """Ours lends connections and runs nothing itself: a statement has a block around it."""
    async with open_pool(pg_dsn) as pool, pool.acquire() as conn:
        cursor = await conn.execute("SELECT 1; SELECT 2")
        assert await cursor.fetchone() == (1,)
        assert cursor.nextset()
        assert await cursor.fetchone() == (2,)


async def test_it_can_fail_and_recover_with_pool(pg_dsn, kit):
    async with open_pool(pg_dsn) as pool:
        for number in range(10):
            with pytest.raises(psycopg.errors.SyntaxError):
                async with pool.acquire() as conn:
                    await conn.execute("INSERT INTO not_found (column) VALUES (10)")
            async with pool.acquire() as conn:
                assert await kit.fetch(conn, "SELECT %s::int", (number,)) == number
        assert pool.statistics().opened == 1


async def test_pool_smoke_test(pg_dsn, kit):
    """More tasks than connections, and some that ask and give up: nobody starves."""
    turns = [0] * 100
    async with open_pool(pg_dsn, min_size=1, max_size=1) as pool:
        async with anyio.create_task_group() as tasks:

            async def work(index):
                for _ in range(4):
                    async with pool.acquire() as conn:
                        await conn.execute("SELECT 1 + 1")
                    turns[index] += 1
                    assert max(turns) - min(turns) <= 2  # it is fair

            async def give_up():
                while min(turns) < 4:
                    with anyio.CancelScope() as scope:
                        tasks.start_soon(cancel, scope)
                        async with pool.acquire():
                            pass
                    await anyio.sleep(0.01)

            async def cancel(scope):
                scope.cancel()

            for index in range(100):
                tasks.start_soon(work, index)
            for _ in range(10):
                tasks.start_soon(give_up)
        told = pool.statistics()
        assert told.acquire_cancelled
        assert (told.opened, told.idle) == (1, 1)
        assert kit.held(pool) == (0, 0, 0)


async def test_issue_622(pg_dsn):
    """Tasks that acquire again right after they have released wait for each other, not for ever."""
    done = []
    async with open_pool(pg_dsn, max_size=1, acquire_timeout=10) as pool:

        async def work():
            async with pool.acquire() as conn:
                await conn.execute("SELECT 1")
            async with pool.acquire():
                done.append(1)

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(work)
    assert len(done) == 3


async def test_listener_cleanup(pg_dsn, kit):
    """Who listens on a connection of the pool leaves it as it was, with nothing to be received."""
    async with open_pool(pg_dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            await conn.execute("LISTEN test_channel")
            await conn.execute("NOTIFY test_channel")
        async with pool.acquire() as again:
            assert again is conn
            await again.execute("NOTIFY test_channel")
            assert [n async for n in again.notifies(timeout=0.05)] == []


async def test_pg_listener_allows_pool_to_close(pg_dsn, kit):
    """A listener holds none of the pool's connections here, so there is nothing to wait for."""
    async with anyio.create_task_group() as tasks:
        with anyio.fail_after(kit.soon):
            async with open_pool(pg_dsn, close_timeout=60) as pool:

                async def listen(*, task_status):
                    async with open_notify_bus(pool) as bus, bus.subscribe("c") as subscription:
                        task_status.started()
                        await subscription.receive()

                await tasks.start(listen)
                assert pool.statistics().size == 0
        tasks.cancel_scope.cancel()


async def test_advisory_locks(pg_dsn, pg_cluster):
    """Locks on the pool's connections; what SQL has locked, and not unlocked, the pool unlocks."""
    async with open_pool(pg_dsn, max_size=2) as pool:
        async with pool.pin() as first, pg_lock(pool, "1") as lock:
            assert lock.connection is first
            async with pg_lock(pool, "2") as other:  # one session may hold several
                assert other.connection is first

                async def compete():
                    async with pg_try_lock(pool, "1") as none:
                        assert none is None
                    with pytest.raises(LockTimeout):
                        async with pg_lock(pool, "2", acquire_timeout=0.05):
                            raise AssertionError("entered")

                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(compete)
            assert len(pg_cluster.advisory_locks(pg_dsn)) == 1
        async with pool.acquire() as conn:
            await conn.execute("SELECT pg_advisory_lock(1), pg_advisory_lock(2)")
        assert not pg_cluster.advisory_locks(pg_dsn)
        assert pool.statistics().closed_broken == 0


async def test_it_can_work_with_failed_transactions(pg_dsn, kit):
    """One that a time limit has ended, not a mistake."""
    async with open_pool(pg_dsn, max_size=1) as pool:
        with pytest.raises(psycopg.errors.QueryCanceled):
            async with pool.transaction() as conn:
                await conn.execute("SELECT set_config('statement_timeout', '50ms', true)")
                await conn.execute("SELECT 1 WHERE pg_sleep(0.3) IS NULL")
        async with pool.acquire() as again:
            assert again is conn
            assert await kit.fetch(again, "SELECT 1") == 1


async def test_copy_can_work_with_failed_transactions(pg_dsn, kit):
    async with open_pool(pg_dsn, max_size=1) as pool:
        with pytest.raises(psycopg.errors.QueryCanceled):
            async with pool.transaction() as conn:
                await conn.execute("SELECT set_config('statement_timeout', '50ms', true)")
                async with conn.copy_out(
                    "COPY (SELECT 1 FROM generate_series(1, 100) WHERE pg_sleep(0.1) IS NULL)"
                    " TO STDOUT"
                ) as copy:
                    async for _ in copy:
                        pass
        async with pool.acquire() as again:
            assert again is conn
            assert await kit.fetch(again, "SELECT 1") == 1


async def test_it_can_drop_multiple_transactions(pg_dsn, kit):
    """Begun and forgotten, again and again: nothing of it stays."""
    async with open_pool(pg_dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            await conn.execute("CREATE TABLE users (id int PRIMARY KEY)")
        for _ in range(2):
            async with pool.acquire() as conn:
                await conn.execute("BEGIN")
                await conn.execute("INSERT INTO users VALUES (20)")
            async with pool.acquire() as conn:
                assert await kit.fetch(conn, "SELECT count(*) FROM users") == 0


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("COPY nonexistent (id) FROM STDIN WITH (FORMAT CSV, HEADER)", "UndefinedTable"),
        ("", "ProgrammingError"),  # nothing is run
        ("COPY FROM STDIN WITH (FORMAT CSV)", "SyntaxError"),
        ("COPY target FROM STDIN WITH (FORMAT CSV, INVALID_PARAM true)", "SyntaxError"),
    ],
    ids=["missing_table", "empty_query", "syntax_error", "invalid_params"],
)
async def test_it_can_recover_from_copy_in(pg_dsn, kit, statement, error):
    async with open_pool(pg_dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            await conn.execute("CREATE TABLE target (id int)")
        with pytest.raises(psycopg.ProgrammingError) as caught:
            async with pool.acquire() as conn, conn.copy_in(statement):
                raise AssertionError("entered")
        assert type(caught.value).__name__ == error
        async with pool.acquire() as again:
            assert again is conn
            assert await kit.fetch(again, "SELECT 1 + 1") == 2


# ------------------------------------------------------------ Pool


async def test_connect_lazy(pg_dsn, fault_proxy, pg_cluster):
    """The only way here: to insist on a connection is a call of its own."""
    fault_proxy.refuse()
    async with open_pool(fault_proxy.dsn(pg_dsn), acquire_timeout=1.5) as pool:
        assert not pg_cluster.sessions(pg_dsn)
        with pytest.raises(PoolTimeoutError, match="refused"):
            await pool.wait_ready()
        fault_proxy.accept()
        await pool.wait_ready()


async def test_try_acquire(pg_dsn):
    """``max_waiting=0``; where there is room this one connects, for a task of its own."""
    async with open_pool(pg_dsn, max_size=1, max_waiting=0) as pool, pool.acquire():

        async def refused():
            with pytest.raises(TooManyWaitingError):
                async with pool.acquire():
                    raise AssertionError("entered")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(refused)


async def test_begin(pg_dsn, kit):
    async with open_pool(pg_dsn) as pool:
        with pytest.raises(KeyError):
            async with pool.transaction() as conn:
                await conn.execute("CREATE TABLE t ()")
                raise KeyError
        async with pool.transaction() as conn:
            assert await kit.fetch(conn, "SELECT to_regclass('t')") is None


async def test_size_and_num_idle(pg_dsn, kit):
    async with open_pool(pg_dsn) as pool:
        await kit.borrow_at_once(pool, 3)
        async with pool.acquire():
            told = pool.statistics()
            assert (told.size, told.idle, told.in_use) == (3, 2, 1)


async def test_close_wakes_who_waits_and_waits_for_who_borrows(pg_dsn, kit):
    """For ``close_timeout`` seconds; theirs waits for ever, ours then closes what is left."""
    told = []

    async def wait(pool):
        with pytest.raises(PoolClosedError):
            async with pool.acquire():
                raise AssertionError("entered")
        told.append("waiter")

    async def borrow(pool, *, task_status):
        async with pool.acquire() as conn:
            task_status.started()
            await kit.eventually(lambda: told)
            assert await kit.fetch(conn, "SELECT 1") == 1
            told.append("borrower")

    async with anyio.create_task_group() as tasks:
        async with open_pool(pg_dsn, max_size=1, close_timeout=kit.soon) as pool:
            await tasks.start(borrow, pool)
            tasks.start_soon(wait, pool)
            await kit.eventually(lambda: pool.statistics().tasks_waiting == 1)
        assert told == ["waiter", "borrower"]
    with pytest.raises(PoolClosedError):
        async with pool.acquire():
            raise AssertionError("entered")


async def test_close_event(pg_dsn, kit):
    """No event to watch: what runs on a connection when the time is over is ended, and told so."""

    async def sleep(pool, *, task_status):
        with pytest.raises(PoolClosedError):
            async with pool.acquire() as conn:
                task_status.started()
                await conn.execute("SELECT pg_sleep(86400)")

    async with anyio.create_task_group() as tasks:
        with anyio.fail_after(kit.soon):
            async with open_pool(pg_dsn, close_timeout=0) as pool:
                await tasks.start(sleep, pool)


async def test_set_connect_options(pg_dsn, kit):
    """A conninfo that is asked for each time, and ``drain`` for what is connected already."""
    name = "old"

    async def conninfo():
        return make_conninfo(pg_dsn, application_name=name)

    async with open_pool(conninfo, max_size=1) as pool:
        async with pool.acquire() as conn:
            name = "new"
            assert await kit.fetch(conn, "SHOW application_name") == "old"
        await pool.drain()
        async with pool.acquire() as conn:
            assert await kit.fetch(conn, "SHOW application_name") == "new"


# ------------------------------------------------------------ PoolOptions


async def test_min_connections(pg_dsn, pg_cluster, kit):
    """Kept, also when one dies; gone with the pool."""
    async with open_pool(pg_dsn, min_size=2) as pool:
        await pool.wait_ready()
        pg_cluster.terminate_backend(pool._lender.ledger.idle[0].conn.info.backend_pid)
        await kit.eventually(lambda: not pool._lender.ledger.idle[0].session.is_quiet())
        await pool.check()
        assert pool.statistics().idle == 2
    await kit.eventually(lambda: not pg_cluster.sessions(pg_dsn))


async def test_max_connections(pg_dsn, pg_cluster):
    most = 0
    async with open_pool(pg_dsn, max_size=3) as pool:

        async def work():
            nonlocal most
            for _ in range(5):
                async with pool.acquire() as conn:
                    await conn.execute("SELECT 1")
                    most = max(most, len(pg_cluster.sessions(pg_dsn)))

        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(work)
    assert most == 3


async def test_acquire_timeout(pg_dsn):
    """For the waiting and the connecting, with why; theirs tells only that time was out."""
    async with open_pool(pg_dsn, max_size=1, acquire_timeout=1) as pool, pool.acquire():

        async def wait():
            with pytest.raises(PoolTimeoutError, match="1 of 1 connections in use") as caught:
                async with pool.acquire():
                    raise AssertionError("entered")
            assert caught.value.__cause__ is None

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)


async def test_acquire_retries_while_the_server_is_down(pg_dsn, fault_proxy, kit):
    async with open_pool(fault_proxy.dsn(pg_dsn), acquire_timeout=kit.soon) as pool:
        fault_proxy.refuse()
        async with anyio.create_task_group() as tasks:

            async def acquire():
                async with pool.acquire() as conn:
                    assert await kit.fetch(conn, "SELECT 1") == 1

            tasks.start_soon(acquire)
            await kit.eventually(lambda: pool.statistics().connect_errors >= 2)
            fault_proxy.accept()


async def test_test_before_acquire(pg_dsn, pg_cluster, kit):
    """Asking each time is ``check_after_idle=0``; that a session has ended is seen without."""
    async with open_pool(pg_dsn, check_after_idle=0, max_size=1) as pool:
        async with pool.acquire() as first:
            pass
        pg_cluster.terminate_backend(first.info.backend_pid)
        async with pool.acquire() as second:
            assert second is not first
            assert await kit.fetch(second, "SELECT 1") == 1


async def test_after_connect_fails(pg_dsn, kit):
    """Theirs logs it and tries again until time is out; a mistake of a hook's is told at once here.

    What ends the connection under it is a failed attempt, and tried again.
    """
    calls = []

    async def on_connect(conn):
        calls.append(conn)
        if len(calls) == 1:
            raise KeyError("a mistake")
        if len(calls) == 2:
            await conn.close()

    async with open_pool(pg_dsn, on_connect=on_connect) as pool:
        with pytest.raises(KeyError, match="a mistake"):
            async with pool.acquire():
                raise AssertionError("entered")
        async with pool.acquire() as conn:
            assert await kit.fetch(conn, "SELECT 1") == 1
        assert len(calls) == 3
        assert pool.statistics().connect_errors == 1


async def test_before_acquire_fails(pg_dsn, kit):
    """Theirs takes the next connection; here the hook's error is the borrower's, once."""
    calls = []

    async def on_acquire(conn):
        calls.append(conn)
        if len(calls) == 1:
            raise KeyError("a mistake")

    async with open_pool(pg_dsn, max_size=1, on_acquire=on_acquire) as pool:
        with pytest.raises(KeyError, match="a mistake"):
            async with pool.acquire():
                raise AssertionError("entered")
        assert calls[0].closed
        async with pool.acquire() as conn:
            assert conn is not calls[0]
        assert kit.held(pool) == (0, 0, 0)


async def test_before_acquire_refuses_for_ever(pg_dsn, kit):
    """Until the time for the acquire is over."""

    async def on_acquire(conn):
        await conn.close()

    async with open_pool(pg_dsn, max_size=1, acquire_timeout=0.3, on_acquire=on_acquire) as pool:
        with anyio.fail_after(kit.soon), pytest.raises(PoolTimeoutError):
            async with pool.acquire():
                raise AssertionError("entered")
        assert kit.held(pool) == (0, 0, 0)


async def test_after_release_refuses(pg_dsn, kit):
    """The connection is closed, and the borrower is not bothered."""

    async def on_release(conn):
        await conn.close()

    async with open_pool(pg_dsn, max_size=1, on_release=on_release) as pool:
        for opened in (1, 2):
            async with pool.acquire() as conn:
                pass
            assert conn.closed
            assert pool.statistics().opened == opened
        assert kit.held(pool) == (0, 0, 0)


async def test_max_lifetime_on_release(pg_dsn, kit):
    async with open_pool(pg_dsn, max_lifetime=0.5) as pool:
        async with pool.acquire() as conn:
            (member,) = pool._lender.ledger.borrowed
            await anyio.sleep_until(member.expires_at + 0.01)
        assert conn.closed
        assert pool.statistics().closed_expired == 1


async def test_idle_timeout(pg_dsn, kit):
    async with open_pool(pg_dsn, max_idle=0.05) as pool:
        await kit.borrow_at_once(pool, 3)
        await kit.eventually(lambda: pool.statistics().size == 0)
        assert pool.statistics().closed_expired == 3


# ------------------------------------------------------------ cancellation


async def test_a_dropped_acquire_gives_its_permit_back(pg_dsn, kit):
    """Whenever it is dropped; theirs may close a connection over it, ours doesn't."""
    chance = random.Random(11)
    async with open_pool(pg_dsn, max_size=2, check_after_idle=0) as pool:

        async def acquire():
            with anyio.move_on_after(chance.uniform(0, 0.004)):
                async with pool.acquire():
                    await anyio.sleep(0.001)

        for _ in range(20):
            async with anyio.create_task_group() as tasks:
                for _ in range(10):
                    tasks.start_soon(acquire)
            assert kit.held(pool) == (0, 0, 0)
        assert pool.statistics().closed_broken == 0
        await kit.borrow_at_once(pool, 2)  # both may be had


async def test_a_dropped_transaction_of_a_cancelled_task(pg_dsn, fault_proxy, kit):
    """Its issue 4393, a cancelled BEGIN that poisoned the pool: at each await of one."""
    number = 0
    is_over = False
    async with open_pool(fault_proxy.dsn(pg_dsn), max_size=1) as pool:
        await pool.wait_ready()
        fault_proxy.delay(0.01)  # so that BEGIN, the query and COMMIT have to be waited for
        while not is_over:
            with anyio.CancelScope() as scope:

                async def use():
                    async with pool.transaction() as conn:
                        await conn.execute("SELECT 1")

                await kit.cancel_at(use(), scope, number)
            is_over = not scope.cancel_called
            async with pool.transaction() as conn:
                assert await kit.fetch(conn, "SELECT 1") == 1
            number += 1
        assert number > 3
        assert pool.statistics().opened == 1
        fault_proxy.delay(0)


async def test_closed_by_its_borrower(pg_dsn, kit):
    """Their ``close_on_drop`` and ``detach``: what the borrower has closed is replaced."""
    async with open_pool(pg_dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            await conn.close()
        assert kit.held(pool) == (0, 0, 0)
        async with pool.acquire() as other:
            assert await kit.fetch(other, "SELECT 1") == 1

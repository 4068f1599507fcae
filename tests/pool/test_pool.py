"""Borrowing and giving back: bounds, order, limits, and what a connection is like afterwards."""

from __future__ import annotations

from typing import Any, cast

import anyio
import psycopg
import pytest
from psycopg.rows import dict_row

from pgstructured.driver import ConnectionState
from pgstructured.errors import (
    PoolClosedError,
    PoolNestedAcquireError,
    PoolTimeoutError,
    TooManyWaitingError,
)
from pgstructured.pool import Pool, open_pool
from pgstructured.testing import assert_cancellable


async def test_it_is_lazy(pg_dsn, pg_cluster, events, kit):
    async with open_pool(pg_dsn, name="web", namespace="tenant") as pool:
        assert not pg_cluster.sessions(pg_dsn)
        assert pool.name == "web/tenant"
        async with pool.acquire() as conn:
            cursor = await conn.execute("SELECT current_setting('application_name')")
            assert await cursor.fetchone() == ("pgstructured/web/tenant",)
            assert conn.autocommit
            told = pool.statistics()
            assert (told.size, told.idle, told.in_use, told.opened) == (1, 0, 1, 1)
        told = pool.statistics()
        assert (told.size, told.idle, told.in_use, told.acquired) == (1, 1, 0, 1)
        assert told.use_seconds >= 0
        assert "1 idle" in repr(pool)
    await kit.eventually(lambda: not pg_cluster.sessions(pg_dsn))
    names = [name for name, _ in events]
    assert names == [
        "pool.connected",
        "pool.acquired",
        "pool.released",
        "pool.connection_closed",
    ]
    assert events[-1][1] == {"pool": "web/tenant", "reason": "closed"}


async def test_an_application_name_of_ones_own(pg_dsn, kit):
    async with open_pool(pg_dsn, application_name="mine") as pool, pool.acquire() as conn:
        assert await kit.fetch(conn, "SELECT current_setting('application_name')") == "mine"
    async with (
        open_pool(f"{pg_dsn}?application_name=theirs", name="x") as pool,
        pool.acquire() as conn,
    ):
        assert await kit.fetch(conn, "SELECT current_setting('application_name')") == "theirs"
        assert pool.name == "x"


async def test_it_is_bounded_and_shared(way, kit):
    """Never more than max_size, whoever comes; each borrower alone with its connection."""
    async with open_pool(way.dsn, max_size=3, **way.options) as pool:
        users = {}

        async def work():
            for _ in range(20):
                async with pool.acquire() as conn:
                    assert id(conn) not in users
                    users[id(conn)] = conn
                    assert await kit.fetch(conn, "SELECT 1") == 1
                    del users[id(conn)]

        async with anyio.create_task_group() as tasks:
            for _ in range(12):
                tasks.start_soon(work)
        told = pool.statistics()
        assert told.acquired == 240
        assert told.opened == told.size == told.idle <= 3
        assert kit.held(pool) == (0, 0, 0)
        assert told.acquire_wait_seconds > 0


async def test_waiters_are_served_first_come_first_served(pg_dsn, kit):
    order = []
    async with open_pool(pg_dsn, max_size=1) as pool:

        async def wait(index):
            async with pool.acquire():
                order.append(index)

        async with anyio.create_task_group() as tasks, pool.acquire():
            for index in range(10):
                tasks.start_soon(wait, index)
                await kit.eventually(lambda n=index: pool.statistics().tasks_waiting == n + 1)
        assert order == list(range(10))


async def test_nobody_overtakes_who_waits(pg_dsn, kit):
    """A connection that comes back is a waiter's, also if its borrower asks at once for another."""
    order = []
    async with open_pool(pg_dsn, max_size=1) as pool:

        async def wait():
            async with pool.acquire():
                order.append("waiter")

        async with anyio.create_task_group() as tasks:
            async with pool.acquire():
                tasks.start_soon(wait)
                await kit.eventually(lambda: pool.statistics().tasks_waiting == 1)
            async with pool.acquire():
                order.append("again")
    assert order == ["waiter", "again"]


async def test_the_one_used_last_is_given_first(pg_dsn, kit):
    async with open_pool(pg_dsn) as pool:
        ready = anyio.Event()
        pids = []

        async def borrow(event):
            async with pool.acquire() as conn:
                pids.append(conn.info.backend_pid)
                await event.wait()

        last = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(borrow, ready)
            await kit.eventually(lambda: len(pids) == 1)
            tasks.start_soon(borrow, last)
            await kit.eventually(lambda: len(pids) == 2)
            ready.set()
            await kit.eventually(lambda: pool.statistics().idle == 1)
            last.set()
        async with pool.acquire() as conn:
            assert conn.info.backend_pid == pids[1]


async def test_acquiring_twice_in_one_task_is_refused_at_once(pg_dsn):
    async with open_pool(pg_dsn, max_size=2) as pool:
        async with pool.acquire():
            with pytest.raises(PoolNestedAcquireError, match="holds a connection"):
                async with pool.acquire():
                    raise AssertionError("entered")
            with pytest.raises(PoolNestedAcquireError):
                async with pool.transaction():
                    raise AssertionError("entered")
            with pytest.raises(PoolNestedAcquireError):
                async with pool.pin():
                    raise AssertionError("entered")

            async def other():
                async with pool.acquire():
                    pass

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(other)
        async with pool.acquire():
            pass


async def test_one_loan_for_one_block(pg_dsn):
    async with open_pool(pg_dsn) as pool:
        loan = pool.acquire()
        async with loan:
            pass
        with pytest.raises(RuntimeError, match="entered already"):
            async with loan:
                raise AssertionError("entered")


async def test_exhaustion(pg_dsn, kit, events):
    async with open_pool(pg_dsn, max_size=1, acquire_timeout=1) as pool, pool.acquire():

        async def wait():
            with pytest.raises(PoolTimeoutError) as caught:
                async with pool.acquire():
                    raise AssertionError("entered")
            assert caught.value.__cause__ is None
            assert "within 1 s: 1 of 1 connections in use" in str(caught.value)
            assert isinstance(caught.value, TimeoutError)

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(wait)
        told = pool.statistics()
        assert told.acquire_timeouts == 3
        assert told.tasks_waiting == 0
    assert [name for name, _ in events].count("pool.acquire_timed_out") == 3


async def test_no_limit_to_waiting(pg_dsn, kit):
    async with open_pool(pg_dsn, max_size=1, acquire_timeout=None) as pool:
        done = []

        async def wait():
            async with pool.acquire():
                done.append(1)

        async with anyio.create_task_group() as tasks, pool.acquire():
            tasks.start_soon(wait)
            await kit.eventually(lambda: pool.statistics().tasks_waiting == 1)
        assert done


async def test_only_so_many_may_wait(pg_dsn, kit):
    async with open_pool(pg_dsn, max_size=1, max_waiting=1) as pool:

        async def wait():
            async with pool.acquire():
                pass

        async def refused():
            with pytest.raises(TooManyWaitingError, match="1 tasks wait"):
                async with pool.acquire():
                    raise AssertionError("entered")

        async with anyio.create_task_group() as tasks, pool.acquire():
            tasks.start_soon(wait)
            await kit.eventually(lambda: pool.statistics().tasks_waiting == 1)
            async with anyio.create_task_group() as others:
                others.start_soon(refused)


async def test_nobody_may_wait(pg_dsn):
    async with open_pool(pg_dsn, max_size=1, max_waiting=0) as pool:

        async def refused():
            with pytest.raises(TooManyWaitingError):
                async with pool.acquire():
                    raise AssertionError("entered")

        async with pool.acquire(), anyio.create_task_group() as tasks:
            tasks.start_soon(refused)


# ------------------------------------------------------------ as it was


async def test_a_transaction_that_is_open_is_rolled_back(way, kit):
    async with open_pool(way.dsn, max_size=1, **way.options) as pool:
        async with pool.acquire() as conn:
            await conn.execute("CREATE TABLE t (i int)")
            await conn.set_autocommit(False)
            await conn.execute("INSERT INTO t VALUES (1)")
        async with pool.acquire() as again:
            assert again is conn
            assert again.autocommit
            assert await kit.fetch(again, "SELECT count(*) FROM t") == 0
            await again.execute("BEGIN")
            with pytest.raises(psycopg.errors.UndefinedTable):
                await again.execute("SELECT * FROM missing")
        async with pool.acquire() as third:
            assert third is conn
            assert third.info.transaction_status.name == "IDLE"
        assert pool.statistics().closed_broken == 0


async def test_settings_of_the_borrower_are_set_back(pg_dsn):
    async with open_pool(pg_dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            before = conn.row_factory
            conn.row_factory = dict_row
            conn.prepare_threshold = 0
            conn.prepared_max = 3
            conn.cursor_factory = psycopg.AsyncClientCursor
            conn.server_cursor_factory = psycopg.AsyncRawServerCursor
            await conn.set_autocommit(False)
            await conn.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE)
            await conn.set_read_only(True)
            await conn.set_deferrable(True)
            conn.add_notify_handler(print)
            conn.add_notice_handler(print)
            await conn.execute("SELECT 1")
        async with pool.acquire() as again:
            assert again is conn
            assert again.row_factory is before
            assert again.prepare_threshold == 5
            assert again.prepared_max == 100
            assert again.cursor_factory is psycopg.AsyncCursor
            assert again.server_cursor_factory is psycopg.AsyncServerCursor
            assert again.autocommit
            assert again.isolation_level is None
            assert again.read_only is None
            assert again.deferrable is None
            async with again.transaction():
                cursor = await again.execute("SHOW transaction_isolation")
                assert await cursor.fetchone() == ("read committed",)
            again.remove_notify_handler  # noqa: B018 - it is psycopg's
            with pytest.raises(ValueError):
                again.remove_notify_handler(print)
            with pytest.raises(ValueError):
                again.remove_notice_handler(print)


TRACES = {
    "SET work_mem = '1234kB'": "SELECT current_setting('work_mem') <> '1234kB'",
    "select set_config('work_mem', '1234kB', false)": (
        "SELECT current_setting('work_mem') <> '1234kB'"
    ),
    "/* why */ set role pg_read_all_data": "SELECT current_user = session_user",
    "SELECT 1; SET work_mem TO '1234kB'": "SELECT current_setting('work_mem') <> '1234kB'",
    "DO $$ BEGIN PERFORM set_config('work_mem', '1234kB', false); END $$": (
        "SELECT current_setting('work_mem') <> '1234kB'"
    ),
    "LISTEN something": "SELECT count(*) = 0 FROM pg_listening_channels()",
    "SELECT pg_advisory_lock(1)": "SELECT count(*) = 0 FROM pg_locks WHERE locktype = 'advisory'",
    "CREATE TEMP TABLE mine ()": "SELECT to_regclass('mine') IS NULL",
    "select 1 as i into temporary mine": "SELECT to_regclass('mine') IS NULL",
    "PREPARE mine AS SELECT 1": "SELECT count(*) = 0 FROM pg_prepared_statements WHERE name='mine'",
}


@pytest.mark.parametrize("statement", TRACES)
async def test_traces_in_the_session_are_wiped(pg_dsn, pgbouncer_session, kit, statement):
    """On a session that is ours, and on one that a pooler has declared to keep for us."""
    ways: list[tuple[str, dict[str, Any]]] = [
        (pg_dsn, {}),
        (pgbouncer_session.dsn(pg_dsn), {"pooler": "session"}),
    ]
    for dsn, options in ways:
        async with open_pool(dsn, max_size=1, **options) as pool:
            async with pool.acquire() as conn:
                await conn.execute(statement)
                assert not await kit.fetch(conn, TRACES[statement])
            async with pool.acquire() as conn:
                assert await kit.fetch(conn, TRACES[statement])
            assert pool.statistics().size == 1


async def test_a_cursor_with_hold_is_closed(pg_dsn, kit):
    async with open_pool(pg_dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            await conn.execute("DECLARE held CURSOR WITH HOLD FOR SELECT 1")
        async with pool.acquire() as again:
            assert again is conn
            assert await kit.fetch(again, "SELECT count(*) FROM pg_cursors") == 0


async def test_behind_a_transaction_pooler_nothing_is_wiped(pg_dsn, pgbouncer_transaction, kit):
    """It would be another's session: no DISCARD, no DEALLOCATE, no RESET."""
    async with open_pool(pgbouncer_transaction.dsn(pg_dsn), max_size=1) as pool:
        async with pool.acquire() as conn:
            assert conn.behind_pooler
            assert conn.prepare_threshold is None
            await conn.execute("SET work_mem = '1234kB'")
        async with pool.acquire() as again:
            assert again is conn
            # There is one session behind it here, so it can be seen that it was left alone.
            assert await kit.fetch(again, "SHOW work_mem") == "1234kB"
            await again.execute("RESET work_mem")
        assert pool.statistics().opened == 1


async def test_notifications_of_a_borrower_are_not_the_next_ones(pg_dsn):
    async with open_pool(pg_dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            await conn.execute("LISTEN something")
            await conn.execute("NOTIFY something, 'old'")
        async with pool.acquire() as again:
            assert again is conn
            await again.execute("LISTEN something")
            await again.execute("NOTIFY something, 'new'")
            got = [n.payload async for n in again.notifies(timeout=5, stop_after=1)]
            assert got == ["new"]


async def test_what_can_not_be_made_as_it_was_is_replaced(pg_dsn, kit):
    async with open_pool(pg_dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            await conn.set_autocommit(False)
            await conn.tpc_begin("mine")
        assert conn.state is ConnectionState.CLOSED
        async with pool.acquire() as other:
            assert other is not conn

            async def keep_using_it():
                with pytest.raises(psycopg.Error):
                    await other.execute("SELECT pg_sleep(60)")

            tasks = anyio.create_task_group()
            await tasks.__aenter__()
            tasks.start_soon(keep_using_it)
            await kit.eventually(lambda: other.info.transaction_status.name == "ACTIVE")
        await tasks.__aexit__(None, None, None)
        assert other.state is ConnectionState.CLOSED
        assert pool.statistics().closed_broken == 2
        async with pool.acquire() as third:
            block = third.transaction()
            await block.__aenter__()
        assert third.closed
        await block.__aexit__(None, None, None)
        assert kit.held(pool) == (0, 0, 0)


async def test_a_reset_that_is_refused_replaces_the_connection(pg_dsn, pg_cluster, kit):
    """Whatever the reason: here its role may not be taken any more."""
    async with open_pool(pg_dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            await conn.execute("LISTEN x")
            pg_cluster.terminate_backend(conn.info.backend_pid)
        async with pool.acquire() as other:
            assert await kit.fetch(other, "SELECT 1") == 1
        assert pool.statistics().closed_broken == 1


# ------------------------------------------------------------ hooks


async def test_hooks(pg_dsn, kit):
    calls = []

    async def on_connect(conn):
        calls.append("connect")
        await conn.execute("SET work_mem = '1MB'")
        conn.row_factory = dict_row

    async def on_acquire(conn):
        calls.append("acquire")
        await conn.execute("SELECT set_config('app.tenant', 'x', false)")

    async def on_release(conn):
        assert conn.info.transaction_status.name == "IDLE"
        calls.append("release")

    async with open_pool(
        pg_dsn, max_size=1, on_connect=on_connect, on_acquire=on_acquire, on_release=on_release
    ) as pool:
        for _ in range(2):
            async with pool.acquire() as conn:
                cursor = await conn.execute(
                    "SELECT current_setting('work_mem') AS w, current_setting('app.tenant') AS t"
                )
                assert await cursor.fetchone() == {"w": "1MB", "t": "x"}
                await conn.execute("BEGIN")
        assert pool.statistics().opened == 1
    # What on_acquire had set was wiped, on_connect's own settings with it.
    assert calls == ["connect", "acquire", "release", "connect", "acquire", "release", "connect"]


@pytest.mark.parametrize("which", ["on_connect", "on_acquire", "on_release"])
async def test_a_hook_that_raises_raises_at_the_borrower(pg_dsn, kit, which):
    raising = [True]

    async def hook(conn):
        if raising[0]:
            raise KeyError("the hook's own")

    options: dict[str, Any] = {which: hook}
    async with open_pool(pg_dsn, max_size=1, **options) as pool:
        with pytest.raises(KeyError, match="the hook's own"):
            async with pool.acquire():
                assert which == "on_release"
        assert kit.held(pool) == (0, 0, 0)
        assert pool.statistics().size == 0
        if which == "on_release":  # what the block raises is more
            with pytest.raises(ValueError, match="body"):
                async with pool.acquire():
                    raise ValueError("body")
        raising[0] = False
        async with pool.acquire() as conn:
            assert await kit.fetch(conn, "SELECT 1") == 1


async def test_on_release_is_not_for_what_can_not_be_rolled_back(pg_dsn, kit):
    calls = []

    async def on_release(conn):
        calls.append(conn)

    async with open_pool(pg_dsn, on_release=on_release) as pool:
        async with pool.acquire() as conn:
            await conn.set_autocommit(False)
            await conn.tpc_begin("mine")
        assert conn.closed
        assert not calls
        assert kit.held(pool) == (0, 0, 0)


async def test_on_connect_that_fails_after_a_reset(pg_dsn, kit):
    calls = []

    async def on_connect(conn):
        calls.append(conn)
        if len(calls) == 2:
            raise KeyError("again")

    async with open_pool(pg_dsn, max_size=1, on_connect=on_connect) as pool:
        with pytest.raises(KeyError):
            async with pool.acquire() as conn:
                await conn.execute("SET work_mem = '1MB'")
        assert conn.closed
        async with pool.acquire() as other:
            assert other is not conn


async def test_hooks_that_hang_are_bounded(pg_dsn, kit):
    hanging = [False]

    async def hook(conn):
        if hanging[0]:
            await anyio.sleep(60)

    with anyio.fail_after(kit.soon):
        async with open_pool(pg_dsn, on_release=hook, cancel_timeout=0.1) as pool:
            hanging[0] = True
            with pytest.raises(TimeoutError, match="on_release"):
                async with pool.acquire() as conn:
                    pass
            assert conn.closed
        async with open_pool(pg_dsn, on_connect=hook, acquire_timeout=1) as pool:
            with pytest.raises(PoolTimeoutError, match="on_connect has not ended"):
                async with pool.acquire():
                    raise AssertionError("entered")
            assert kit.held(pool) == (0, 0, 0)


async def test_a_connection_lost_in_on_connect_is_a_failed_attempt(pg_dsn, pg_cluster, kit):
    killed: list[Any] = []

    async def hook(conn):
        if not killed:
            killed.append(conn)
            pg_cluster.terminate_backend(conn.info.backend_pid)
        await conn.execute("SELECT 1")

    async with open_pool(pg_dsn, on_connect=hook) as pool, pool.acquire() as conn:
        assert await kit.fetch(conn, "SELECT 1") == 1
        assert pool.statistics().connect_errors == 1

    async def wrong(conn):
        await conn.execute("SELECT * FROM missing")

    async with open_pool(pg_dsn, on_connect=wrong) as pool:
        with pytest.raises(psycopg.errors.UndefinedTable):
            async with pool.acquire():
                raise AssertionError("entered")


# ------------------------------------------------------------ times


def set_expired(member: Any) -> None:
    member.expires_at = member.fresh_until = 0.0


async def test_it_expires_by_itself(pg_dsn, kit):
    async with open_pool(pg_dsn, max_lifetime=0.1, min_size=1) as pool:
        await kit.eventually(lambda: pool.statistics().opened >= 3)
        assert pool.statistics().closed_expired >= 2


async def test_expiry_on_acquire_and_on_release(pg_dsn, kit):
    async with open_pool(pg_dsn) as pool:
        async with pool.acquire() as first:
            (member,) = pool._lender.ledger.borrowed
            set_expired(member)
        assert first.closed
        assert pool.statistics().closed_expired == 1
        async with pool.acquire() as second:
            pass
        assert second.state is ConnectionState.OPEN
        set_expired(pool._lender.ledger.idle[0])
        async with pool.acquire() as third:
            assert second.closed
            assert third is not second
        assert pool.statistics().closed_expired == 2


async def test_idle_connections_are_closed_in_the_background(pg_dsn, pg_cluster, kit):
    async with open_pool(pg_dsn, min_size=1, max_idle=0.1) as pool:
        await kit.borrow_at_once(pool, 4)
        await kit.eventually(lambda: pool.statistics().size == 1)
        told = pool.statistics()
        assert told.closed_expired == told.opened - 1 >= 3
        await anyio.sleep(0.15)
        assert pool.statistics().size == 1
        # A rest that is too long is no reason while no more than min_size are there.
        async with pool.acquire():
            pass
        assert pool.statistics().opened == told.opened


async def test_too_long_a_rest_counts_on_acquire(pg_dsn, kit):
    async with open_pool(pg_dsn, max_idle=60) as pool:
        async with pool.acquire() as first:
            pass
        member = pool._lender.ledger.idle[0]
        member.idle_since -= 61
        member.fresh_until = 0.0
        async with pool.acquire() as second:
            assert second is not first
        assert pool.statistics().closed_expired == 1


async def test_no_rest_at_all(pg_dsn, pg_cluster, kit):
    async with open_pool(pg_dsn, max_idle=0) as pool:
        for _ in range(2):
            async with pool.acquire() as conn:
                pass
            assert conn.closed
        assert pool.statistics().opened == 2


async def test_lifetimes_differ(pg_dsn, kit):
    async with open_pool(pg_dsn, max_lifetime=1000) as pool:
        await kit.borrow_at_once(pool, 4)
        now = anyio.current_time()
        left = {member.expires_at - now for member in pool._lender.ledger.idle}
        assert len(left) == 4
        assert all(890 < seconds <= 1000 for seconds in left)


async def test_a_long_rest_is_checked(way, kit):
    async with open_pool(way.dsn, check_after_idle=0, max_size=1, **way.options) as pool:
        async with pool.acquire() as first:
            pass
        async with pool.acquire() as second:
            assert second is first
        assert pool.statistics().opened == 1


async def test_never_too_old(pg_dsn):
    options: dict[str, Any] = {"acquire_timeout": None, "connect_timeout": None}
    async with open_pool(pg_dsn, **options) as pool, pool.acquire():
        pass
    options = {"max_lifetime": None, "max_idle": None, "check_after_idle": None}
    async with open_pool(pg_dsn, **options) as pool:
        async with pool.acquire() as conn:
            pass
        async with pool.acquire() as again:
            assert again is conn
        await pool.resize(0, 5)  # has the keeper look


# ------------------------------------------------------------ looking after it


async def test_min_size_and_wait_ready(pg_dsn, pg_cluster, kit):
    async with open_pool(pg_dsn, min_size=3) as pool:
        await pool.wait_ready()
        assert pool.statistics().idle == 3
        assert len(pg_cluster.sessions(pg_dsn)) == 3
    async with open_pool(pg_dsn) as pool:
        await pool.wait_ready()
        assert pool.statistics().idle == 1
        await pool.wait_ready()
        await assert_cancellable(pool.wait_ready)
        assert pool.statistics().opened == 1


async def test_what_dies_is_replaced_up_to_min_size(pg_dsn, pg_cluster, kit):
    async with open_pool(pg_dsn, min_size=2) as pool:
        await pool.wait_ready()
        async with pool.acquire() as conn:
            pg_cluster.terminate_backend(conn.info.backend_pid)
            with pytest.raises(psycopg.OperationalError):
                await conn.execute("SELECT 1")
        await kit.eventually(lambda: pool.statistics().idle == 2)
        assert pool.statistics().closed_broken == 1


async def test_resize(pg_dsn, pg_cluster, kit):
    async with open_pool(pg_dsn, max_size=1) as pool:
        done = []

        async def borrow():
            async with pool.acquire() as conn:
                await conn.execute("SELECT pg_sleep(0.02)")
                done.append(1)

        async with anyio.create_task_group() as tasks, pool.acquire():
            for _ in range(3):
                tasks.start_soon(borrow)
            await kit.eventually(lambda: pool.statistics().tasks_waiting == 3)
            await pool.resize(0, 4)  # they need not wait any more
            await kit.eventually(lambda: len(done) == 3)
        assert pool.statistics().size == 4
        async with pool.acquire():
            await pool.resize(0, 2)
            assert pool.statistics().size == 2
            await pool.resize(0, 1)
            assert pool.statistics().size == 1
        async with pool.acquire():
            await pool.resize(2, 2)
            await kit.eventually(lambda: pool.statistics().size == 2)
            await pool.resize(1, 1)
        await pool.wait_ready()
        assert pool.statistics().size == 1
        for sizes in ((-1, 1), (2, 1), (0, 0), (0, 1.5), (True, 2)):
            with pytest.raises(ValueError):
                await pool.resize(*sizes)
        await assert_cancellable(lambda: pool.resize(0, 7))
        assert pool.statistics().max_size == 1


async def test_a_borrowed_surplus_is_closed_when_it_comes_back(pg_dsn, kit):
    async with open_pool(pg_dsn, max_size=2) as pool:

        async def borrow(*, task_status):
            async with pool.acquire():
                task_status.started()
                await anyio.sleep_forever()

        async with anyio.create_task_group() as tasks:
            await tasks.start(borrow)
            async with pool.acquire() as conn:
                await pool.resize(0, 1)
                assert pool.statistics().size == 2
            assert conn.closed
            assert pool.statistics().size == 1
            tasks.cancel_scope.cancel()


async def test_drain(pg_dsn, kit):
    async with open_pool(pg_dsn) as pool:

        async def borrow(*, task_status):
            async with pool.acquire() as conn:
                task_status.started(conn)
                await leave.wait()

        leave = anyio.Event()
        async with anyio.create_task_group() as tasks:
            borrowed = await tasks.start(borrow)
            async with pool.acquire() as idle:
                pass
            await pool.drain()
            assert idle.closed
            assert not borrowed.closed
            leave.set()
        assert borrowed.closed
        assert pool.statistics().closed_expired == 2
        async with pool.acquire() as fresh:
            pass
        assert not fresh.closed
        await assert_cancellable(pool.drain)
        assert not fresh.closed


async def test_check_replaces_the_dead(pg_dsn, pg_cluster, kit):
    async with open_pool(pg_dsn, min_size=3, max_size=3) as pool:
        await pool.wait_ready()
        await pool.check()
        assert pool.statistics().opened == 3
        dead = pool._lender.ledger.idle[1].conn
        pg_cluster.terminate_backend(dead.info.backend_pid)
        await pool.check()
        told = pool.statistics()
        assert (told.idle, told.opened, told.closed_broken) == (3, 4, 1)
        assert dead.closed
        await assert_cancellable(pool.check)
        assert kit.held(pool) == (0, 0, 0)


async def test_a_cancelled_check_loses_nothing(pg_dsn, fault_proxy, kit, monkeypatch):
    monkeypatch.setattr("pgstructured.driver._pooling._CHECK_SETTLES", 2.4)
    async with open_pool(fault_proxy.dsn(pg_dsn), min_size=2) as pool:
        await pool.wait_ready()
        fault_proxy.delay(0.5)
        with anyio.move_on_after(0.05) as scope:
            await pool.check()
        assert scope.cancelled_caught
        fault_proxy.delay(0)
        assert kit.held(pool) == (0, 0, 0)
        assert pool.statistics().idle == 2


async def test_a_check_that_is_cancelled_at_every_await(pg_dsn, kit):
    """Also before those that ask have begun to."""
    number = 0
    is_over = False
    async with open_pool(pg_dsn, min_size=2, max_size=2) as pool:
        await pool.wait_ready()
        while not is_over:
            with anyio.CancelScope() as scope:
                await kit.cancel_at(pool.check(), scope, number)
            is_over = not scope.cancel_called
            assert pool.statistics().idle == 2
            assert kit.held(pool) == (0, 0, 0)
            number += 1
        assert number > 1
        assert pool.statistics().opened == 2


async def test_it_can_not_be_made_by_hand():
    with pytest.raises(TypeError):
        Pool(cast("Any", None))


async def test_closed(pg_dsn):
    async with open_pool(pg_dsn) as pool:
        pass
    for use in (pool.acquire(), pool.pin(), pool.transaction()):
        with pytest.raises(PoolClosedError, match="closed"):
            async with use:
                raise AssertionError("entered")
    with pytest.raises(PoolClosedError):
        await pool.wait_ready()
    await pool.check()
    await pool.drain()
    assert pool.statistics().size == 0

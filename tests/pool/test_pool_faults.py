"""Dead sessions, outages, refusals, and the end of the pool."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import anyio
import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.pq import DiagnosticField

from pgstructured.errors import (
    ConnectionLostError,
    ConninfoError,
    PoolClosedError,
    PoolTimeoutError,
    PoolUnavailableError,
)
from pgstructured.pool import open_pool
from pgstructured.pool._waiters import Grant


def kill(pg_cluster, pg_dsn):
    """End every session of the test's database, also those of a pooler."""
    for session in pg_cluster.sessions(pg_dsn):
        pg_cluster.terminate_backend(session.pid)


async def test_killed_while_idle(way, pg_cluster, pg_dsn, kit):
    """Direct it costs nobody anything; a pooler hides it, or ends the client's session too."""
    async with open_pool(way.dsn, max_size=2, **way.options) as pool:
        async with pool.acquire() as first:
            await first.execute("SELECT 1")
        kill(pg_cluster, pg_dsn)
        if way.mode == "transaction":
            # Not our session; who comes before PgBouncer has noticed is told of it.
            with anyio.fail_after(kit.soon):
                answer = None
                while answer is None:
                    with suppress(psycopg.OperationalError):
                        async with pool.acquire() as conn:
                            answer = await kit.fetch(conn, "SELECT 1")
            return
        await kit.eventually(lambda: not pool._lender.ledger.idle[0].session.is_quiet())
        async with pool.acquire() as second:
            assert await kit.fetch(second, "SELECT 1") == 1
            assert second is not first
        assert pool.statistics().closed_broken == 1


async def test_killed_while_idle_and_nothing_else_to_look_at(pg_dsn, pg_cluster, kit):
    async with open_pool(pg_dsn) as pool:
        async with pool.acquire() as first:
            pass
        kill(pg_cluster, pg_dsn)
        await kit.eventually(lambda: not pool._lender.ledger.idle[0].session.is_quiet())
        pool._lender._turn_at = float("inf")  # no other reason for the long way
        async with pool.acquire() as second:
            assert second is not first
            assert await kit.fetch(second, "SELECT 1") == 1


async def test_killed_while_active(way, pg_cluster, pg_dsn, kit):
    async with open_pool(way.dsn, max_size=2, **way.options) as pool:

        async def be_killed():
            with pytest.raises(psycopg.OperationalError):
                async with pool.acquire() as conn:
                    await conn.execute("SELECT pg_sleep(60)")

        with anyio.fail_after(kit.soon):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(be_killed)
                await kit.eventually(
                    lambda: any(s.state == "active" for s in pg_cluster.sessions(pg_dsn))
                )
                kill(pg_cluster, pg_dsn)
        assert kit.held(pool) == (0, 0, 0)
        async with pool.acquire() as conn:
            assert await kit.fetch(conn, "SELECT 1") == 1
        assert pool.statistics().closed_broken == 1


async def test_killed_in_a_transaction(way, pg_cluster, pg_dsn, kit):
    async with open_pool(way.dsn, max_size=2, **way.options) as pool:
        with pytest.raises(psycopg.OperationalError):
            async with pool.transaction() as conn:
                await conn.execute("SELECT 1")
                kill(pg_cluster, pg_dsn)
                await conn.execute("SELECT 1")
        assert kit.held(pool) == (0, 0, 0)
        async with pool.acquire() as conn:
            assert await kit.fetch(conn, "SELECT 1") == 1


async def test_what_a_killed_session_says_through_a_pooler(way, pg_cluster, pg_dsn, kit):
    """Never psycopg's InternalError about results: the connection is lost, and says so."""
    async with open_pool(way.dsn, max_size=1, **way.options) as pool:
        lost = 0
        for _ in range(20):
            async with pool.acquire() as conn:
                await conn.execute("SELECT 1")
                kill(pg_cluster, pg_dsn)
                try:
                    async with conn.transaction():
                        await conn.execute("SELECT 1")
                except psycopg.OperationalError:
                    lost += 1
                    assert conn.failure is not None
        assert lost >= (0 if way.mode == "transaction" else 1)


async def test_a_question_that_a_killed_session_answers(way, pg_cluster, pg_dsn, kit):
    """Its farewell comes as one result more behind a pooler; an acquire hears nothing of it."""
    async with open_pool(way.dsn, max_size=1, check_after_idle=0, **way.options) as pool:
        for _ in range(20):
            kill(pg_cluster, pg_dsn)
            async with pool.acquire() as conn:
                with suppress(psycopg.OperationalError):
                    assert await kit.fetch(conn, "SELECT 1") == 1
        assert kit.held(pool) == (0, 0, 0)
        assert pool.statistics().acquired == 20


FAREWELL = psycopg.errors.AdminShutdown(
    "terminating",
    info={**dict.fromkeys(DiagnosticField), DiagnosticField.SEVERITY_NONLOCALIZED: b"FATAL"},
)


@pytest.mark.parametrize("farewell", [None, FAREWELL])
async def test_an_answer_too_many(pg_dsn, kit, monkeypatch, farewell):
    """Out of step it is lost, for the server's own reason if it gave one; another is given."""
    from pgstructured.driver import _lending

    async with open_pool(pg_dsn, max_size=1, check_after_idle=0) as pool:
        await pool.wait_ready()
        (member,) = pool._lender.ledger.idle
        if farewell is not None:
            monkeypatch.setattr(_lending, "last_words", lambda *_: farewell)
        with pytest.raises(psycopg.OperationalError):
            await _lending.Statement(member.conn, "SELECT 1; SELECT 2", settle_timeout=1).run()
        if farewell is None:
            assert "received 2 results" in str(member.conn.failure)
        else:
            assert member.conn.failure is farewell
        async with pool.acquire() as conn:
            assert await kit.fetch(conn, "SELECT 1") == 1


async def test_a_connection_that_is_out_of_step_is_lost(pg_dsn):
    """As psycopg tells of it behind a pooler whose server has just been killed."""
    async with open_pool(pg_dsn) as pool, pool.acquire() as conn:

        def two_answers() -> Any:
            raise psycopg.InternalError("received 2 results from command 'BEGIN'")
            yield 1  # type: ignore[unreachable]

        with pytest.raises(ConnectionLostError, match="received 2 results") as caught:
            await conn.wait(two_answers())
        assert isinstance(caught.value.__cause__, psycopg.InternalError)
        assert conn.closed


async def test_found_dead_in_the_background(pg_dsn, pg_cluster, kit):
    async with open_pool(pg_dsn) as pool:
        async with pool.acquire() as conn:
            pass
        kill(pg_cluster, pg_dsn)
        await kit.eventually(lambda: not pool._lender.ledger.idle[0].session.is_quiet())
        await pool.resize(0, 10)  # has the keeper look
        await kit.eventually(lambda: pool.statistics().size == 0)
        assert conn.closed
        assert pool.statistics().closed_broken == 1


async def test_a_silent_session_is_found_by_the_check(pg_dsn, fault_proxy, kit, monkeypatch):
    monkeypatch.setattr("pgstructured.pool._lender._CHECK_TIMEOUT", 0.2)
    async with open_pool(fault_proxy.dsn(pg_dsn), check_after_idle=0, max_size=2) as pool:
        await pool.wait_ready()
        first = pool._lender.ledger.idle[0].conn
        fault_proxy.freeze()
        async with anyio.create_task_group() as tasks:

            async def acquire():
                async with pool.acquire() as conn:
                    assert conn is not first
                    assert await kit.fetch(conn, "SELECT 1") == 1

            tasks.start_soon(acquire)
            await kit.eventually(lambda: first.closed)
            fault_proxy.thaw()
        assert pool.statistics().closed_broken == 1


async def test_news_are_no_death(pg_dsn, pg_cluster, kit):
    """A notification, a notice: an idle connection may be readable and well."""

    async def listen(conn):
        await conn.execute("LISTEN something")

    async with open_pool(pg_dsn, on_connect=listen) as pool:
        async with pool.acquire() as conn:
            pass
        with pg_cluster.connect(pg_dsn.rpartition("/")[2]) as other:
            other.execute("NOTIFY something")
        await kit.eventually(lambda: not pool._lender.ledger.idle[0].session.is_quiet())
        async with pool.acquire() as again:
            assert again is conn
            assert await kit.fetch(again, "SELECT 1") == 1


# ------------------------------------------------------------ outages


async def test_a_server_that_is_down_at_the_start(pg_dsn, fault_proxy, kit, events):
    fault_proxy.refuse()
    with anyio.fail_after(kit.soon):
        async with open_pool(fault_proxy.dsn(pg_dsn), acquire_timeout=1) as pool:
            with pytest.raises(PoolTimeoutError, match="refused") as caught:
                async with pool.acquire():
                    raise AssertionError("entered")
            assert isinstance(caught.value.__cause__, psycopg.OperationalError)
            with pytest.raises(PoolTimeoutError):
                await pool.wait_ready()
            assert pool.statistics().connect_errors >= 2
            assert kit.held(pool) == (0, 0, 0)
            fault_proxy.accept()
            async with pool.acquire() as conn:
                assert await kit.fetch(conn, "SELECT 1") == 1
    names = [name for name, _ in events]
    assert "pool.connect_failed" in names
    assert "pool.recovered" in names


async def test_an_outage_and_recovery(pg_cluster_private, kit):
    """Who came before it ended is served, without help."""
    cluster = pg_cluster_private
    dsn = cluster.create_database()
    async with open_pool(dsn, max_size=2, min_size=1) as pool:
        await pool.wait_ready()
        await anyio.to_thread.run_sync(cluster.stop, "immediate")
        answers = []

        async def use():
            while True:
                try:
                    async with pool.acquire() as conn:
                        answers.append(await kit.fetch(conn, "SELECT 1"))
                        return
                except psycopg.OperationalError:  # the one that died under it
                    pass

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(use)
            await kit.eventually(lambda: pool.statistics().connect_errors >= 2)
            await anyio.to_thread.run_sync(cluster.start)
        assert answers == [1] * 5
        assert kit.held(pool) == (0, 0, 0)
        await kit.eventually(lambda: pool.statistics().idle >= 1)


async def test_a_connection_that_comes_back_serves_who_can_not_connect(pg_dsn, fault_proxy, kit):
    """A full server: whoever is about to connect again takes what is given back."""
    async with open_pool(fault_proxy.dsn(pg_dsn), max_size=2) as pool:
        served = []

        async def other():
            async with pool.acquire() as conn:
                served.append(conn)

        async with anyio.create_task_group() as tasks:
            async with pool.acquire() as conn:
                fault_proxy.refuse()
                tasks.start_soon(other)
                await kit.eventually(lambda: pool.statistics().connect_errors >= 4)
                # By now it waits for seconds at a time.
                await kit.eventually(lambda: pool.statistics().tasks_waiting == 1)
        assert served == [conn]
        assert kit.held(pool) == (0, 0, 0)
        assert pool.statistics().size == 1
        fault_proxy.accept()


async def test_tasks_in_line_are_told_of_an_outage_too(pg_dsn, fault_proxy, kit):
    fault_proxy.refuse()
    async with open_pool(fault_proxy.dsn(pg_dsn), max_size=1, acquire_timeout=1) as pool:

        async def use():
            with pytest.raises(PoolTimeoutError, match="the last attempt") as caught:
                async with pool.acquire():
                    raise AssertionError("entered")
            assert isinstance(caught.value.__cause__, psycopg.OperationalError)

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(use)
        assert pool.statistics().acquire_timeouts == 3


async def test_an_outage_that_lasts_too_long(pg_dsn, fault_proxy, kit):
    with anyio.fail_after(kit.soon):
        with pytest.raises(PoolUnavailableError, match=r"for 0\.3 s") as caught:
            async with open_pool(fault_proxy.dsn(pg_dsn), reconnect_timeout=0.3) as pool:
                async with pool.acquire():
                    pass
                fault_proxy.refuse()
                fault_proxy.reset()
                await kit.fail_to_connect(pool)
                # Nobody asks any more; it finds out by itself.
                await anyio.sleep_forever()
    assert isinstance(caught.value.__cause__, psycopg.OperationalError)
    fault_proxy.accept()


async def test_an_outage_that_ends_in_time(pg_dsn, fault_proxy, kit):
    async with open_pool(fault_proxy.dsn(pg_dsn), reconnect_timeout=30) as pool:
        fault_proxy.refuse()
        await kit.fail_to_connect(pool)
        assert pool._lender.opener.failing_since is not None
        fault_proxy.accept()
        await kit.eventually(lambda: pool._lender.opener.failing_since is None)
        await kit.eventually(lambda: pool.statistics().idle == 1)


# ------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("change", "sqlstate"), [({"dbname": "no_such_db"}, "3D000"), ({"user": "no_such"}, "28000")]
)
async def test_what_can_not_heal_comes_out_at_once(pg_dsn, kit, change, sqlstate):
    with anyio.fail_after(kit.soon):
        async with open_pool(make_conninfo(pg_dsn, **change), min_size=1) as pool:
            for use in (pool.acquire(), pool.pin(), pool.transaction()):
                with pytest.raises(psycopg.OperationalError) as caught:
                    async with use:
                        raise AssertionError("entered")
                assert caught.value.sqlstate == sqlstate
            with pytest.raises(psycopg.OperationalError):
                await pool.wait_ready()
            assert pool.statistics().in_use == 0


async def test_a_wrong_password_and_its_rotation(pg_cluster_private, kit):
    """At once, and the next attempt asks for a fresh one."""
    cluster = pg_cluster_private
    dsn = cluster.create_database()
    cluster.execute("CREATE ROLE app LOGIN PASSWORD 'second'")
    hba = cluster.data_directory / "pg_hba.conf"
    hba.write_text("host all app all scram-sha-256\n" + hba.read_text())
    cluster.execute("SELECT pg_reload_conf()")
    passwords = ["first", "second"]
    asked = []

    async def conninfo():
        asked.append(passwords[0])
        return make_conninfo(dsn, user="app", password=passwords[0])

    async with open_pool(conninfo) as pool:

        async def refused():
            with pytest.raises(psycopg.OperationalError) as caught:
                async with pool.acquire():
                    raise AssertionError("entered")
            assert caught.value.sqlstate == "28P01"
            assert "first" not in str(caught.value)

        with anyio.fail_after(kit.soon):
            while True:  # until the server has read its file again
                try:
                    async with pool.acquire():
                        pass
                    await pool.drain()
                except psycopg.OperationalError:
                    break
            await refused()
        del passwords[0]
        async with pool.acquire() as conn:
            assert await kit.fetch(conn, "SELECT current_user") == "app"
    assert asked[-1] == "second"


async def test_a_conninfo_callable_that_raises_is_a_failed_attempt(pg_dsn, kit):
    asked = []

    async def conninfo():
        asked.append(1)
        if len(asked) < 3:
            raise LookupError("no token yet")
        return pg_dsn

    async with open_pool(conninfo) as pool, pool.acquire() as conn:
        assert await kit.fetch(conn, "SELECT 1") == 1
        assert pool.statistics().connect_errors == 2

    async def never():
        raise LookupError("no token")

    async with open_pool(never, acquire_timeout=0.2) as pool:
        with pytest.raises(PoolTimeoutError, match="no token") as caught:
            async with pool.acquire():
                raise AssertionError("entered")
        assert isinstance(caught.value.__cause__, LookupError)

    async def malformed():
        return "host"

    async with open_pool(malformed) as pool:
        with pytest.raises(ConninfoError):
            async with pool.acquire():
                raise AssertionError("entered")
        assert kit.held(pool) == (0, 0, 0)


async def test_on_connect_of_connections_that_nobody_waits_for(pg_dsn, kit):
    """The server's word is a failed attempt, to be repeated; a mistake ends the pool."""
    attempts = []

    async def refused_at_first(conn):
        attempts.append(conn)
        if len(attempts) == 1:
            await conn.execute("SELECT * FROM missing")

    async with open_pool(pg_dsn, min_size=1, on_connect=refused_at_first) as pool:
        await kit.eventually(lambda: pool.statistics().idle == 1)
        assert pool.statistics().connect_errors == 1

    async def mistaken(conn):
        raise KeyError("a mistake")

    with anyio.fail_after(kit.soon), pytest.raises(KeyError, match="a mistake"):
        async with open_pool(pg_dsn, min_size=1, on_connect=mistaken):
            await anyio.sleep_forever()


# ------------------------------------------------------------ the end


async def test_leaving_waits_for_borrowers(pg_dsn, kit):
    done = []

    async def work(pool, *, task_status):
        async with pool.acquire() as conn:
            task_status.started()
            await conn.execute("SELECT pg_sleep(0.2)")
            done.append(1)

    async with anyio.create_task_group() as tasks:
        async with open_pool(pg_dsn) as pool:
            await tasks.start(work, pool)
        assert done


async def test_leaving_closes_what_is_not_given_back_in_time(way, pg_cluster, pg_dsn, kit):
    """Its borrower is told; what ran on the server is cancelled."""
    told: list[Any] = []

    async def work(pool, *, task_status):
        with pytest.raises(PoolClosedError) as caught:
            async with pool.acquire() as conn:
                task_status.started()
                await conn.execute("SELECT pg_sleep(60)")
        told.append(caught.value.__cause__)

    async def rest(pool, *, task_status):
        async with pool.acquire() as conn:
            task_status.started()
            await conn.wait_closed()
        told.append("rested")

    with anyio.fail_after(kit.soon):
        async with anyio.create_task_group() as tasks:
            async with open_pool(way.dsn, close_timeout=0.2, **way.options) as pool:
                await tasks.start(work, pool)
                await tasks.start(rest, pool)
            assert pool.statistics().idle == 0
    assert "rested" in told
    assert any(isinstance(error, psycopg.OperationalError) for error in told)
    assert kit.held(pool) == (0, 0, 0)
    await kit.eventually(
        lambda: not [s for s in pg_cluster.sessions(pg_dsn) if s.state == "active"]
    )


async def test_leaving_by_an_error_waits_for_nobody(pg_dsn, kit):
    async def work(pool, *, task_status):
        with pytest.raises(PoolClosedError):
            async with pool.acquire() as conn:
                task_status.started()
                await conn.execute("SELECT pg_sleep(60)")

    with anyio.fail_after(kit.soon):
        async with anyio.create_task_group() as tasks:
            with pytest.raises(KeyError, match="body"):
                async with open_pool(pg_dsn, close_timeout=50) as pool:
                    await tasks.start(work, pool)
                    raise KeyError("body")


async def test_leaving_can_be_cancelled(pg_dsn, kit):
    async def work(pool, *, task_status):
        with pytest.raises(PoolClosedError):
            async with pool.acquire() as conn:
                task_status.started()
                await conn.execute("SELECT pg_sleep(60)")

    with anyio.fail_after(kit.soon):
        async with anyio.create_task_group() as tasks:
            with anyio.CancelScope() as scope:
                async with open_pool(pg_dsn, close_timeout=50) as pool:
                    await tasks.start(work, pool)
                    tasks.start_soon(anyio.sleep, 0)
                    scope.deadline = anyio.current_time() + 0.1
            assert scope.cancelled_caught


async def test_while_it_closes(pg_dsn, fault_proxy, kit):
    """Acquires are refused; a check that is under way ends; what comes back is closed."""
    outcomes = []

    async def check(pool):
        try:
            async with pool.acquire():
                outcomes.append("entered")
        except PoolClosedError:
            outcomes.append("closed")

    async def hold(pool, *, task_status):
        async with pool.pin() as conn:
            task_status.started(conn)
            await pool_closes.wait()
            with pytest.raises(PoolClosedError):
                async with pool.acquire():
                    raise AssertionError("entered")
            with pytest.raises(ValueError, match="mine"):
                raise ValueError("mine")

    pool_closes = anyio.Event()
    with anyio.fail_after(kit.soon):
        async with anyio.create_task_group() as tasks:
            async with open_pool(
                fault_proxy.dsn(pg_dsn), check_after_idle=0, min_size=2, max_size=2
            ) as pool:
                await pool.wait_ready()
                held = await tasks.start(hold, pool)
                fault_proxy.freeze()
                tasks.start_soon(check, pool)
                await kit.eventually(lambda: pool.statistics().idle == 0)
                tasks.start_soon(see_it_close, pool, pool_closes, kit)
        assert held.closed
    assert outcomes == ["closed"]
    assert kit.held(pool) == (0, 0, 0)
    fault_proxy.thaw()


async def see_it_close(pool, pool_closes, kit):
    await kit.eventually(lambda: pool._lender.is_closing)
    pool_closes.set()


async def test_leaving_while_it_fills(pg_dsn, fault_proxy, kit):
    fault_proxy.freeze()
    with anyio.fail_after(kit.soon):
        async with open_pool(fault_proxy.dsn(pg_dsn), min_size=1) as pool:
            await kit.eventually(lambda: pool.statistics().size == 1)
    assert pool.statistics().size == 0
    fault_proxy.thaw()


async def test_waiting_for_what_does_not_get_ready(pg_dsn, fault_proxy, kit):
    """Another's attempt is waited for as long as one of its own."""
    fault_proxy.freeze()
    with anyio.fail_after(kit.soon):
        async with open_pool(fault_proxy.dsn(pg_dsn), min_size=1, acquire_timeout=0.2) as pool:
            await kit.eventually(lambda: pool.statistics().size == 1)
            with pytest.raises(PoolTimeoutError):
                await pool.wait_ready()
    fault_proxy.thaw()


async def test_given_in_the_moment_in_which_it_closes(pg_dsn, kit):
    refused = []

    async def wait(pool):
        with pytest.raises(PoolClosedError):
            async with pool.acquire():
                raise AssertionError("entered")
        refused.append(1)

    async with anyio.create_task_group() as tasks:
        async with open_pool(pg_dsn, max_size=1) as pool:
            async with pool.acquire():
                tasks.start_soon(wait, pool)
                await kit.eventually(lambda: pool.statistics().tasks_waiting == 1)
            assert pool.statistics().tasks_waiting == 0  # it has been given the connection
    assert refused
    assert kit.held(pool) == (0, 0, 0)


async def test_a_slot_goes_to_who_has_none(pg_dsn, fault_proxy, kit):
    """Not to a task that has one, and stands before it in the line to be given a connection."""
    async with open_pool(fault_proxy.dsn(pg_dsn), max_size=2) as pool:

        async def acquire(scope):
            with scope:
                async with pool.acquire():
                    raise AssertionError("entered")

        first, second = anyio.CancelScope(), anyio.CancelScope()
        async with anyio.create_task_group() as tasks:
            async with pool.acquire() as conn:
                fault_proxy.refuse()
                tasks.start_soon(acquire, first)
                await kit.eventually(lambda: pool.statistics().connect_errors >= 4)
                tasks.start_soon(acquire, second)
                await kit.eventually(lambda: pool.statistics().tasks_waiting == 2)
                (_, waiter) = pool._lender.ledger.waiters.line
                await conn.aclose()
            assert waiter.grant is Grant.SLOT
            first.cancel()
            second.cancel()
        assert kit.held(pool) == (0, 0, 0)
        fault_proxy.accept()


async def test_a_reset_that_the_server_refuses(pg_dsn, kit, monkeypatch):
    monkeypatch.setattr(
        "pgstructured.driver._pooling._reset_statement", lambda *_, **__: b"SELECT x"
    )
    async with open_pool(pg_dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            await conn.execute("LISTEN something")
        assert conn.closed
        assert pool.statistics().closed_broken == 1
        assert kit.held(pool) == (0, 0, 0)

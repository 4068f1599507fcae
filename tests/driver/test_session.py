"""The full-duplex session: commands of many tasks, notifications, and every way to end."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import psycopg
import pytest

from pgstructured.driver import ConnectionState, Prepared, Session, open_session
from pgstructured.errors import ConnectionLostError, ConninfoError, NotPrimaryError
from pgstructured.observe import instrumented

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from psycopg.pq import PGnotify


def terminate(dsn: str, pid: int) -> None:
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("SELECT pg_terminate_backend(%s)", [pid])


@pytest.fixture
def gone(pg_cluster) -> Callable[[int], Awaitable[None]]:
    """Wait until the server has ended a session."""

    async def check(pid: int) -> None:
        found = f"SELECT 1 FROM pg_stat_activity WHERE pid = {pid}"
        with anyio.fail_after(10):
            while pg_cluster.execute(found):  # noqa: ASYNC110 - it is the server's
                await anyio.sleep(0.01)

    return check


def running(dsn: str) -> list[str]:
    """Statements that other sessions of this database run right now."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        rows = conn.execute(
            "SELECT query FROM pg_stat_activity WHERE datname = current_database()"
            " AND state = 'active' AND pid <> pg_backend_pid()"
        ).fetchall()
    return [row[0] for row in rows]


async def see_nothing_running(dsn: str) -> None:
    with anyio.fail_after(20):  # it says that it has ended before it can be seen
        while running(dsn):  # noqa: ASYNC110 - it is the server's
            await anyio.sleep(0.01)


async def test_commands_and_values(pg_dsn) -> None:
    async with open_session(pg_dsn) as session:
        result = await session.execute(
            "SELECT $1::int + 1, $2::text, $3::bool, $4::float8, $5::bytea, $6::text",
            [41, "é", True, 1.5, rb"\x00ff", None],
        )
        assert result.rows == [("42", "é", "t", "1.5", r"\x00ff", None)]
        assert result.status == "SELECT 1"
        assert result.scalar() == "42"
        assert (await session.execute("SELECT $1::bool", [False])).scalar() == "f"
        assert (await session.execute("")).rows == []
        assert session.state is ConnectionState.OPEN
        assert session.failure is None
        assert not session.behind_pooler
        assert not session.is_standby
        assert session.server_version >= 140000
        assert str(session.backend_pid) in repr(session)
        assert await session.ping() > 0


async def test_an_error_is_the_callers_alone(pg_dsn) -> None:
    async with open_session(pg_dsn) as session:
        async with anyio.create_task_group() as tg:

            async def good() -> None:
                assert (await session.execute("SELECT 'x'")).scalar() == "x"

            async def bad() -> None:
                with pytest.raises(psycopg.errors.DivisionByZero):
                    await session.execute("SELECT 1/0")

            for _ in range(20):
                tg.start_soon(good)
                tg.start_soon(bad)
        with pytest.raises(psycopg.errors.SyntaxError):
            await session.execute("SELEKT")


async def test_a_batch_is_all_or_nothing(pg_dsn) -> None:
    async with open_session(pg_dsn) as session:
        await session.execute("CREATE TABLE t (n int UNIQUE)")
        with pytest.raises(psycopg.errors.UniqueViolation):
            await session.execute_batch(
                [
                    ("INSERT INTO t VALUES ($1)", [1]),
                    ("INSERT INTO t VALUES ($1)", [1]),
                    ("INSERT INTO t VALUES ($1)", [2]),
                ]
            )
        assert (await session.execute("SELECT count(*) FROM t")).scalar() == "0"
        results = await session.execute_batch(
            [("INSERT INTO t VALUES ($1)", [n]) for n in range(3)]
            + [("SELECT count(*) FROM t", ())]
        )
        assert results[-1].scalar() == "3"
        assert results[0].status == "INSERT 0 1"


async def test_what_is_found_at_the_commit(pg_dsn) -> None:
    """Its error comes after the statement's own answer, which was all that was looked at."""
    async with open_session(pg_dsn) as session:
        await session.execute("CREATE TABLE t (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        insert = "INSERT INTO t VALUES (1)"
        assert (await session.execute(insert)).status == "INSERT 0 1"
        with pytest.raises(psycopg.errors.UniqueViolation):
            await session.execute(insert)
        with pytest.raises(psycopg.errors.UniqueViolation):
            await session.execute_batch([("SELECT 1", ()), (insert, ())])
        prepared = session.send_prepared(Prepared(b"insert", insert.encode()), [])
        await prepared.wait()
        with pytest.raises(psycopg.errors.UniqueViolation):
            prepared.result()
        assert (await session.execute("SELECT count(*) FROM t")).scalar() == "1"


async def test_a_thousand_tasks_share_it(pg_dsn) -> None:
    async with open_session(pg_dsn) as session, anyio.create_task_group() as tg:

        async def ask(number: int) -> None:
            assert (await session.execute("SELECT $1::int", [number])).scalar() == str(number)

        for number in range(1000):
            tg.start_soon(ask, number)


async def test_large_statements_both_ways(pg_dsn) -> None:
    """More than the socket takes at once, while the server answers as much."""
    big = "x" * 3_000_000
    async with open_session(pg_dsn) as session:

        async def echo() -> None:
            assert (await session.execute("SELECT $1::text", [big])).scalar() == big

        async with anyio.create_task_group() as tg:
            for _ in range(4):
                tg.start_soon(echo)


async def test_a_statement_that_could_not_be_prepared_is_prepared_anew(pg_dsn) -> None:
    statement = Prepared(b"of_a_table", b"SELECT n FROM made_later")
    async with open_session(pg_dsn) as session:
        for _ in range(2):
            command = session.send_prepared(statement, [])
            await command.wait()
            with pytest.raises(psycopg.errors.InvalidSqlStatementName):
                command.result()
        await session.execute("CREATE TEMPORARY TABLE made_later AS SELECT 7 AS n")
        for _ in range(3):
            command = session.send_prepared(statement, [])
            await command.wait()
            assert command.result().scalar() == "7"
        found = await session.execute("SELECT count(*) FROM pg_prepared_statements")
        assert found.scalar() == "1"


async def test_notifications_arrive_in_batches_and_in_order(pg_dsn) -> None:
    seen: list[PGnotify] = []
    batches = 0

    def take(batch: list[PGnotify]) -> None:
        nonlocal batches
        batches += 1
        seen.extend(batch)

    async with open_session(pg_dsn, on_notifications=take) as session:
        await session.execute("LISTEN jobs")
        with psycopg.connect(pg_dsn, autocommit=True) as conn:
            conn.execute("SELECT pg_notify('jobs', n::text) FROM generate_series(1, 5000) n")
        with anyio.fail_after(10):
            while len(seen) < 5000:
                await session.ping()
    assert [int(n.extra) for n in seen] == list(range(1, 5001))
    assert batches < 2500


async def test_a_notification_in_one_segment_with_a_result(pg_dsn) -> None:
    seen: list[PGnotify] = []
    async with open_session(pg_dsn, on_notifications=seen.extend) as session:
        await session.execute("LISTEN own")
        for number in range(50):
            await session.execute("SELECT pg_notify('own', $1)", [str(number)])
            await session.ping()
            assert len(seen) == number + 1


async def test_without_a_handler_notifications_are_dropped(pg_dsn) -> None:
    async with open_session(pg_dsn) as session:
        await session.execute("LISTEN own")
        await session.execute("NOTIFY own")
        await session.ping()


async def test_notices_reach_the_handler(pg_dsn) -> None:
    seen: list[tuple[str | None, str | None]] = []
    async with open_session(
        pg_dsn, on_notice=lambda diag: seen.append((diag.sqlstate, diag.message_primary))
    ) as session:
        await session.execute("DO $$ BEGIN RAISE NOTICE 'so' USING ERRCODE = '01234'; END $$")
    assert seen == [("01234", "so")]


async def test_an_error_of_the_notification_handler_reaches_the_owner(pg_dsn) -> None:
    def fail(batch: list[PGnotify]) -> None:
        raise ZeroDivisionError

    async def listen() -> None:
        async with open_session(pg_dsn, on_notifications=fail) as session:
            await session.execute("LISTEN own")
            await session.execute("NOTIFY own")
            await anyio.sleep_forever()

    with pytest.raises(ZeroDivisionError):
        await listen()


async def test_settings_and_name(pg_dsn) -> None:
    async with open_session(
        pg_dsn, application_name="näme", settings={"statement_timeout": "7s", "work_mem": "1MB"}
    ) as session:
        shown = await session.execute(
            "SELECT current_setting('application_name'), current_setting('statement_timeout'),"
            " current_setting('work_mem')"
        )
        assert shown.rows == [("n?me", "7s", "1MB")]
    with pytest.raises(psycopg.errors.UndefinedObject):
        async with open_session(pg_dsn, settings={"no_such_setting": "1"}):
            pytest.fail("entered")


async def test_no_settings_are_left_on_a_pooled_session(pg_dsn, pgbouncer_transaction) -> None:
    pooled = pgbouncer_transaction.dsn(pg_dsn)
    async with open_session(pooled, settings={"statement_timeout": "7s"}) as session:
        assert session.behind_pooler
    with psycopg.connect(pooled, autocommit=True, prepare_threshold=None) as conn:
        assert conn.execute("SHOW statement_timeout").fetchone() == ("0",)


@pytest.mark.parametrize("statement", ["COPY (SELECT 1) TO STDOUT", "COPY pg_class FROM STDIN"])
async def test_a_copy_ends_the_session(pg_dsn, statement) -> None:
    async with open_session(pg_dsn) as session:
        before = session.send([("SELECT 'before'", ())])
        with anyio.fail_after(10), pytest.raises(ConnectionLostError, match="can't run COPY"):
            await session.execute(statement)
        assert before.result().scalar() == "before"
        assert session.state is ConnectionState.FAILED
        assert isinstance(session.failure, psycopg.NotSupportedError)


@pytest.mark.parametrize("option", ["heartbeat", "heartbeat_timeout"])
@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
async def test_no_time_to_wait(pg_dsn, option, seconds) -> None:
    with pytest.raises(ValueError, match=f"{option} must be a finite number"):
        async with open_session(pg_dsn, **{option: seconds}):
            pytest.fail("entered")


async def test_what_cannot_travel_is_refused_whole(pg_dsn) -> None:
    async with open_session(pg_dsn) as session:
        for statement, params in [
            ("SELECT 'a\0b'", ()),
            ("SELECT $1::text", ["a\0b"]),
            ("SELECT $1::text", ["\ud800"]),
        ]:
            with pytest.raises(ValueError):
                await session.execute_batch([("SELECT 1", ()), (statement, params)])
        assert (await session.execute("SELECT 'fine'")).scalar() == "fine"


async def test_asyncio_cancels_what_runs_in_the_background(
    pg_dsn, gone, anyio_backend_name
) -> None:
    """As `asyncio.run` does with all tasks that it finds: who waits would wait for ever."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no other cancellation than that of scopes")
    import asyncio

    others = asyncio.all_tasks()
    with anyio.fail_after(20):
        async with open_session(pg_dsn) as session:
            waiting = session.send([("SELECT pg_sleep(1)", ())], may_block=True)
            for task in asyncio.all_tasks() - others:
                task.cancel()
            await waiting.wait()
            with pytest.raises(ConnectionLostError, match="background task was cancelled"):
                waiting.result()
            await anyio.lowlevel.checkpoint()
            told = session.failure  # and the block goes on
    assert session.state is ConnectionState.FAILED
    assert told is session.failure
    await gone(session.backend_pid)


async def test_bad_conninfo() -> None:
    with pytest.raises(ConninfoError, match="malformed"):
        async with open_session("host=x no_such_key=1"):
            pytest.fail("entered")


class TestCancellation:
    async def test_a_cancelled_caller_leaves_the_protocol_intact(self, pg_dsn) -> None:
        async with open_session(pg_dsn) as session:
            for _ in range(5):
                with anyio.move_on_after(0.01) as scope:
                    await session.execute("SELECT pg_sleep(0.3)")
                assert scope.cancelled_caught
            assert (await session.execute("SELECT 'fine'")).scalar() == "fine"

    async def test_pending_cancellation_sends_nothing(self, pg_dsn) -> None:
        async with open_session(pg_dsn) as session:
            await session.execute("CREATE TABLE t (n int)")
            with anyio.CancelScope() as scope:
                scope.cancel()
                await session.execute("INSERT INTO t VALUES (1)")
            assert scope.cancelled_caught
            assert (await session.execute("SELECT count(*) FROM t")).scalar() == "0"

    async def test_cancel_ends_the_statement_on_the_server(self, pg_dsn) -> None:
        async with open_session(pg_dsn) as session, anyio.create_task_group() as tg:
            await session.cancel()  # nothing runs: nothing happens

            async def sleep() -> None:
                with pytest.raises(psycopg.errors.QueryCanceled):
                    await session.execute("SELECT pg_sleep(60)", may_block=True)

            tg.start_soon(sleep)
            while "SELECT pg_sleep(60)" not in running(pg_dsn):
                await anyio.lowlevel.checkpoint()
            with anyio.fail_after(10):
                await session.cancel()

    async def test_leaving_ends_what_runs_on_the_server(self, pg_dsn) -> None:
        with anyio.fail_after(30):
            async with open_session(pg_dsn, close_timeout=20) as session:
                with anyio.move_on_after(0.1):
                    await session.execute("SELECT pg_sleep(60)", may_block=True)
        await see_nothing_running(pg_dsn)

    async def test_random_cancellation(self, pg_dsn) -> None:
        rng = random.Random(7)
        async with open_session(pg_dsn) as session:

            async def worker(number: int) -> None:
                for turn in range(40):
                    with anyio.move_on_after(rng.uniform(0, 0.004)):
                        value = f"{number}-{turn}"
                        answer = await session.execute("SELECT $1::text", [value])
                        assert answer.scalar() == value

            async with anyio.create_task_group() as tg:
                for number in range(20):
                    tg.start_soon(worker, number)
            assert (await session.execute("SELECT 'fine'")).scalar() == "fine"

    async def test_a_cancelled_open_leaves_no_session(self, pg_dsn, fault_proxy) -> None:
        fault_proxy.freeze("down")
        with anyio.fail_after(5), anyio.move_on_after(0.2) as scope:
            async with open_session(fault_proxy.dsn(pg_dsn)):
                pytest.fail("entered")
        assert scope.cancelled_caught

    async def test_connect_timeout_bounds_a_silent_server(self, pg_dsn, fault_proxy) -> None:
        fault_proxy.freeze("down")
        with anyio.fail_after(5), pytest.raises(psycopg.errors.ConnectionTimeout):
            async with open_session(fault_proxy.dsn(pg_dsn), connect_timeout=0.3):
                pytest.fail("entered")


class TestLoss:
    async def test_terminated_while_idle(self, pg_dsn) -> None:
        async with open_session(pg_dsn) as session:
            terminate(pg_dsn, session.backend_pid)
            with anyio.fail_after(5):
                await session.wait_closed()
            assert session.state is ConnectionState.FAILED
            assert isinstance(session.failure, psycopg.errors.AdminShutdown)
            with pytest.raises(ConnectionLostError) as caught:
                await session.execute("SELECT 1")
            assert caught.value.__cause__ is session.failure
            assert caught.value.sqlstate == "08003"
            await session.aclose()
            assert session.state is ConnectionState.FAILED

    async def test_terminated_while_busy(self, pg_dsn) -> None:
        async with open_session(pg_dsn) as session, anyio.create_task_group() as tg:

            async def sleep(execute: Callable[..., Awaitable[object]], *args: object) -> None:
                with pytest.raises(ConnectionLostError) as caught:
                    await execute(*args)
                assert isinstance(caught.value.__cause__, psycopg.errors.AdminShutdown)

            for _ in range(3):
                tg.start_soon(sleep, session.execute, "SELECT pg_sleep(60)")
            tg.start_soon(sleep, session.execute_batch, [("SELECT pg_sleep(60)", ())])
            await anyio.wait_all_tasks_blocked()
            terminate(pg_dsn, session.backend_pid)

    async def test_killed(self, pg_cluster_private) -> None:
        async with open_session(pg_cluster_private.dsn()) as session:
            os.kill(session.backend_pid, signal.SIGKILL)
            with anyio.fail_after(5):
                await session.wait_closed()
            assert session.failure is not None
            assert session.failure.sqlstate is None

    @pytest.mark.parametrize("how", ["reset", "fin"])
    async def test_socket_ended(self, pg_dsn, fault_proxy, how) -> None:
        async with open_session(fault_proxy.dsn(pg_dsn)) as session:
            await anyio.wait_all_tasks_blocked()
            getattr(fault_proxy, how)()
            with anyio.fail_after(5):
                await session.wait_closed()
            assert session.state is ConnectionState.FAILED

    async def test_frozen_is_found_by_the_heartbeat(self, pg_dsn, fault_proxy) -> None:
        async with open_session(
            fault_proxy.dsn(pg_dsn), heartbeat=0.1, heartbeat_timeout=2
        ) as session:
            await anyio.sleep(0.35)  # several beats, all answered
            assert session.state is ConnectionState.OPEN
            fault_proxy.freeze("both")
            with anyio.fail_after(20):
                await session.wait_closed()
            assert "silent" in str(session.failure)

    async def test_a_blocked_loop_is_no_silence(self, pg_dsn) -> None:
        """The answer has come; only nobody was there to read it before the deadline."""
        for _ in range(3):
            async with open_session(pg_dsn, heartbeat=0.05, heartbeat_timeout=0.4) as session:
                while not session._wire.commands:
                    await anyio.lowlevel.checkpoint()
                time.sleep(0.8)
                await session.ping()
                assert session.state is ConnectionState.OPEN

    async def test_a_heartbeat_without_an_answer_is_none(self, pg_dsn, fault_proxy) -> None:
        """The session has ended under it; nobody is to be told how long it took."""
        names: list[str] = []
        async with open_session(
            fault_proxy.dsn(pg_dsn), heartbeat=0.05, heartbeat_timeout=60
        ) as session:
            fault_proxy.freeze("both")
            session.poll()  # what had come before
            while not session._wire.commands:  # noqa: ASYNC110 - it beats by the clock
                await anyio.sleep(0.01)
            rtt = session.heartbeat_rtt
            with instrumented(lambda event: names.append(event.name)):
                fault_proxy.reset()
                await session.wait_closed()
                await anyio.wait_all_tasks_blocked()
        assert names == ["driver.failed"]
        assert session.heartbeat_rtt == rtt

    async def test_no_heartbeat_is_expected_of_a_waiting_statement(self, pg_dsn) -> None:
        async with open_session(pg_dsn, heartbeat=0.05, heartbeat_timeout=0.5) as session:
            await session.execute("SELECT pg_sleep(0.9)", may_block=True)
            assert session.state is ConnectionState.OPEN

    async def test_a_flood_is_life(self, pg_dsn, fault_proxy) -> None:
        """The answer to a heartbeat may come long after it, behind other bytes."""
        async with open_session(
            fault_proxy.dsn(pg_dsn), heartbeat=0.05, heartbeat_timeout=0.8
        ) as session:
            fault_proxy.throttle(400_000)
            await session.execute("SELECT repeat('x', 600000)")
            assert session.state is ConnectionState.OPEN

    async def test_leaving_is_bounded_when_frozen(self, pg_dsn, fault_proxy) -> None:
        with anyio.fail_after(5):
            async with open_session(
                fault_proxy.dsn(pg_dsn),
                close_timeout=0.3,
                # So that the server ends what no cancel request can reach.
                settings={"client_connection_check_interval": "100ms"},
            ) as session:
                fault_proxy.freeze("both")
                with anyio.move_on_after(0.1):
                    await session.execute("SELECT pg_sleep(60)")
        assert session.state is ConnectionState.CLOSED
        fault_proxy.thaw()

    async def test_lost_while_sending(self, pg_dsn, fault_proxy) -> None:
        async with (
            open_session(fault_proxy.dsn(pg_dsn)) as session,
            anyio.create_task_group() as tg,
        ):
            fault_proxy.freeze("up")

            async def send() -> None:
                with pytest.raises(ConnectionLostError):
                    await session.execute("SELECT length($1)", ["x" * 20_000_000])

            tg.start_soon(send)
            await anyio.wait_all_tasks_blocked()
            fault_proxy.reset()


class TestNotPrepared:
    async def test_silence_after_connecting(self, pg_dsn, fault_proxy) -> None:
        fault_proxy.hold(b"pg_is_in_recovery", "up")
        with anyio.fail_after(5), pytest.raises(psycopg.errors.ConnectionTimeout):
            async with open_session(fault_proxy.dsn(pg_dsn), connect_timeout=0.4):
                pytest.fail("entered")

    async def test_no_primary_among_the_hosts(self, pg_cluster_private) -> None:
        standby = pg_cluster_private.standby()
        with pytest.raises(NotPrimaryError, match="no host is a primary"):
            async with open_session(standby.dsn(), target_session_attrs="read-write"):
                pytest.fail("entered")
        async with open_session(standby.dsn()) as session:
            assert session.is_standby


class TestClose:
    async def test_a_cancel_request_that_is_refused(self, pg_dsn, fault_proxy) -> None:
        with anyio.fail_after(5):
            async with open_session(fault_proxy.dsn(pg_dsn)) as session:
                with anyio.move_on_after(0.1):
                    await session.execute("SELECT pg_sleep(60)")
                terminate(pg_dsn, session.backend_pid)  # after the end of this block's session
                fault_proxy.refuse()
        assert session.state is ConnectionState.FAILED

    async def test_closed_by_us(self, pg_dsn) -> None:
        async with open_session(pg_dsn) as session:
            await session.aclose()
            await session.aclose()
            assert session.state is ConnectionState.CLOSED
            await session.wait_closed()
            with pytest.raises(anyio.ClosedResourceError):
                await session.execute("SELECT 1")
            with pytest.raises(anyio.ClosedResourceError):
                session.send([("SELECT 1", ())])
            await session.cancel()

    async def test_closing_wakes_callers(self, pg_dsn) -> None:
        async with open_session(pg_dsn) as session, anyio.create_task_group() as tg:

            async def sleep() -> None:
                with pytest.raises((anyio.ClosedResourceError, psycopg.errors.QueryCanceled)):
                    await session.execute("SELECT pg_sleep(60)")

            tg.start_soon(sleep)
            tg.start_soon(sleep)
            await anyio.wait_all_tasks_blocked()
            with anyio.fail_after(30):
                await session.aclose(close_timeout=20)
        await see_nothing_running(pg_dsn)

    async def test_the_bodys_error_comes_out_bare(self, pg_dsn) -> None:
        with pytest.raises(KeyError, match="mine"):
            async with open_session(pg_dsn):
                raise KeyError("mine")

    async def test_no_public_constructor(self) -> None:
        with pytest.raises(TypeError, match="no public constructor"):
            Session()  # type: ignore[call-arg]


class TestKept:
    async def test_it_outlives_its_block_and_is_looked_at_now_and_then(self, pg_dsn) -> None:
        """Nothing reads in the background; `poll` reads all there is, and the end with it."""
        seen: list[PGnotify] = []
        async with open_session(pg_dsn, on_notifications=seen.extend) as session:
            await session.execute("LISTEN own")
            session.keep()
        with psycopg.connect(pg_dsn, autocommit=True) as other:
            other.execute("NOTIFY own, 'heard'")
        with anyio.fail_after(5):
            while not seen:
                await anyio.sleep(0.01)
                session.poll()
        assert [notify.extra for notify in seen] == [b"heard"]
        terminate(pg_dsn, session.backend_pid)
        with anyio.fail_after(5):
            while session.state is ConnectionState.OPEN:
                await anyio.sleep(0.01)
                session.poll()
        assert isinstance(session.failure, psycopg.errors.AdminShutdown)
        session.poll()

    async def test_it_is_run_again_by_any_number_of_tasks(self, pg_dsn) -> None:
        async with open_session(pg_dsn) as session:
            session.keep()
        async with anyio.create_task_group() as tg:
            tg.start_soon(session.run)
            tg.start_soon(session.run)
            assert (await session.execute("SELECT 'fine'")).scalar() == "fine"
            tg.cancel_scope.cancel()
        assert session.state is ConnectionState.OPEN
        with anyio.fail_after(5):
            async with anyio.create_task_group() as tg:
                tg.start_soon(session.run)
                await session.ping()
                terminate(pg_dsn, session.backend_pid)
        with pytest.raises(ConnectionLostError):
            await session.ping()
        await session.run()

    @pytest.mark.parametrize("commands", [0, 1, 2, 3])
    async def test_the_last_words_are_read_with_the_end(self, commands, pg_dsn, gone) -> None:
        """Also what libpq has read while it could not send any more."""
        async with open_session(pg_dsn) as session:
            session.keep()
        terminate(pg_dsn, session.backend_pid)
        await gone(session.backend_pid)
        for _ in range(commands):
            with suppress(ConnectionLostError):
                session.send([("SELECT 1", ())])
                await anyio.sleep(0.01)  # the network says that there is nobody
        session.poll()
        assert isinstance(session.failure, psycopg.errors.AdminShutdown)

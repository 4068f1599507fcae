"""A `Connection`'s life, errors, turns, transactions and callbacks."""

from __future__ import annotations

import gc
import os
import select
import signal
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

import anyio
import psycopg
import pytest
from anyio.lowlevel import checkpoint
from psycopg import errors

from pgstructured.driver import Connection, ConnectionState, connect, open_connection
from pgstructured.errors import ConnectionLostError
from pgstructured.observe import Event, instrumented

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from pgstructured.testing import Cluster, FaultProxy

IDLE = psycopg.pq.TransactionStatus.IDLE
INTRANS = psycopg.pq.TransactionStatus.INTRANS


@asynccontextmanager
async def connected(dsn: str, **options: Any) -> AsyncGenerator[Connection[Any]]:
    conn = await connect(dsn, **options)
    conn._close_timeout = 20.0  # or what runs on goes on
    try:
        yield conn
    finally:
        await conn.aclose()


async def value(conn: Connection[Any], query: str, *params: Any) -> Any:
    row = await (await conn.execute(query, params or None)).fetchone()
    assert row is not None
    return row[0]


def await_bytes(conn: Connection[Any]) -> None:
    """Wait until something is there to be read, and leave it there."""
    assert select.select([conn.fileno()], [], [], 10)[0]


def stream(conn: Connection[Any], query: str) -> AsyncGenerator[Any]:
    return cast("AsyncGenerator[Any]", conn.cursor().stream(query))


# ---------------------------------------------------------------- life


async def test_closing(pg_dsn: str) -> None:
    conn = await connect(pg_dsn)
    assert conn.state == "open"
    assert conn.failure is None
    assert not conn.resources_released
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(conn.wait_closed)
        await checkpoint()
        await conn.aclose()
    assert conn.state is ConnectionState.CLOSED
    assert conn.failure is None
    assert bool(conn.resources_released)
    assert conn.closed
    assert not conn.broken
    await conn.wait_closed()
    await conn.aclose()
    await conn.close()
    for operation in (conn.execute("SELECT 1"), conn.commit(), conn.set_autocommit(False)):
        with pytest.raises(psycopg.OperationalError, match=r"^the connection is closed$") as caught:
            await operation
        assert not isinstance(caught.value, ConnectionLostError)
    with pytest.raises(psycopg.OperationalError, match=r"^the connection is closed$"):
        conn.cursor("named")
    with pytest.raises(psycopg.OperationalError, match=r"^the connection is closed$"):
        conn.after_commit(print)


async def test_closing_in_two_tasks_at_once(pg_dsn: str) -> None:
    conn = await connect(pg_dsn)
    conn._close_timeout = 20.0
    async with anyio.create_task_group() as tasks:

        async def run() -> None:
            with pytest.raises(psycopg.OperationalError, match="the connection is closed"):
                await conn.execute("SELECT pg_sleep(30)")

        tasks.start_soon(run)
        await anyio.sleep(0.05)
        for _ in range(2):
            tasks.start_soon(conn.aclose)
        await conn.wait_closed()
    assert conn.state is ConnectionState.CLOSED


async def test_closing_while_nobody_reads(pg_dsn: str) -> None:
    conn = await connect(pg_dsn, pooler="none")
    conn._close_timeout = 20.0
    conn.pgconn.send_query(b"SELECT pg_sleep(30)")
    with anyio.fail_after(25):
        await conn.aclose()
    assert conn.state is ConnectionState.CLOSED


async def test_a_session_that_was_killed_while_idle(pg_dsn: str, pg_cluster: Cluster) -> None:
    events: list[Event] = []
    async with connected(pg_dsn) as conn:
        pid = conn.info.backend_pid
        pg_cluster.terminate_backend(pid)
        with instrumented(events.append):
            with pytest.raises(errors.AdminShutdown):
                await conn.execute("SELECT 1")
        assert conn.state is ConnectionState.FAILED
        assert conn.resources_released
        assert conn.broken
        await conn.wait_closed()
        for operation in (conn.execute("SELECT 1"), conn.rollback()):
            with pytest.raises(ConnectionLostError, match="terminating connection") as caught:
                await operation
            assert caught.value.sqlstate == "08003"
            assert caught.value.__cause__ is conn.failure
        assert isinstance(conn.failure, errors.AdminShutdown)
        await conn.aclose()
        assert conn.state is ConnectionState.FAILED
    assert [(event.name, event.facts["backend_pid"]) for event in events] == [
        ("driver.failed", pid)
    ]


async def test_a_connection_finished_behind_our_back(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        conn.pgconn.finish()
        assert conn.state is ConnectionState.FAILED
        with pytest.raises(ConnectionLostError, match="the connection ended"):
            await conn.execute("SELECT 1")


async def test_a_crash_of_the_server(pg_cluster_private: Cluster) -> None:
    dsn = pg_cluster_private.create_database()
    async with connected(dsn) as conn, connected(dsn) as other:

        async def crash() -> None:
            await anyio.sleep(0.1)
            os.kill(other.info.backend_pid, signal.SIGKILL)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(crash)
            with anyio.fail_after(10), pytest.raises(psycopg.OperationalError):
                await conn.execute("SELECT pg_sleep(30)")
        assert conn.state is ConnectionState.FAILED
        assert isinstance(conn.failure, errors.CrashShutdown), repr(conn.failure)
        with pytest.raises(psycopg.OperationalError):
            await other.execute("SELECT 1")
        assert isinstance(other.failure, psycopg.OperationalError)
        assert other.failure.sqlstate is None


async def test_context_manager(pg_dsn: str) -> None:
    async with await Connection.connect(pg_dsn) as conn:
        await conn.execute("CREATE TABLE t (i int)")
        assert not conn.autocommit
        assert conn.prepare_threshold == 5
    assert conn.state is ConnectionState.CLOSED
    async with await Connection.connect(pg_dsn) as conn:
        await conn.execute("INSERT INTO t VALUES (1)")
    with pytest.raises(ZeroDivisionError):
        async with await Connection.connect(pg_dsn) as conn:
            await conn.execute("INSERT INTO t VALUES (2)")
            raise ZeroDivisionError
    assert conn.state is ConnectionState.CLOSED
    with anyio.CancelScope() as scope:
        async with await Connection.connect(pg_dsn) as conn:
            await conn.execute("INSERT INTO t VALUES (3)")
            scope.cancel()
    assert scope.cancelled_caught
    assert conn.state is ConnectionState.CLOSED
    with anyio.CancelScope() as scope:
        async with await Connection.connect(pg_dsn) as conn:
            await conn.execute("INSERT INTO t VALUES (4)")
            scope.cancel()
            await checkpoint()
    assert conn.state is ConnectionState.CLOSED
    async with await Connection.connect(pg_dsn) as conn:
        assert await (await conn.execute("SELECT i FROM t")).fetchall() == [(1,)]
        await conn.close()


async def test_a_forgotten_connection_warns(pg_dsn: str) -> None:
    forgotten = [await connect(pg_dsn)]

    def forget() -> None:
        forgotten.clear()
        gc.collect()

    with pytest.warns(ResourceWarning, match="was deleted while still open"):
        forget()


async def test_an_operation_abandoned_half_way(
    pg_dsn: str, fault_proxy: FaultProxy, anyio_backend_name: str
) -> None:
    if anyio_backend_name != "asyncio":
        pytest.skip("needs an awaitable that can be left alone")
    async with connected(pg_dsn) as conn:
        waiting = conn.wait(psycopg.generators.notifies(conn.pgconn))
        waiting.send(None)
        waiting.close()
        assert conn.state == "open"
        for half_done in (conn.execute("SELECT pg_sleep(1)"), conn.execute("SELECT 1")):
            if conn.state is ConnectionState.OPEN:
                half_done.send(None)
            half_done.close()
        assert conn.state is ConnectionState.FAILED
        assert "abandoned" in str(conn.failure)
    async with connected(fault_proxy.dsn(pg_dsn)) as conn:
        await conn.execute("BEGIN")
        fault_proxy.delay(0.1)
        half_done = conn.commit()  # type: ignore[assignment]
        half_done.send(None)
        half_done.close()
        assert "abandoned" in str(conn.failure)


# ---------------------------------------------------------------- turns


async def test_tasks_take_turns_in_order(pg_dsn: str) -> None:
    order: list[int] = []
    async with connected(pg_dsn) as conn:

        async def run(number: int) -> None:
            await conn.execute("SELECT pg_sleep(0.01)")
            order.append(number)

        async with anyio.create_task_group() as tasks:
            for number in range(5):
                tasks.start_soon(run, number)
                await checkpoint()
        assert order == [0, 1, 2, 3, 4]


async def test_two_tasks_outside_of_turns(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        query = """
            SELECT repeat('x', 10000), CASE WHEN i > 1 THEN pg_sleep(1) END
            FROM generate_series(1, 5) i
        """
        outcomes: list[object] = []
        async with conn.cursor().copy(f"COPY ({query}) TO STDOUT") as copy:
            assert len(await copy.read()) > 10000
            async with anyio.create_task_group() as tasks:

                async def read() -> None:
                    try:
                        outcomes.append(len(await copy.read()) > 10000)
                    except anyio.BusyResourceError as exc:
                        outcomes.append(type(exc))

                tasks.start_soon(read)
                tasks.start_soon(read)
        assert outcomes == [anyio.BusyResourceError, True]
        assert await value(conn, "SELECT 1") == 1


async def test_commit_beside_a_task_outside_of_turns(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        await conn.execute("BEGIN")
        async with anyio.create_task_group() as tasks:

            async def listen() -> None:
                # COMMIT's answer may end it, or the connection its settling.
                with suppress(psycopg.OperationalError):
                    await conn.wait(psycopg.generators.notifies(conn.pgconn))

            tasks.start_soon(listen)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(anyio.BusyResourceError):
                await conn.commit()
            tasks.cancel_scope.cancel()


async def test_leaving_what_was_not_read_to_its_end(pg_dsn: str) -> None:
    query = "SELECT repeat('x', 1000) FROM generate_series(1, 100000)"
    async with connected(pg_dsn) as conn:
        async with conn.cursor().copy(f"COPY ({query}) TO STDOUT") as copy:
            await copy.read()
        assert conn.pgconn.transaction_status == IDLE
        async with aclosing(stream(conn, query)) as rows:
            async for _ in rows:
                break
        assert conn.pgconn.transaction_status == IDLE
        with pytest.raises(ZeroDivisionError):
            async with conn.cursor().copy(f"COPY ({query}) TO STDOUT") as copy:
                await copy.read()
                raise ZeroDivisionError
        assert conn.pgconn.transaction_status == IDLE
        assert await value(conn, "SELECT 1") == 1


async def test_a_callback_that_raises_in_the_middle_of_reading(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        await conn.execute("LISTEN here")

        def explode(_: object) -> None:
            raise ZeroDivisionError

        conn.add_notify_handler(explode)
        async with connected(pg_dsn) as other:
            for _ in range(2):
                async with anyio.create_task_group() as tasks:

                    async def notify() -> None:
                        for _ in range(3):
                            await anyio.sleep(0.05)
                            await other.execute("NOTIFY here")

                    tasks.start_soon(notify)
                    with pytest.raises(ZeroDivisionError):
                        await conn.execute("SELECT 1; NOTIFY here; SELECT pg_sleep(0.3)")
        conn.remove_notify_handler(explode)
        assert await value(conn, "SELECT 1") == 1


async def test_a_copy_that_is_cancelled_while_it_starts(
    pg_dsn: str, fault_proxy: FaultProxy
) -> None:
    async with connected(fault_proxy.dsn(pg_dsn), cancel_timeout=20) as conn:
        await conn.execute("CREATE TABLE t (t text)")
        query = "SELECT repeat('x', 1000) FROM generate_series(1, 1000)"
        for statement in ("COPY t FROM STDIN", f"COPY ({query}) TO STDOUT"):
            # Nobody finishes a COPY that has begun for a block that was never entered.
            fault_proxy.delay(0.3)
            with anyio.move_on_after(0.05) as scope:
                async with conn.cursor().copy(statement):
                    raise AssertionError("not so soon")
            fault_proxy.delay(0)
            assert scope.cancelled_caught
            assert conn.pgconn.transaction_status == IDLE
            assert await value(conn, "SELECT 1") == 1


async def test_a_copy_that_is_abandoned_with_a_full_buffer(
    pg_dsn: str, fault_proxy: FaultProxy
) -> None:
    async with connected(fault_proxy.dsn(pg_dsn), cancel_timeout=1) as conn:
        await conn.execute("CREATE TABLE t (t text)")
        fault_proxy.throttle(50_000_000)
        fault_proxy.freeze("up")
        async with anyio.create_task_group() as tasks:

            async def thaw() -> None:
                await anyio.sleep(0.2)
                fault_proxy.thaw()

            with anyio.move_on_after(0.1):
                async with conn.cursor().copy("COPY t FROM STDIN") as copy:
                    while True:
                        await copy.write(b"x" * 100_000 + b"\n")
            tasks.start_soon(thaw)
        fault_proxy.throttle(None)
        await conn.aclose()


async def test_notifies_with_a_timeout(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        await conn.execute("LISTEN here")
        assert [n async for n in conn.notifies(timeout=0.01)] == []
        await conn.execute("NOTIFY here, 'a'")
        assert [n.payload async for n in conn.notifies(timeout=0)] == ["a"]
        async with connected(pg_dsn) as other:
            await other.execute("NOTIFY here, 'there already'")
            await_bytes(conn)
            assert [n.payload async for n in conn.notifies(timeout=0)] == ["there already"]
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(other.execute, "NOTIFY here, 'b'")
                received = [n.payload async for n in conn.notifies(timeout=5, stop_after=1)]
        assert received == ["b"]


# ---------------------------------------------------------------- cancelling


async def test_cancel_safe(pg_dsn: str, fault_proxy: FaultProxy, pg_cluster: Cluster) -> None:
    async with connected(fault_proxy.dsn(pg_dsn)) as conn:
        async with anyio.create_task_group() as tasks:

            async def run() -> None:
                with pytest.raises(errors.QueryCanceled):
                    await conn.execute("SELECT pg_sleep(30)")

            tasks.start_soon(run)
            with anyio.fail_after(10):  # a request that comes before the statement is lost
                while [session.state for session in pg_cluster.sessions(pg_dsn)] != ["active"]:  # noqa: ASYNC110 - the server can't tell
                    await anyio.sleep(0.01)
            await conn.cancel_safe()
        fault_proxy.freeze()
        with pytest.raises(errors.CancellationTimeout):
            await conn.cancel_safe(timeout=0.05)
        fault_proxy.thaw()
        assert await value(conn, "SELECT 1") == 1
        await conn.aclose()
        await conn.cancel_safe()


async def test_interrupted_while_settling(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        await conn.execute("LISTEN here")

        def interrupt(_: object) -> None:
            raise KeyboardInterrupt

        conn.add_notify_handler(interrupt)
        async with connected(pg_dsn) as other:
            with pytest.raises(KeyboardInterrupt), anyio.CancelScope() as scope:
                async with conn.transaction():
                    await other.execute("NOTIFY here")
                    scope.deadline = anyio.current_time() + 0.1
                    await conn.execute("SELECT pg_sleep(30)")
        assert conn.state is ConnectionState.FAILED


async def test_settling_a_connection_that_has_not_waited_yet(pg_dsn: str) -> None:
    async with connected(pg_dsn, pooler="none") as conn:
        conn.pgconn.send_query(b"SELECT pg_sleep(30)")
        with anyio.fail_after(20):
            async with conn.lock:
                pass
        assert await value(conn, "SELECT 1") == 1


async def test_an_error_of_an_operation_under_which_the_connection_has_failed(
    pg_dsn: str, pg_cluster: Cluster
) -> None:
    async with connected(pg_dsn) as conn:
        conn._fail(psycopg.OperationalError("because"))
        conn._take_note(errors.AdminShutdown())  # passes through
        with pytest.raises(ConnectionLostError, match="because"):
            conn._take_note(anyio.ClosedResourceError())


async def test_cancelling_with_a_libpq_before_17(
    pg_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psycopg._capabilities.capabilities.has_cancel_safe", lambda: False)
    async with connected(pg_dsn) as conn:
        with anyio.fail_after(20), anyio.move_on_after(0.05):
            await conn.execute("SELECT pg_sleep(30)")
        assert await value(conn, "SELECT 1") == 1


async def test_a_refused_cancel_request(pg_dsn: str, fault_proxy: FaultProxy) -> None:
    events: list[Event] = []
    async with connected(fault_proxy.dsn(pg_dsn), cancel_timeout=2) as conn:
        await conn.execute("SELECT 1")
        fault_proxy.refuse()
        with instrumented(events.append), anyio.move_on_after(0.05) as scope:
            await conn.execute("SELECT pg_sleep(0.3)")
        assert scope.cancelled_caught
        # It could not be cancelled, but ended by itself within the bound.
        assert conn.state == "open"
        assert [event.name for event in events] == ["driver.cancel_settled"]
        conn._cancel_timeout = 0.2
        with anyio.move_on_after(0.05):
            await conn.execute("SELECT pg_sleep(1)")
        assert conn.state is ConnectionState.FAILED
        assert "cancellation failed" in str(conn.failure)


async def test_one_budget_for_all_of_a_cancellation(pg_dsn: str, fault_proxy: FaultProxy) -> None:
    async with connected(fault_proxy.dsn(pg_dsn), cancel_timeout=0.5) as conn:
        with anyio.CancelScope() as scope:
            started = 0.0
            async with conn.transaction():
                await conn.execute("SELECT 1")
                try:
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(conn.execute, "SELECT pg_sleep(0.2)")
                        await anyio.sleep(0.05)
                        fault_proxy.delay(0.15)
                        started = anyio.current_time()
                        scope.cancel()
                finally:
                    fault_proxy.freeze()
        assert anyio.current_time() - started < 5
        assert conn.state is ConnectionState.FAILED
        fault_proxy.delay(0)
        fault_proxy.thaw()


async def test_a_rollback_that_is_not_answered_is_bounded_also_without_a_cancellation(
    pg_dsn: str, fault_proxy: FaultProxy
) -> None:
    async with connected(fault_proxy.dsn(pg_dsn), cancel_timeout=0.2) as conn:
        with anyio.fail_after(20), pytest.raises(ZeroDivisionError):
            async with conn.transaction():
                await conn.execute("SELECT 1")
                fault_proxy.freeze()
                raise ZeroDivisionError
        assert conn.state is ConnectionState.FAILED
    fault_proxy.thaw()
    async with connected(fault_proxy.dsn(pg_dsn), cancel_timeout=0.2) as conn:
        with anyio.fail_after(20), pytest.raises(ConnectionLostError):
            async with conn.transaction(force_rollback=True):
                await conn.execute("SELECT 1")
                fault_proxy.freeze()
        assert conn.state is ConnectionState.FAILED
    fault_proxy.thaw()
    with anyio.fail_after(20), pytest.raises(ZeroDivisionError):
        async with await Connection.connect(fault_proxy.dsn(pg_dsn)) as conn:
            conn._cancel_timeout = 0.2
            await conn.execute("SELECT 1")
            fault_proxy.freeze()
            raise ZeroDivisionError
    fault_proxy.thaw()
    with anyio.fail_after(20):
        conn = await connect(fault_proxy.dsn(pg_dsn), cancel_timeout=0.2)
        async with aclosing(stream(conn, "SELECT generate_series(1, 1000000)")) as rows:
            async for _ in rows:
                fault_proxy.freeze()
                break
        assert conn.state is ConnectionState.FAILED
    fault_proxy.thaw()


async def test_a_commit_whose_answer_is_lost(pg_dsn: str, fault_proxy: FaultProxy) -> None:
    async with connected(fault_proxy.dsn(pg_dsn)) as conn:
        async with anyio.create_task_group() as tasks:
            with pytest.raises(psycopg.OperationalError) as caught:
                async with conn.transaction():
                    await conn.execute("SELECT 1")
                    fault_proxy.hold(b"COMMIT")
                    tasks.start_soon(reset_once_held, fault_proxy)
        assert "whether the transaction was committed is unknown" in notes_of(caught.value)


async def reset_once_held(proxy: FaultProxy) -> None:
    await anyio.to_thread.run_sync(proxy.wait_held)
    proxy.reset()


def notes_of(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


async def test_cleaning_up_while_another_task_holds_the_connection(
    pg_dsn: str, fault_proxy: FaultProxy, pg_cluster: Cluster
) -> None:
    for is_frozen in (False, True):
        dsn = fault_proxy.dsn(pg_dsn)
        limit = 0.4 if is_frozen else 5
        async with connected(dsn, cancel_timeout=limit) as conn, anyio.create_task_group() as tasks:

            async def run(conn: Connection[Any] = conn) -> None:
                with pytest.raises(psycopg.OperationalError):
                    await conn.execute("SELECT pg_sleep(30)")

            with anyio.fail_after(10), anyio.CancelScope() as scope:
                async with conn.transaction():
                    tasks.start_soon(run)
                    await anyio.sleep(0.05)
                    if is_frozen:
                        fault_proxy.freeze()
                    scope.cancel()
                    await checkpoint()
            assert scope.cancelled_caught
            if is_frozen:
                assert conn.state is ConnectionState.FAILED
                assert "stood in the way" in str(conn.failure)
            else:
                assert await value(conn, "SELECT 1") == 1
    for session in pg_cluster.sessions(pg_dsn):
        pg_cluster.terminate_backend(session.pid)


async def test_rolling_back_waits_for_another_tasks_operation(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        for is_cancelled in (False, True):
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as tasks:
                    try:
                        async with conn.transaction():
                            tasks.start_soon(sleep_shielded, conn)
                            while not conn._lock.locked():
                                await checkpoint()
                            if is_cancelled:
                                tasks.start_soon(cancel_soon, scope)
                            raise ZeroDivisionError
                    except ZeroDivisionError:
                        assert not is_cancelled
            assert scope.cancelled_caught is is_cancelled
            assert conn.pgconn.transaction_status == IDLE


async def sleep_shielded(conn: Connection[Any]) -> None:
    with anyio.CancelScope(shield=True):
        cursor = await conn.execute("SELECT pg_sleep(0.2)")
        await cursor.fetchone()


async def cancel_soon(scope: anyio.CancelScope) -> None:
    await checkpoint()
    scope.cancel()


# ---------------------------------------------------------------- transactions


def roll_back() -> None:
    raise psycopg.Rollback


async def test_transactions(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        await conn.execute("CREATE TABLE t (i int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        async with conn.transaction("outer") as outer:
            assert outer.connection is conn
            await conn.execute("INSERT INTO t VALUES (1)")
            async with conn.transaction("inner"):
                await conn.execute("INSERT INTO t VALUES (2)")
                roll_back()
            with pytest.raises(psycopg.ProgrammingError, match="forbidden"):
                await conn.commit()
            with pytest.raises(psycopg.ProgrammingError, match="forbidden"):
                await conn.rollback()
            async with conn.transaction(force_rollback=True):
                await conn.execute("INSERT INTO t VALUES (3)")
        with pytest.raises(errors.UniqueViolation):
            async with conn.transaction():
                await conn.execute("INSERT INTO t VALUES (1)")
        with pytest.raises(TypeError, match="only once"):
            async with outer:
                pass
        assert await value(conn, "SELECT array_agg(i) FROM t") == [1]
        first, second = conn.transaction(), conn.transaction()
        await first.__aenter__()
        await second.__aenter__()
        with pytest.raises(psycopg.ProgrammingError, match="wrong nesting level"):
            await first.__aexit__(None, None, None)
        with pytest.raises(psycopg.ProgrammingError, match="wrong nesting level"):
            await second.__aexit__(ValueError, ValueError(), None)


async def test_a_transaction_on_a_connection_that_fails_in_it(
    pg_dsn: str, pg_cluster: Cluster
) -> None:
    async with connected(pg_dsn) as conn:
        with pytest.raises(errors.AdminShutdown):
            async with conn.transaction() as block:
                pg_cluster.terminate_backend(conn.info.backend_pid)
                await conn.execute("SELECT 1")
        assert block.status is block.Status.FAILED
        with pytest.raises(ConnectionLostError):
            async with conn.transaction():
                pass
    async with connected(pg_dsn) as conn:
        pg_cluster.terminate_backend(conn.info.backend_pid)
        with pytest.raises(errors.AdminShutdown):
            async with conn.transaction():
                pass
    async with connected(pg_dsn) as conn:
        # psycopg logs what a rollback meets; the connection still knows why it failed.
        with pytest.raises(ZeroDivisionError):
            async with conn.transaction():
                pg_cluster.terminate_backend(conn.info.backend_pid)
                raise ZeroDivisionError
        assert isinstance(conn.failure, errors.AdminShutdown)


async def test_a_transaction_does_not_end_as_if_it_had_committed(
    pg_dsn: str, pg_cluster: Cluster
) -> None:
    async def lose(conn: Connection[Any]) -> None:
        pg_cluster.terminate_backend(conn.info.backend_pid)
        with anyio.fail_after(10):
            await conn.wait_closed()

    async with open_connection(pg_dsn) as conn:
        with pytest.raises(ConnectionLostError) as caught:
            async with conn.transaction() as block:
                await lose(conn)
        assert isinstance(caught.value.__cause__, errors.AdminShutdown)
        assert block.status is block.Status.FAILED
    async with open_connection(pg_dsn) as conn:
        with pytest.raises(ConnectionLostError):
            async with conn.transaction(), conn.transaction():
                await lose(conn)
    async with open_connection(pg_dsn) as conn:  # nothing was to be committed
        async with conn.transaction(force_rollback=True):
            await lose(conn)
    async with open_connection(pg_dsn) as conn:  # the body knows, and goes on as with psycopg
        async with conn.transaction():
            await lose(conn)
            with pytest.raises(ConnectionLostError):
                await conn.execute("SELECT 1")
    async with open_connection(pg_dsn) as conn, conn.transaction():
        with pytest.raises(errors.AdminShutdown):
            await conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    async with open_connection(pg_dsn, autocommit=False) as conn:
        await conn.execute("SELECT 1")
        with pytest.raises(ConnectionLostError):
            async with conn:
                await lose(conn)
    async with open_connection(pg_dsn) as conn, conn:
        await lose(conn)


async def test_a_transaction_cancelled_at_its_end(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        await conn.execute("CREATE TABLE t (i int)")
        with anyio.CancelScope() as scope:
            async with conn.transaction():
                await conn.execute("INSERT INTO t VALUES (1)")
                scope.cancel()
        assert scope.cancelled_caught
        assert await value(conn, "SELECT count(*) FROM t") == 0


async def test_closing_while_a_commit_is_not_answered(pg_dsn: str, fault_proxy: FaultProxy) -> None:
    async with connected(fault_proxy.dsn(pg_dsn)) as conn, anyio.create_task_group() as tasks:
        await conn.execute("BEGIN")
        fault_proxy.freeze()

        async def commit() -> None:
            with pytest.raises(psycopg.OperationalError, match=r"^the connection is closed$"):
                await conn.commit()

        tasks.start_soon(commit)
        await anyio.sleep(0.05)
        conn._close_timeout = 0.1
        await conn.aclose()
    fault_proxy.thaw()


async def test_two_phase_commit_of_what_is_not_there(pg_dsn: str) -> None:
    async with connected(pg_dsn, autocommit=True) as conn:
        with pytest.raises(errors.UndefinedObject):
            await conn.tpc_commit("missing")
        with pytest.raises(errors.UndefinedObject):
            await conn.tpc_rollback("missing")


async def test_two_phase_commit_on_a_server_without_it() -> None:
    from pgstructured.testing import Cluster

    with Cluster(settings={"max_prepared_transactions": "0"}) as cluster:
        async with connected(cluster.dsn(), autocommit=False, pooler="none") as conn:
            await conn.tpc_begin("a")
            with pytest.raises(psycopg.NotSupportedError):
                await conn.tpc_prepare()


async def test_two_phase_commit(pg_dsn: str) -> None:
    async with connected(pg_dsn, autocommit=False) as conn:
        called: list[str] = []
        xid = conn.xid(1, "gtrid", "bqual")
        await conn.tpc_begin(xid)
        conn.after_commit(lambda: called.append("committed"))
        await conn.execute("CREATE TABLE t (i int)")
        await conn.tpc_prepare()
        assert called == []
        await conn.tpc_commit()
        assert called == ["committed"]
        await conn.tpc_begin("second")
        conn.after_commit(lambda: called.append("rolled back"))
        await conn.execute("INSERT INTO t VALUES (1)")
        await conn.tpc_rollback()
        await conn.tpc_begin("third")
        await conn.tpc_prepare()
        await conn.tpc_rollback()
        assert called == ["committed"]
        assert await conn.tpc_recover() == []


async def test_a_cancelled_tpc_begin_leaves_no_transaction(
    pg_dsn: str, fault_proxy: FaultProxy
) -> None:
    async with connected(fault_proxy.dsn(pg_dsn), autocommit=False) as conn:
        await conn.rollback()
        fault_proxy.delay(0.3)
        with anyio.move_on_after(0.05) as scope:
            await conn.tpc_begin("a")
        fault_proxy.delay(0)
        assert scope.cancelled_caught
        assert conn.pgconn.transaction_status == IDLE
        await conn.execute("SELECT 1")
        await conn.rollback()
        await conn.tpc_begin("a")
        with pytest.raises(psycopg.ProgrammingError):
            await conn.tpc_begin("b")
        await conn.tpc_rollback()


async def test_server_cursors(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn, conn.transaction():
        cursor = conn.cursor("named", row_factory=psycopg.rows.scalar_row, binary=True)
        async with cursor:
            assert "psycopg.AsyncServerCursor" in repr(cursor)
            await cursor.execute("SELECT generate_series(1, 3)")
            assert await cursor.fetchall() == [1, 2, 3]
        await cursor.close()
        conn.server_cursor_factory = psycopg.AsyncRawServerCursor
        async with conn.cursor("raw") as raw:
            await raw.execute("SELECT $1::int", [1])
            assert await raw.fetchone() == (1,)

        class OwnCursor(psycopg.AsyncServerCursor[Any]):
            pass

        conn.server_cursor_factory = OwnCursor
        async with conn.cursor("own") as own:
            assert type(own) is OwnCursor


async def test_closing_a_server_cursor_that_is_gone(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn, conn.transaction(force_rollback=True):
        with pytest.raises(errors.InvalidCursorName):
            async with conn.cursor("named") as cursor:
                await cursor.execute("SELECT 1")
                await conn.execute("CLOSE named")
        await cursor.close()


async def test_a_server_cursor_closed_and_cancelled_while_another_task_works(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn, anyio.create_task_group() as tasks:
        with anyio.move_on_after(0.1) as scope:
            async with conn.cursor("named", withhold=True) as cursor:
                await cursor.execute("SELECT 1")
                tasks.start_soon(sleep_shielded, conn)
                await anyio.sleep(0.02)
        assert scope.cancelled_caught
        assert cursor.closed
        with anyio.move_on_after(0.1) as scope:
            async with conn.pipeline():
                tasks.start_soon(sleep_shielded, conn)
                await anyio.sleep(0.02)
        assert not conn.pgconn.pipeline_status


async def test_server_cursors_of_a_lost_connection(pg_dsn: str, pg_cluster: Cluster) -> None:
    async with connected(pg_dsn) as conn:
        with pytest.raises(ZeroDivisionError):
            async with conn.cursor("named", withhold=True) as cursor:
                await cursor.execute("SELECT 1")
                pg_cluster.terminate_backend(conn.info.backend_pid)
                raise ZeroDivisionError
        assert cursor.closed
        assert isinstance(conn.failure, errors.AdminShutdown)
    async with connected(pg_dsn) as conn:
        cursor = conn.cursor("named", withhold=True)
        await cursor.execute("SELECT 1")
        await conn.aclose()
        await cursor.close()
        assert cursor.closed


# ---------------------------------------------------------------- after_commit


async def test_after_commit(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        called: list[str] = []
        conn.after_commit(lambda: called.append("at once"))
        assert called == ["at once"]
        async with conn.transaction():
            conn.after_commit(lambda: called.append("outer"))
            async with conn.transaction():
                conn.after_commit(lambda: called.append("inner"))
            with pytest.raises(ZeroDivisionError):
                async with conn.transaction():
                    conn.after_commit(lambda: called.append("rolled back inside"))
                    raise ZeroDivisionError
            async with conn.transaction(force_rollback=True):
                conn.after_commit(lambda: called.append("rolled back always"))
            assert called == ["at once"]
        assert called == ["at once", "outer", "inner"]
        del called[:]
        with pytest.raises(ZeroDivisionError):
            async with conn.transaction():
                conn.after_commit(lambda: called.append("rolled back"))
                raise ZeroDivisionError
        async with conn.transaction():
            conn.after_commit(lambda: called.append("in error, so not committed"))
            with pytest.raises(errors.DivisionByZero):
                await conn.execute("SELECT 1/0")
        async with conn.pipeline(), conn.transaction():
            conn.after_commit(lambda: called.append("piped"))
            await conn.execute("SELECT 1")
            assert called == []
        assert called == ["piped"]


async def test_after_commit_in_a_transaction_that_sql_has_ended(pg_dsn: str) -> None:
    """Nobody can tell how it ended, so it is not run: least of all for another's commit."""
    async with connected(pg_dsn) as conn:
        called: list[str] = []
        await conn.execute("BEGIN")
        conn.after_commit(lambda: called.append("rolled back"))
        await conn.execute("ROLLBACK")
        async with conn.transaction():
            conn.after_commit(lambda: called.append("another"))
        assert called == ["another"]


@pytest.mark.parametrize("end", ["ROLLBACK", "COMMIT"])
async def test_after_commit_without_autocommit_where_sql_ends_it(pg_dsn: str, end: str) -> None:
    async with connected(pg_dsn, autocommit=False) as conn:
        called: list[str] = []

        async def leave_behind() -> None:
            await conn.execute("SELECT 1")
            conn.after_commit(lambda: called.append("of a transaction that SQL has ended"))
            await conn.execute(end)

        await leave_behind()
        await conn.commit()  # of nothing
        await leave_behind()
        conn.after_commit(lambda: called.append("before the next one"))
        await conn.execute("SELECT 1")
        conn.after_commit(lambda: called.append("in it"))
        await conn.commit()
        assert called == ["before the next one", "in it"]
        await leave_behind()
        with pytest.raises(ZeroDivisionError):
            async with conn.transaction():
                conn.after_commit(lambda: called.append("rolled back"))
                raise ZeroDivisionError
        async with conn.transaction():
            conn.after_commit(lambda: called.append("a block"))
        assert called == ["before the next one", "in it", "a block"]


async def test_after_commit_without_autocommit(pg_dsn: str) -> None:
    async with connected(pg_dsn, autocommit=False) as conn:
        called: list[str] = []
        conn.after_commit(lambda: called.append("first"))
        await conn.execute("SELECT 1")
        async with conn.transaction():
            conn.after_commit(lambda: called.append("savepoint"))
        assert called == []
        await conn.commit()
        assert called == ["first", "savepoint"]
        await conn.execute("SELECT 1")
        conn.after_commit(lambda: called.append("rolled back"))
        await conn.rollback()
        with pytest.raises(errors.DivisionByZero):
            await conn.execute("SELECT 1/0")
        conn.after_commit(lambda: called.append("in error"))
        await conn.commit()
        await conn.commit()
        assert called == ["first", "savepoint"]
        await conn.execute("CREATE TABLE t (i int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        await conn.execute("INSERT INTO t VALUES (1), (1)")
        conn.after_commit(lambda: called.append("refused"))
        with pytest.raises(errors.UniqueViolation):
            await conn.commit()
        await conn.commit()
        assert called == ["first", "savepoint"]


async def test_after_commit_callbacks_that_raise(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        called: list[str] = []

        def explode() -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            async with conn.transaction():
                conn.after_commit(explode)
                conn.after_commit(lambda: called.append("all the same"))
        assert called == ["all the same"]
        with pytest.raises(ExceptionGroup) as caught:
            async with conn.transaction():
                conn.after_commit(explode)
                conn.after_commit(explode)
        assert len(caught.value.exceptions) == 2
        assert conn.pgconn.transaction_status == IDLE


@pytest.mark.parametrize("operation", ["commit", "transaction", "tpc_commit"])
async def test_after_commit_when_cancelled_while_committing(
    pg_dsn: str, fault_proxy: FaultProxy, operation: str
) -> None:
    called: list[str] = []

    def explode() -> None:
        called.append("called")
        raise ZeroDivisionError

    async with connected(fault_proxy.dsn(pg_dsn), autocommit=False) as conn:

        async def run() -> None:
            if operation == "commit":
                await conn.execute("SELECT 1")
                conn.after_commit(explode)
                await conn.commit()
            elif operation == "tpc_commit":
                await conn.rollback()
                await conn.tpc_begin("a")
                conn.after_commit(explode)
                await conn.tpc_commit()
            else:
                async with conn.transaction():
                    conn.after_commit(explode)

        await run_until_commit_is_held(run, fault_proxy)
        assert called == ["called"]
        assert conn.pgconn.transaction_status == IDLE


async def test_after_commit_when_cancelled_while_a_pipeline_commits(
    pg_dsn: str, fault_proxy: FaultProxy
) -> None:
    called: list[str] = []
    async with connected(fault_proxy.dsn(pg_dsn)) as conn:

        async def run() -> None:
            async with conn.pipeline(), conn.transaction():
                conn.after_commit(lambda: called.append("called"))
                await conn.execute("SELECT 1")

        await run_until_commit_is_held(run, fault_proxy)
        assert called == ["called"]


async def test_after_commit_when_cancelled_while_a_savepoint_is_released(
    pg_dsn: str, fault_proxy: FaultProxy
) -> None:
    called: list[str] = []
    async with connected(fault_proxy.dsn(pg_dsn)) as conn:

        async def run() -> None:
            async with conn.transaction(), conn.transaction():
                conn.after_commit(lambda: called.append("called"))

        await run_until_commit_is_held(run, fault_proxy, b"RELEASE")
        assert called == []
        assert conn.pgconn.transaction_status == IDLE


async def run_until_commit_is_held(run: Any, proxy: FaultProxy, pattern: bytes = b"COMMIT") -> None:
    """Cancel ``run`` while the answer to its COMMIT is on the way."""
    proxy.hold(pattern)
    async with anyio.create_task_group() as tasks:
        scope = anyio.CancelScope()

        async def cancel() -> None:
            await anyio.to_thread.run_sync(proxy.wait_held)
            scope.cancel()
            await anyio.sleep(0.05)
            proxy.release()

        tasks.start_soon(cancel)
        with scope:
            await run()
        assert scope.cancelled_caught


# ---------------------------------------------------------------- psycopg's own


async def test_it_is_psycopgs(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        assert isinstance(conn, psycopg.AsyncConnection)
        assert "pgstructured.driver.Connection" in repr(conn)
        assert type(conn.cursor()) is psycopg.AsyncCursor
        assert conn.cursor_factory is psycopg.AsyncCursor
        assert conn.server_cursor_factory is psycopg.AsyncServerCursor
        async with conn.pipeline() as pipeline:
            assert "psycopg.AsyncPipeline" in repr(pipeline)
        info = await psycopg.types.TypeInfo.fetch(conn, "int4")
        assert info is not None
        assert info.oid == 23


async def test_notices(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        heard: list[str | None] = []
        conn.add_notice_handler(lambda diagnostic: heard.append(diagnostic.message_primary))
        await conn.execute("DO $$ BEGIN RAISE NOTICE 'hello'; END $$")
        assert heard == ["hello"]


async def test_copy_in_a_pipeline(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        with pytest.raises(psycopg.NotSupportedError):
            async with conn.pipeline() as pipeline:
                await conn.execute("COPY (SELECT repeat('x', 100000)) TO STDOUT")
                await anyio.sleep(0.1)
                await pipeline.sync()
        # psycopg leaves such a connection neither in a pipeline nor out of it.
        assert conn.state is ConnectionState.FAILED


# What the server finds out at a commit only, which in autocommit is a Sync.
DEFERRED = "CREATE TABLE deferred (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)"
BREAK = "INSERT INTO deferred VALUES (1)"


async def at_the_end(conn: Connection[Any]) -> None:
    async with conn.pipeline():
        await conn.execute(BREAK)


async def at_the_end_of_a_nested_one(conn: Connection[Any]) -> None:
    async with conn.pipeline(), conn.pipeline():
        await conn.execute(BREAK)


async def at_a_sync(conn: Connection[Any]) -> None:
    async with conn.pipeline() as pipeline:
        await conn.execute(BREAK)
        with pytest.raises(errors.UniqueViolation):
            await pipeline.sync()
        # And it goes on.
        assert await value(conn, "SELECT 2") == 2
        await conn.execute(BREAK)
        await pipeline.sync()


async def while_others_are_sent(conn: Connection[Any]) -> None:
    async with conn.pipeline() as pipeline:
        await conn.execute(BREAK)
        pipeline._enqueue_sync()
        await conn.wait(pipeline._communicate_gen())
        await_bytes(conn)
        await conn.execute("SELECT 1")
        raise AssertionError("it was there to be read")


async def before_a_transaction(conn: Connection[Any]) -> None:
    async with conn.pipeline():
        await conn.execute(BREAK)
        async with conn.transaction():
            raise AssertionError("entering it syncs")


async def of_many(conn: Connection[Any]) -> None:
    await conn.cursor().executemany("INSERT INTO deferred VALUES (%s)", [(2,), (1,)])


@pytest.mark.parametrize(
    "run",
    [
        at_the_end,
        at_the_end_of_a_nested_one,
        at_a_sync,
        while_others_are_sent,
        before_a_transaction,
        of_many,
    ],
)
async def test_what_is_found_at_the_commit_of_a_pipeline(
    pg_dsn: str, run: Callable[[Connection[Any]], Awaitable[None]]
) -> None:
    """Its error comes before the Sync's own result, which made the books wrong."""
    async with connected(pg_dsn) as conn:
        await conn.execute(DEFERRED)
        await conn.execute(BREAK)
        for _ in range(2):
            with pytest.raises(errors.UniqueViolation):
                await run(conn)
            assert conn.state is ConnectionState.OPEN
            assert not conn.pgconn.pipeline_status
            assert conn.info.transaction_status == IDLE
            assert await value(conn, "SELECT count(*) FROM deferred") == 1


async def test_what_is_found_at_the_commit_of_a_pipeline_that_has_failed(pg_dsn: str) -> None:
    """By its body, by another statement, or by a cancellation: that is what counts."""
    async with connected(pg_dsn) as conn:
        await conn.execute(DEFERRED)
        await conn.execute(BREAK)
        with pytest.raises(KeyError):
            async with conn.pipeline():
                await conn.execute(BREAK)
                raise KeyError
        with pytest.raises(errors.DivisionByZero):
            async with conn.pipeline():
                await conn.execute(BREAK)
                await conn.execute("SELECT 1/0")
        with anyio.CancelScope() as scope:
            async with conn.pipeline():
                await conn.execute(BREAK)
                scope.cancel()
                await checkpoint()
        assert scope.cancelled_caught
        assert conn.state is ConnectionState.OPEN
        assert await value(conn, "SELECT count(*) FROM deferred") == 1


async def test_a_pipeline_that_ends_with_an_error(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        with pytest.raises(errors.DivisionByZero):
            async with conn.pipeline():
                await conn.execute("SELECT 1/0")
                await conn.execute("SELECT 2")
        with pytest.raises(KeyError):
            async with conn.pipeline():
                await conn.execute("SELECT 1/0")
                raise KeyError
        with pytest.raises(errors.DivisionByZero):
            async with conn.pipeline():
                await conn.execute("SELECT 1/0")
                async with conn.pipeline():
                    raise AssertionError("entering it syncs")
        await conn.execute("LISTEN here")
        heard: list[str] = []
        conn.add_notify_handler(lambda notification: heard.append(notification.channel))
        async with connected(pg_dsn) as other, conn.pipeline():
            await other.execute("NOTIFY here")
            await_bytes(conn)
            await conn.execute("SELECT 1")
            assert heard == ["here"]

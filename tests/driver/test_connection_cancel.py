"""Every operation of a `Connection`, cancelled: usable at once, or FAILED within the bound."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

import anyio
import psycopg
import pytest
from anyio.lowlevel import checkpoint

from pgstructured.driver import Connection, ConnectionState, connect
from pgstructured.errors import ConnectionLostError

if TYPE_CHECKING:
    from pgstructured.testing import Cluster, FaultProxy

IDLE = psycopg.pq.TransactionStatus.IDLE

Operation = Callable[[Connection[Any]], Awaitable[object]]
OPERATIONS: dict[str, Operation] = {}

PATIENCE = 15
"""Seconds that nothing here takes on any machine; less than what runs on would take."""

BIG = "SELECT i, repeat('x', 1000) FROM generate_series(1, 1000000) AS t(i)"


def operation(function: Operation) -> Operation:
    OPERATIONS[function.__name__] = function
    return function


@operation
async def execute(conn: Connection[Any]) -> None:
    await conn.execute("SELECT pg_sleep(30)")


@operation
async def execute_big_result(conn: Connection[Any]) -> None:
    while True:
        await conn.execute("SELECT i, repeat('x', 100) FROM generate_series(1, 20000) AS t(i)")


@operation
async def execute_big_parameter(conn: Connection[Any]) -> None:
    while True:
        await conn.execute("SELECT length(%s), pg_sleep(0.01)", ["x" * 2_000_000])


@operation
async def execute_not_in_autocommit(conn: Connection[Any]) -> None:
    await conn.set_autocommit(False)
    try:
        await conn.execute("SELECT pg_sleep(30)")
    finally:
        with anyio.CancelScope(shield=True):
            if conn.state is ConnectionState.OPEN:
                await conn.rollback()
                await conn.set_autocommit(True)


@operation
async def prepare(conn: Connection[Any]) -> None:
    await conn.execute("SELECT pg_sleep(%s)", [30], prepare=True)


@operation
async def executemany(conn: Connection[Any]) -> None:
    await conn.cursor().executemany("SELECT pg_sleep(%s)", [(30,), (30,)])


@operation
async def executemany_many(conn: Connection[Any]) -> None:
    await conn.cursor().executemany(
        "SELECT %s, pg_sleep(0.001)", ((i,) for i in range(1_000_000)), returning=False
    )


@operation
async def transaction_body(conn: Connection[Any]) -> None:
    async with conn.transaction():
        await conn.execute("INSERT INTO kept VALUES (1)")
        await anyio.sleep(30)


@operation
async def transaction_statement(conn: Connection[Any]) -> None:
    async with conn.transaction():
        await conn.execute("INSERT INTO kept VALUES (1)")
        await conn.execute("SELECT pg_sleep(30)")


@operation
async def transaction_nested(conn: Connection[Any]) -> None:
    async with conn.transaction():
        await conn.execute("INSERT INTO kept VALUES (1)")
        async with conn.transaction("inner"):
            await conn.execute("INSERT INTO kept VALUES (2)")
            async with conn.transaction():
                await conn.execute("SELECT pg_sleep(30)")


@operation
async def transaction_commit(conn: Connection[Any]) -> None:
    async with conn.transaction():
        await conn.execute("INSERT INTO slow VALUES (1)")
        # The deferred trigger sleeps in COMMIT.
    await anyio.sleep(30)


@operation
async def commit(conn: Connection[Any]) -> None:
    try:
        await conn.execute("BEGIN")
        await conn.execute("INSERT INTO slow VALUES (1)")
        await conn.commit()
        await anyio.sleep(30)
    finally:
        # Cancelled before it came to the commit, it is still open.
        with anyio.CancelScope(shield=True):
            if conn.state is ConnectionState.OPEN:
                await conn.rollback()


@operation
async def transaction_in_pipeline(conn: Connection[Any]) -> None:
    async with conn.pipeline(), conn.transaction():
        await conn.execute("INSERT INTO kept VALUES (1)")
        cursor = await conn.execute("SELECT pg_sleep(30)")
        await cursor.fetchall()


@operation
async def pipeline_fetch(conn: Connection[Any]) -> None:
    async with conn.pipeline():
        cursors = [await conn.execute("SELECT pg_sleep(30)") for _ in range(3)]
        await cursors[2].fetchall()


@operation
async def pipeline_exit(conn: Connection[Any]) -> None:
    async with conn.pipeline():
        await conn.execute("SELECT pg_sleep(30)")


@operation
async def pipeline_body(conn: Connection[Any]) -> None:
    async with conn.pipeline():
        await conn.execute("SELECT pg_sleep(30)")
        await anyio.sleep(30)


@operation
async def pipeline_nested(conn: Connection[Any]) -> None:
    async with conn.pipeline():
        await conn.execute("SELECT pg_sleep(30)")
        async with conn.pipeline():
            raise AssertionError("entering it syncs, and that takes 30 s")


@operation
async def pipeline_sync(conn: Connection[Any]) -> None:
    async with conn.pipeline() as pipeline:
        await conn.execute("SELECT pg_sleep(30)")
        await pipeline.sync()


@operation
async def copy_in(conn: Connection[Any]) -> None:
    async with conn.cursor().copy("COPY copied FROM STDIN") as copy:
        while True:
            await copy.write(b"x" * 10_000 + b"\n")


@operation
async def copy_in_body(conn: Connection[Any]) -> None:
    async with conn.cursor().copy("COPY copied FROM STDIN") as copy:
        await copy.write_row(["x"])
        await anyio.sleep(30)


@operation
async def copy_out(conn: Connection[Any]) -> None:
    async with conn.cursor().copy(f"COPY ({BIG}) TO STDOUT") as copy:
        while await copy.read():
            pass
        raise AssertionError("not so soon")


@operation
async def copy_out_body(conn: Connection[Any]) -> None:
    async with conn.cursor().copy(f"COPY ({BIG}) TO STDOUT") as copy:
        await copy.read()
        await anyio.sleep(30)


@operation
async def copy_out_start(conn: Connection[Any]) -> None:
    async with conn.cursor().copy("COPY (SELECT pg_sleep(30)) TO STDOUT") as copy:
        await copy.read()


@operation
async def stream(conn: Connection[Any]) -> None:
    async with aclosing(cast("AsyncGenerator[Any]", conn.cursor().stream(BIG))) as rows:
        async for _ in rows:
            await checkpoint()


@operation
async def stream_body(conn: Connection[Any]) -> None:
    async with aclosing(cast("AsyncGenerator[Any]", conn.cursor().stream(BIG, size=100))) as rows:
        async for _ in rows:
            await anyio.sleep(30)


@operation
async def server_cursor_fetch(conn: Connection[Any]) -> None:
    async with conn.transaction(), conn.cursor("named") as cursor:
        await cursor.execute("SELECT pg_sleep(30)")
        await cursor.fetchall()


@operation
async def server_cursor_body(conn: Connection[Any]) -> None:
    async with conn.cursor("named", withhold=True) as cursor:
        await cursor.execute("SELECT 1")
        await anyio.sleep(30)


@operation
async def notifies(conn: Connection[Any]) -> None:
    await conn.execute("LISTEN here")
    async with aclosing(conn.notifies()) as notifications:
        async for _ in notifications:
            raise AssertionError("nobody notifies")


@operation
async def two_tasks(conn: Connection[Any]) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(conn.execute, "SELECT pg_sleep(30)")
        tasks.start_soon(conn.execute, "SELECT pg_sleep(30)")


SPEECHLESS = {
    # A server that is killed while it sends or receives a lot can't say why.
    OPERATIONS[name]
    for name in OPERATIONS
    if name.startswith(("copy", "stream", "execute_big", "executemany_many"))
}

NAP = """
CREATE OR REPLACE FUNCTION nap() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_sleep({seconds}); RETURN NULL; END $$;
"""
SCHEMA = f"""
CREATE TABLE kept (i int);
CREATE TABLE copied (t text);
CREATE TABLE slow (i int);
{NAP.format(seconds=0.4)}
CREATE CONSTRAINT TRIGGER naps AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION nap();
"""


@pytest.fixture
def dsn(pg_dsn: str) -> str:
    with psycopg.connect(pg_dsn, autocommit=True) as conn:
        conn.execute(SCHEMA)
    return pg_dsn


@asynccontextmanager
async def connected(dsn: str, **options: Any) -> AsyncGenerator[Connection[Any]]:
    conn = await connect(dsn, **options)
    try:
        yield conn
    finally:
        await conn.aclose()


async def for_each_operation(check: Callable[[Operation], Awaitable[object]], *names: str) -> None:
    """Run ``check`` for every operation at the same time, each on a connection of its own."""

    async def check_one(name: str) -> None:
        try:
            with anyio.fail_after(2 * PATIENCE):
                await check(OPERATIONS[name])
        except BaseException as exc:
            exc.add_note(f"operation: {name}")
            raise

    async with anyio.create_task_group() as tasks:
        for name in names or OPERATIONS:
            tasks.start_soon(check_one, name)


def end_sessions(cluster: Cluster, dsn: str) -> None:
    """End the sessions that can't have heard that we are gone."""
    for session in cluster.sessions(dsn):
        cluster.terminate_backend(session.pid)


async def see_sessions_end(cluster: Cluster, dsn: str) -> None:
    """Nothing runs on; a session ends a moment after its socket was closed."""
    sessions = cluster.sessions(dsn)
    with anyio.move_on_after(PATIENCE):
        while sessions:
            await anyio.sleep(0.01)
            sessions = cluster.sessions(dsn)
    assert sessions == []


async def assert_usable(conn: Connection[Any]) -> None:
    assert conn.state is ConnectionState.OPEN, conn.failure
    assert conn.pgconn.transaction_status == IDLE
    assert not conn.pgconn.pipeline_status
    assert conn._num_transactions == 0
    cursor = await conn.execute("SELECT %s::int", [42])
    assert await cursor.fetchone() == (42,)
    async with conn.transaction(), conn.pipeline():
        await conn.execute("SELECT 1")
    cursor = await conn.execute("SELECT count(*) FROM kept")
    assert await cursor.fetchone() == (0,)


@pytest.mark.parametrize("delay", [0.0, 0.1])
async def test_a_cancelled_operation_leaves_a_usable_connection(dsn: str, delay: float) -> None:
    async def check(run: Operation) -> None:
        async with connected(dsn, cancel_timeout=PATIENCE) as conn:  # many at once
            with anyio.move_on_after(delay) as scope:
                await run(conn)
                raise AssertionError("it was to be cancelled")
            assert scope.cancelled_caught
            await assert_usable(conn)

    await for_each_operation(check)


async def test_a_pending_cancellation_is_noticed_before_anything_is_sent(dsn: str) -> None:
    async with connected(dsn) as conn:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await conn.execute("INSERT INTO kept VALUES (1)")
        assert scope.cancelled_caught
        await assert_usable(conn)


@pytest.mark.parametrize("times", [1, 2])
async def test_native_cancellation(dsn: str, anyio_backend_name: str, times: int) -> None:
    if anyio_backend_name != "asyncio":
        pytest.skip("native cancellation is asyncio's")
    import asyncio

    async def check(run: Operation) -> None:
        async with connected(dsn, cancel_timeout=PATIENCE) as conn:  # many at once
            task = asyncio.ensure_future(run(conn))
            await anyio.sleep(0.1)
            for _ in range(times):
                task.cancel()
                await checkpoint()
                await checkpoint()
            with pytest.raises(asyncio.CancelledError):
                await task
            await assert_usable(conn)

    await for_each_operation(check)


async def test_a_cancelled_operation_on_a_frozen_network_ends_within_the_bound(
    dsn: str, fault_proxy: FaultProxy, pg_cluster: Cluster
) -> None:
    # Stock psycopg hangs here: its issue 1371.
    with psycopg.connect(dsn, autocommit=True) as setup:  # a COMMIT that is still under way then
        setup.execute(NAP.format(seconds=PATIENCE))
    scopes: list[anyio.CancelScope] = []

    async def check(run: Operation) -> None:
        async with connected(fault_proxy.dsn(dsn), cancel_timeout=0.5) as conn:
            raised: psycopg.Error | None = None
            with anyio.CancelScope() as scope:
                scopes.append(scope)
                try:
                    await run(conn)
                except psycopg.Error as exc:
                    raised = exc
            if conn.state is ConnectionState.OPEN:
                # Nothing was in flight when it was cancelled.
                assert run is OPERATIONS["notifies"]
                return
            assert conn.state is ConnectionState.FAILED
            assert conn.resources_released
            if raised is None:
                assert scope.cancelled_caught
            else:
                assert run in {OPERATIONS["commit"], OPERATIONS["transaction_commit"]}
                assert isinstance(raised, ConnectionLostError)
                assert "whether the transaction was committed is unknown" in str(raised)
            with pytest.raises(ConnectionLostError) as caught:
                await conn.execute("SELECT 1")
            assert caught.value.__cause__ is conn.failure
            assert caught.value.sqlstate == "08003"

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(for_each_operation, check)
        while len(scopes) < len(OPERATIONS):  # noqa: ASYNC110 - a counter
            await anyio.sleep(0.01)
        await anyio.sleep(0.5)  # until each is under way
        fault_proxy.freeze()
        await anyio.sleep(0.05)
        cancelled_at = anyio.current_time()
        for scope in scopes:
            scope.cancel()
    assert anyio.current_time() - cancelled_at < PATIENCE
    end_sessions(pg_cluster, dsn)


async def test_a_session_killed_under_an_operation(dsn: str, pg_cluster: Cluster) -> None:
    async def check(run: Operation) -> None:
        async with connected(dsn) as conn:
            pid = conn.info.backend_pid
            async with anyio.create_task_group() as tasks:

                async def kill() -> None:
                    await anyio.sleep(0.2)
                    pg_cluster.terminate_backend(pid)
                    # Operations that are between statements notice only at the next.
                    await anyio.sleep(0.5)
                    tasks.cancel_scope.cancel()

                tasks.start_soon(kill)
                with suppress(psycopg.OperationalError, ExceptionGroup):
                    await run(conn)
            with suppress(psycopg.OperationalError):
                await conn.execute("SELECT 1")
            assert conn.state is ConnectionState.FAILED
            if run not in SPEECHLESS:
                assert isinstance(conn.failure, psycopg.errors.AdminShutdown), repr(conn.failure)
            await conn.wait_closed()

    await for_each_operation(check)


async def test_a_network_reset_under_an_operation(
    dsn: str, fault_proxy: FaultProxy, pg_cluster: Cluster
) -> None:
    scopes: list[anyio.CancelScope] = []

    async def check(run: Operation) -> None:
        async with connected(fault_proxy.dsn(dsn), cancel_timeout=0.5) as conn:
            with anyio.CancelScope() as scope:
                scopes.append(scope)
                with suppress(psycopg.OperationalError, ExceptionGroup):
                    await run(conn)
            with suppress(psycopg.OperationalError):
                await conn.execute("SELECT 1")
            assert conn.state is ConnectionState.FAILED
            assert isinstance(conn.failure, psycopg.OperationalError)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(for_each_operation, check)
        while len(scopes) < len(OPERATIONS):  # noqa: ASYNC110 - a counter
            await anyio.sleep(0.01)
        await anyio.sleep(0.2)
        fault_proxy.reset()
        await anyio.sleep(0.5)
        for scope in scopes:  # operations that are between statements notice only at the next
            scope.cancel()
    end_sessions(pg_cluster, dsn)


async def test_closing_under_an_operation(dsn: str, pg_cluster: Cluster) -> None:
    async def check(run: Operation) -> None:
        async with connected(dsn) as conn:
            conn._close_timeout = PATIENCE  # many at once, and other tests beside them
            async with anyio.create_task_group() as tasks:

                async def close() -> None:
                    await anyio.sleep(0.2)
                    await conn.aclose()
                    assert conn.state is ConnectionState.CLOSED
                    await anyio.sleep(0.5)
                    tasks.cancel_scope.cancel()

                tasks.start_soon(close)
                with pytest.raises((psycopg.OperationalError, ExceptionGroup)) as caught:
                    await run(conn)
                    raise AssertionError(f"it ended well, {conn.state}")
                errors = getattr(caught.value, "exceptions", [caught.value])
                assert {str(error) for error in errors} == {"the connection is closed"}
            assert conn.state is ConnectionState.CLOSED

    await for_each_operation(check)
    await see_sessions_end(pg_cluster, dsn)


@pytest.mark.parametrize(
    "name", ["execute", "executemany", "executemany_many", "pipeline_body", "pipeline_fetch"]
)
async def test_closing_before_the_server_has_begun(
    dsn: str, pg_cluster: Cluster, name: str
) -> None:
    # A cancel request that overtakes its statement is lost, and has to be repeated.
    async with connected(dsn) as conn:
        conn._close_timeout = PATIENCE
        pid = conn.info.backend_pid

        async def run() -> None:
            with suppress(psycopg.OperationalError):
                await OPERATIONS[name](conn)

        async with anyio.create_task_group() as tasks:
            os.kill(pid, signal.SIGSTOP)
            try:
                tasks.start_soon(run)
                await anyio.sleep(0.1)
                tasks.start_soon(conn.aclose)
                await anyio.sleep(0.1)
            finally:
                os.kill(pid, signal.SIGCONT)
            await conn.wait_closed()
            tasks.cancel_scope.cancel()
    await see_sessions_end(pg_cluster, dsn)


async def test_closing_in_an_idle_pipeline_does_not_wait_for_a_sync(dsn: str) -> None:
    async with connected(dsn) as conn:
        conn._close_timeout = 3600.0
        with anyio.fail_after(PATIENCE), pytest.raises(psycopg.OperationalError, match="closed"):
            async with conn.pipeline():
                await conn.execute("INSERT INTO kept VALUES (1)")  # its result waits for a Sync
                await conn.aclose()
    async with connected(dsn) as conn:
        await assert_usable(conn)  # and nothing was kept


async def test_closing_under_an_operation_on_a_frozen_network(
    dsn: str, fault_proxy: FaultProxy, pg_cluster: Cluster
) -> None:
    conns: list[Connection[Any]] = []
    scopes: list[anyio.CancelScope] = []

    async def check(run: Operation) -> None:
        async with connected(fault_proxy.dsn(dsn)) as conn:
            with anyio.CancelScope() as scope:
                conns.append(conn)
                scopes.append(scope)
                with suppress(psycopg.OperationalError, ExceptionGroup):
                    await run(conn)
            await conn.wait_closed()
            assert conn.state is ConnectionState.CLOSED

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(for_each_operation, check)
        while len(conns) < len(OPERATIONS):  # noqa: ASYNC110 - a counter
            await anyio.sleep(0.01)
        await anyio.sleep(0.2)
        fault_proxy.freeze()
        for conn in conns:
            tasks.start_soon(conn.aclose)
        for conn in conns:
            await conn.wait_closed()
        await anyio.sleep(0.5)
        for scope in scopes:  # operations that are between statements notice only at the next
            scope.cancel()
    end_sessions(pg_cluster, dsn)

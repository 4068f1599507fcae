"""`Connection.stream`: rows as they come, pulled, and settled however the stream ends."""

from __future__ import annotations

import gc
import warnings
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import anyio
import psycopg
import pytest
from anyio.lowlevel import checkpoint
from psycopg import errors, rows as factories
from psycopg._capabilities import capabilities

from pgstructured.driver import Connection, ConnectionState, RowStream, _settling, connect
from pgstructured.errors import ConnectionLostError, UnexpectedRowsError
from pgstructured.testing import assert_cancellable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from pgstructured.testing import Cluster, FaultProxy, PgBouncer

IDLE = psycopg.pq.TransactionStatus.IDLE
INTRANS = psycopg.pq.TransactionStatus.INTRANS
INERROR = psycopg.pq.TransactionStatus.INERROR

PATIENCE = 15
"""Seconds that nothing here takes on any machine; less than what runs on would take."""

NUMBERS = "SELECT i FROM generate_series(1, %s) AS t(i)"
BIG = "SELECT i, repeat('x', 1000) FROM generate_series(1, 1000000) AS t(i)"
SLOW = """
SELECT i, repeat('x', 9000), CASE WHEN i > 5 THEN pg_sleep(30) END
FROM generate_series(1, 9) AS t(i)
"""
"""What the server has to say is sent once it is more than 8 kB."""


@asynccontextmanager
async def connected(dsn: str, **options: Any) -> AsyncGenerator[Connection[Any]]:
    conn = await connect(dsn, **options)
    conn._close_timeout = PATIENCE  # or what runs on goes on
    try:
        yield conn
    finally:
        await conn.aclose()


async def assert_usable(conn: Connection[Any]) -> None:
    assert conn.state is ConnectionState.OPEN, conn.failure
    assert conn.pgconn.transaction_status == IDLE
    cursor = await conn.execute("SELECT %s::int", [42])
    assert await cursor.fetchone() == (42,)


# ---------------------------------------------------------------- rows and columns


@pytest.mark.parametrize("batch_size", [1, 3, 100])
async def test_rows_in_order(pg_dsn: str, batch_size: int) -> None:
    async with (
        connected(pg_dsn) as conn,
        conn.stream(NUMBERS, [250], batch_size=batch_size) as rows,
    ):
        assert isinstance(rows, RowStream)
        assert [column.name for column in rows.columns] == ["i"]
        assert [row[0] async for row in rows] == list(range(1, 251))
        for _ in range(2):
            with pytest.raises(anyio.EndOfStream):
                await rows.receive()
        await assert_usable(conn)  # what has ended occupies nothing


async def test_receiving_one_by_one_and_many(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn, conn.stream(NUMBERS, [25], batch_size=10) as rows:
        assert [await rows.receive() for _ in range(12)] == [(i,) for i in range(1, 13)]
        assert await rows.receive_many() == [(i,) for i in range(13, 21)]
        assert await rows.__anext__() == (21,)
        assert await rows.receive_many() == [(i,) for i in range(22, 26)]
        with pytest.raises(anyio.EndOfStream):
            await rows.receive_many()
        with pytest.raises(anyio.EndOfStream):
            await rows.receive_many()
    with pytest.raises(anyio.ClosedResourceError):
        await rows.receive()
    with pytest.raises(anyio.ClosedResourceError):
        await rows.receive_many()
    with pytest.raises(anyio.ClosedResourceError):
        await rows.__anext__()


async def test_columns_of_no_rows(pg_dsn: str) -> None:
    async with (
        connected(pg_dsn) as conn,
        conn.stream("SELECT 1 AS one, 'x' AS two WHERE false") as rows,
    ):
        assert [(column.name, column.type_display) for column in rows.columns] == [
            ("one", "int4"),
            ("two", "text"),
        ]
        await assert_usable(conn)
        with pytest.raises(anyio.EndOfStream):
            await rows.receive()


@pytest.mark.parametrize("statement", ["CREATE TABLE t (i int)", "", "-- nothing"])
async def test_statements_without_a_result(pg_dsn: str, statement: str) -> None:
    async with connected(pg_dsn) as conn:
        async with conn.stream(statement) as rows:
            assert rows.columns == ()
            assert [row async for row in rows] == []
        async with conn.stream("SELECT FROM generate_series(1, 2)") as rows:
            assert rows.columns == ()
            assert [row async for row in rows] == [(), ()]


async def test_rows_are_psycopgs(pg_dsn: str) -> None:
    async with (
        connected(pg_dsn, row_factory=factories.dict_row) as conn,
        conn.stream("SELECT %(a)s::numeric AS a, ARRAY[1, 2] AS b", {"a": "1.50"}) as rows,
    ):
        (row,) = [row async for row in rows]
        assert {key: str(value) for key, value in row.items()} == {"a": "1.50", "b": "[1, 2]"}


async def test_libpq_before_17_gives_rows_one_by_one(
    pg_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capabilities, "has_stream_chunked", lambda *, check=False: check)
    async with connected(pg_dsn) as conn, conn.stream(NUMBERS, [5]) as rows:
        assert await rows.receive_many() == [(1,)]
        assert [row[0] async for row in rows] == [2, 3, 4, 5]


async def test_without_autocommit_a_transaction_is_begun(pg_dsn: str) -> None:
    async with connected(pg_dsn, autocommit=False) as conn:
        async with conn.stream(NUMBERS, [3]) as rows:
            assert [row[0] async for row in rows] == [1, 2, 3]
            assert conn.pgconn.transaction_status == INTRANS
        await conn.rollback()
        await assert_usable_in_transaction(conn)


async def assert_usable_in_transaction(conn: Connection[Any]) -> None:
    await conn.execute("SELECT 1")
    await conn.rollback()
    assert conn.pgconn.transaction_status == IDLE


async def test_through_a_transaction_pooler(pgbouncer_transaction: PgBouncer, pg_dsn: str) -> None:
    async with connected(pgbouncer_transaction.dsn(pg_dsn)) as conn:
        async with conn.stream(NUMBERS, [1000]) as rows:
            assert len([row async for row in rows]) == 1000
        async with conn.stream(BIG) as rows:
            await rows.receive()
        await assert_usable(conn)


async def test_bad_options(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
            async with conn.stream("SELECT 1", batch_size=0):
                pass
        async with conn.pipeline():
            with pytest.raises(psycopg.ProgrammingError, match="pipeline"):
                async with conn.stream("SELECT 1"):
                    pass
        with pytest.raises(TypeError, match="no public constructor"):
            RowStream(conn, 100)
        await assert_usable(conn)


# ---------------------------------------------------------------- one at a time


async def test_other_operations_meanwhile(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        async with conn.stream(BIG) as rows:
            await rows.receive()
            for operation in (
                lambda: conn.execute("SELECT 1"),
                lambda: conn.execute_no_rows("SELECT 1"),
                lambda: conn.cursor().executemany("SELECT %s", [(1,)]),
                conn.commit,
                conn.rollback,
                lambda: conn.transaction().__aenter__(),
                lambda: conn.pipeline().__aenter__(),
                lambda: conn.stream("SELECT 1").__aenter__(),
                lambda: conn.copy_in("COPY t FROM STDIN").__aenter__(),
                lambda: conn.copy_out("COPY t TO STDOUT").__aenter__(),
                lambda: conn.copy_in_rows("t", ["a"], []),
                lambda: conn.set_autocommit(False),
            ):
                with pytest.raises(anyio.BusyResourceError, match="streaming from"):
                    await operation()
            assert (await rows.receive())[0] == 2
        await assert_usable(conn)


async def test_what_is_being_left_is_waited_for(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn, anyio.create_task_group() as tasks:
        async with conn.stream(SLOW, batch_size=1) as rows:
            await rows.receive()

            async def use() -> None:
                while not rows._occupation.is_over:
                    await checkpoint()
                assert conn._lock.locked()
                await conn.execute("SELECT 1")

            tasks.start_soon(use)


async def test_a_second_task_that_receives(pg_dsn: str) -> None:
    async with (
        connected(pg_dsn) as conn,
        conn.stream(SLOW, batch_size=1) as rows,
        anyio.create_task_group() as tasks,
    ):
        await rows.receive()

        async def receive() -> None:
            with pytest.raises(anyio.ClosedResourceError):
                while True:
                    await rows.receive()

        tasks.start_soon(receive)
        while not rows._occupation._is_running:
            await checkpoint()
        with pytest.raises(anyio.BusyResourceError):
            await rows.receive()
        with pytest.raises(anyio.BusyResourceError):
            await rows.__anext__()
        # The one that waits is woken, and the statement cancelled.
        with anyio.fail_after(PATIENCE):
            await rows.aclose()
        await assert_usable(conn)


async def test_a_task_that_receives_and_a_server_that_is_gone(
    pg_dsn: str, fault_proxy: FaultProxy, pg_cluster: Cluster
) -> None:
    async with connected(fault_proxy.dsn(pg_dsn), cancel_timeout=0.3) as conn:
        async with anyio.create_task_group() as tasks:
            async with conn.stream(SLOW, batch_size=1) as rows:
                await rows.receive()

                async def receive() -> None:
                    with pytest.raises((ConnectionLostError, anyio.ClosedResourceError)):
                        while True:
                            await rows.receive()

                tasks.start_soon(receive)
                await anyio.sleep(0.3)  # mostly it waits for the server then
                fault_proxy.freeze()
            assert conn.state is ConnectionState.FAILED
    for session in pg_cluster.sessions(pg_dsn):
        pg_cluster.terminate_backend(session.pid)


# ---------------------------------------------------------------- leaving early


async def test_what_is_small_is_read_to_its_end(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        async with conn.transaction():
            async with conn.stream(NUMBERS, [150]) as rows:
                assert await rows.receive() == (1,)
            assert conn.pgconn.transaction_status == INTRANS
            await conn.execute("SELECT 1")
        async with conn.stream("SELECT 1 / (3 - i) FROM generate_series(1, 9) t(i)", batch_size=1):
            pass  # what went wrong behind was nobody's
        await assert_usable(conn)


async def test_what_is_big_is_cancelled(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        async with conn.stream(BIG) as rows:
            assert (await rows.receive())[0] == 1
        await assert_usable(conn)
        with pytest.raises(errors.InFailedSqlTransaction):
            async with conn.transaction():
                async with conn.stream(BIG) as rows:
                    await rows.receive()
                assert conn.pgconn.transaction_status == INERROR
                await conn.execute("SELECT 1")
        await assert_usable(conn)


async def test_what_is_slow_is_cancelled(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        with anyio.fail_after(PATIENCE):
            async with conn.stream(SLOW, batch_size=1) as rows:
                await rows.receive()
        await assert_usable(conn)


async def test_closing_a_stream_early(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn, conn.stream(BIG) as rows:
        await rows.receive()
        for _ in range(2):
            await rows.aclose()
        await assert_usable(conn)
        with pytest.raises(anyio.ClosedResourceError):
            await rows.receive()


async def test_a_body_that_raises(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        with pytest.raises(ZeroDivisionError):
            async with conn.stream(BIG) as rows:
                async for _ in rows:
                    raise ZeroDivisionError
        await assert_usable(conn)


async def test_leaving_when_the_session_has_ended(pg_dsn: str, pg_cluster: Cluster) -> None:
    async with connected(pg_dsn) as conn:
        async with conn.stream(SLOW, batch_size=1) as rows:
            await rows.receive()
            pg_cluster.terminate_backend(conn.info.backend_pid)
        assert conn.state is ConnectionState.FAILED
        assert isinstance(conn.failure, errors.AdminShutdown)


@pytest.mark.parametrize("query", [SLOW, BIG])
async def test_leaving_on_a_frozen_network(
    pg_dsn: str, fault_proxy: FaultProxy, pg_cluster: Cluster, query: str
) -> None:
    async with connected(fault_proxy.dsn(pg_dsn), cancel_timeout=0.3) as conn:
        with anyio.fail_after(PATIENCE):
            async with conn.stream(query, batch_size=1) as rows:
                await rows.receive()
                fault_proxy.freeze()
        assert conn.state is ConnectionState.FAILED
        assert "no answer" in str(conn.failure)
    for session in pg_cluster.sessions(pg_dsn):
        pg_cluster.terminate_backend(session.pid)


async def test_a_paused_reader_makes_the_server_wait(pg_dsn: str, pg_cluster: Cluster) -> None:
    async with connected(pg_dsn) as conn, conn.stream(BIG) as rows:
        await rows.receive()
        with anyio.fail_after(PATIENCE):
            while pg_cluster.execute(  # noqa: ASYNC110 - the server's word
                "SELECT wait_event FROM pg_stat_activity WHERE pid = %s", [conn.info.backend_pid]
            ) != [("ClientWrite",)]:
                await anyio.sleep(0.01)


@pytest.mark.parametrize(
    ("how", "statement", "state"),
    [
        ("stream", BIG, "failed"),
        ("stream", "SELECT 1 WHERE false", "open"),
        ("copy_out", f"COPY ({BIG}) TO STDOUT", "failed"),
        ("copy_in", "COPY t FROM STDIN", "failed"),
    ],
)
async def test_an_abandoned_coroutine(
    pg_dsn: str, pauses: Any, how: str, statement: str, state: str
) -> None:
    """Also of COPY: nothing can be awaited any more."""
    async with connected(pg_dsn) as conn:
        await conn.execute("CREATE TABLE t (a int)")

        async def pause() -> None:
            async with getattr(conn, how)(statement):
                await pauses.pause()

        await pauses.run(paused := pause())
        paused.close()
        assert not conn._lock.locked()
        assert conn.state == state


@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "forgotten"])
@pytest.mark.parametrize("is_wrapped", [True, False], ids=["wrapped", "bare"])
@pytest.mark.parametrize(
    ("how", "statement"),
    [
        ("stream", BIG),
        ("copy_out", f"COPY ({BIG}) TO STDOUT"),
        ("copy_in", "COPY t FROM STDIN"),
    ],
)
async def test_a_generator_that_is_left(
    pg_dsn: str, how: str, statement: str, is_wrapped: bool, is_closed: bool
) -> None:
    """Also of COPY: unlike a coroutine it may await at its end, so the connection settles."""
    async with connected(pg_dsn) as conn:
        await conn.execute("CREATE TABLE t (a int)")

        @asynccontextmanager
        async def wrapped() -> AsyncGenerator[Any]:
            async with getattr(conn, how)(statement) as opened:
                yield opened

        async def generate() -> AsyncGenerator[Any]:
            async with wrapped() if is_wrapped else getattr(conn, how)(statement) as opened:
                if how == "copy_in":
                    await opened.send(b"1\n")
                yield opened

        generator = generate()
        await anext(generator)
        if is_closed:
            await generator.aclose()
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)  # trio's
                del generator
                gc.collect()
            with anyio.fail_after(PATIENCE):
                while conn._lock.locked():  # noqa: ASYNC110 - the event loop closes it
                    await anyio.sleep(0.01)
        await assert_usable(conn)
        cursor = await conn.execute("SELECT count(*) FROM t")
        assert await cursor.fetchone() == (0,)


async def test_a_receiver_that_is_abandoned(
    pg_dsn: str, pauses: Any, anyio_backend_name: str
) -> None:
    if anyio_backend_name != "asyncio":
        pytest.skip("needs an awaitable that can be left alone")
    async with connected(pg_dsn) as conn:

        async def receive() -> None:
            # Nobody can be told, so the server goes on until it has something to say.
            async with conn.stream(SLOW.replace("30", "1"), batch_size=1) as rows:
                await pauses.pause()
                while True:
                    await rows.receive()

        await pauses.run(receiving := receive())
        await anyio.sleep(0.1)
        receiving.send(None)  # up to a wait, of which nobody will hear
        receiving.close()
        assert not conn._lock.locked()
        assert conn.state is ConnectionState.FAILED
        assert "abandoned" in str(conn.failure)


# ---------------------------------------------------------------- transactions around it


async def test_a_commit_ends_what_is_still_open(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        await conn.execute("CREATE TABLE t (i int)")
        opened: Any = None
        with pytest.raises(anyio.BusyResourceError):
            async with conn.transaction():
                await conn.execute("INSERT INTO t VALUES (1)")
                opened = conn.stream(BIG)
                rows: RowStream[Any] = await opened.__aenter__()
                await rows.receive()
        with pytest.raises(anyio.ClosedResourceError):
            await rows.receive()
        await assert_usable(conn)
        cursor = await conn.execute("SELECT count(*) FROM t")
        assert await cursor.fetchone() == (0,)
        await opened.__aexit__(None, None, None)
        await assert_usable(conn)


# ---------------------------------------------------------------- errors


async def test_an_error_in_the_middle(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        received = []
        with pytest.raises(errors.DivisionByZero) as caught:
            async with conn.stream(
                "SELECT 1 / (20 - i) FROM generate_series(1, %s) t(i)", [90], batch_size=5
            ) as rows:
                received.extend([await rows.receive() for _ in range(15)])
                async for row in rows:
                    received += [row]
        assert 15 <= len(received) < 20
        assert caught.value.__notes__ == [
            "query: SELECT 1 / (20 - i) FROM generate_series(1, $1) t(i)"
        ]
        await assert_usable(conn)
        async with conn.stream(
            "SELECT 1 / (20 - i) FROM generate_series(1, 90) t(i)", batch_size=10
        ) as rows:
            await rows.receive_many()
            with pytest.raises(errors.DivisionByZero) as caught:
                await rows.receive()
            await assert_usable(conn)  # it is over
            with pytest.raises(anyio.ClosedResourceError) as closed:
                await rows.receive()
            assert closed.value.__cause__ is caught.value


async def test_an_error_at_the_start(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        for query in ("SELECT missing", "SELECT 1; SELECT 2"):
            with pytest.raises((errors.UndefinedColumn, errors.SyntaxError)) as caught:
                async with conn.stream(query):
                    pass
            assert caught.value.__notes__ == [f"query: {query}"]
            await assert_usable(conn)
        with pytest.raises(psycopg.ProgrammingError, match="placeholders"):
            async with conn.stream("SELECT %s", [1, 2]):
                pass
        await assert_usable(conn)


@pytest.mark.parametrize("batch_size", [1, 100])
async def test_an_error_at_the_commit(pg_dsn: str, batch_size: int) -> None:
    """It comes after the end of the rows, and was dropped: as if they had been stored."""
    async with connected(pg_dsn) as conn:
        await conn.execute("CREATE TABLE t (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        insert = "INSERT INTO t VALUES (%s)"
        await conn.execute(insert, [1])
        async with conn.stream(insert + " RETURNING n", [1], batch_size=batch_size) as stream:
            assert await stream.receive() == (1,)
            with pytest.raises(errors.UniqueViolation):
                await stream.receive()
            with pytest.raises(anyio.ClosedResourceError):
                await stream.receive()
        await assert_usable(conn)
        with pytest.raises(errors.UniqueViolation):
            async with conn.stream(insert, [1], batch_size=batch_size):
                raise AssertionError("entered")
        await assert_usable(conn)
        cursor = await conn.execute("SELECT count(*) FROM t")
        assert await cursor.fetchone() == (1,)


async def test_a_copy_is_not_streamed(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        await conn.execute("CREATE TABLE t (i int)")
        for statement in ("COPY t FROM STDIN", "COPY t TO STDOUT"):
            with pytest.raises(psycopg.ProgrammingError, match="a COPY can't be streamed"):
                async with conn.stream(statement):
                    pass
            await assert_usable(conn)


@pytest.mark.parametrize("way", ["stream", "execute"])
async def test_a_copy_is_refused_and_not_cancelled(
    pg_dsn: str, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """A cancel request could come before the statement's Sync; one answer more would follow."""
    monkeypatch.setattr(_settling, "_LONGEST_PAUSE", PATIENCE)
    async with connected(fault_proxy.dsn(pg_dsn), cancel_timeout=PATIENCE) as conn:
        await conn.execute("CREATE TABLE t (i int)")
        accepted = fault_proxy.accepted
        fault_proxy.hold(b"S\0\0\0\4", "up")

        async def release() -> None:
            await anyio.to_thread.run_sync(fault_proxy.wait_held)
            await anyio.sleep(0.2)
            fault_proxy.release()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(release)
            with pytest.raises(psycopg.ProgrammingError):
                if way == "stream":
                    async with conn.stream("COPY t FROM STDIN"):
                        pass
                else:
                    await conn.execute("COPY t FROM STDIN", prepare=True)
        await assert_usable(conn)
        assert fault_proxy.accepted == accepted


async def test_a_row_that_cannot_be_made(pg_dsn: str) -> None:
    def refuse(_: object) -> Any:
        raise ZeroDivisionError

    async with connected(pg_dsn) as conn:
        conn.row_factory = cast("Any", lambda cursor: refuse)
        with pytest.raises(ZeroDivisionError):
            async with conn.stream(NUMBERS, [3]):
                pass
        conn.row_factory = factories.tuple_row
        with pytest.raises(psycopg.DataError):
            async with conn.stream("SELECT 'infinity'::date"):
                pass
        await assert_usable(conn)


# ---------------------------------------------------------------- cancellation


async def test_pending_cancellations(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:

        async def enter() -> None:
            async with conn.stream("SELECT 1"):
                raise AssertionError("it was to be cancelled")

        await assert_cancellable(enter)
        await assert_usable(conn)
        for method in ("receive", "receive_many"):
            async with conn.stream(BIG) as rows:
                await rows.receive()
                await assert_cancellable(getattr(rows, method))
                await assert_usable(conn)
                with pytest.raises(anyio.ClosedResourceError):
                    await rows.receive()
            async with conn.stream("SELECT 1 WHERE false") as rows:
                await assert_cancellable(getattr(rows, method))
            await assert_usable(conn)
        async with conn.stream(BIG) as rows:

            async def iterate() -> None:
                async for _ in rows:
                    pass

            await assert_cancellable(iterate)
            await assert_usable(conn)
        await assert_cancellable(lambda: conn.execute_no_rows("SELECT 1"))


async def test_leaving_under_a_pending_cancellation(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        with anyio.CancelScope() as scope:
            async with conn.stream(BIG) as rows:
                await rows.receive()
                scope.cancel()
        await assert_usable(conn)


async def test_a_native_cancellation_of_leaving(pg_dsn: str, anyio_backend_name: str) -> None:
    if anyio_backend_name != "asyncio":
        pytest.skip("native cancellation is asyncio's")
    import asyncio

    async with connected(pg_dsn) as conn:
        rows: RowStream[Any] | None = None

        async def leave() -> None:
            nonlocal rows
            async with conn.stream(SLOW, batch_size=1) as rows:
                await rows.receive()

        task = asyncio.ensure_future(leave())
        while rows is None or not rows._occupation.is_over:
            await checkpoint()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await assert_usable(conn)


# ---------------------------------------------------------------- the connection's end


async def test_closing_the_connection(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        async with conn.stream(BIG) as rows:
            await rows.receive()
            await conn.aclose()
            for method in (rows.receive, rows.receive_many, rows.__anext__):
                with pytest.raises(anyio.ClosedResourceError):
                    await method()
        assert conn.state is ConnectionState.CLOSED
        with pytest.raises(psycopg.OperationalError, match=r"^the connection is closed$"):
            async with conn.stream("SELECT 1"):
                pass
        assert not conn._lock.locked()


async def test_closing_the_connection_under_a_receiver(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn, anyio.create_task_group() as tasks:
        async with conn.stream(SLOW, batch_size=1) as rows:
            await rows.receive()
            tasks.start_soon(conn.aclose)
            with pytest.raises(anyio.ClosedResourceError), anyio.fail_after(PATIENCE):
                while True:
                    await rows.receive()
        await conn.wait_closed()
        assert conn.state is ConnectionState.CLOSED


async def test_closing_the_connection_before_it_is_our_turn(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn, anyio.create_task_group() as tasks:

        async def execute() -> None:
            with pytest.raises(psycopg.OperationalError, match="the connection is closed"):
                await conn.execute("SELECT pg_sleep(30)")

        tasks.start_soon(execute)
        while not conn._lock.locked():
            await checkpoint()
        tasks.start_soon(conn.aclose)
        with anyio.fail_after(PATIENCE), pytest.raises(psycopg.OperationalError, match="is closed"):
            async with conn.stream("SELECT 1"):
                pass
        assert not conn._lock.locked()


async def test_the_first_operation_of_a_connection(pg_dsn: str) -> None:
    conn = await Connection.connect(pg_dsn)
    async with conn, conn.stream(NUMBERS, [3]) as rows:
        assert [row[0] async for row in rows] == [1, 2, 3]


async def test_closing_the_connection_while_leaving(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn, anyio.create_task_group() as tasks:
        with anyio.fail_after(PATIENCE):
            async with conn.stream(SLOW, batch_size=1) as rows:
                await rows.receive()
                tasks.start_soon(conn.aclose)
                await checkpoint()
            await conn.wait_closed()
        assert conn.state is ConnectionState.CLOSED


async def test_a_session_that_is_killed(pg_dsn: str, pg_cluster: Cluster) -> None:
    async with connected(pg_dsn) as conn:
        async with conn.stream(SLOW, batch_size=1) as rows:
            await rows.receive()
            pg_cluster.terminate_backend(conn.info.backend_pid)
            with pytest.raises(errors.AdminShutdown):
                while True:
                    await rows.receive()
            with pytest.raises(ConnectionLostError) as caught:
                await rows.receive()
            assert caught.value.sqlstate == "08003"
            assert caught.value.__cause__ is conn.failure
            with pytest.raises(ConnectionLostError):
                await conn.execute("SELECT 1")
        assert isinstance(conn.failure, errors.AdminShutdown)
        with pytest.raises(ConnectionLostError):
            async with conn.stream("SELECT 1"):
                pass


async def test_a_network_that_is_reset(
    pg_dsn: str, fault_proxy: FaultProxy, pg_cluster: Cluster
) -> None:
    async with connected(fault_proxy.dsn(pg_dsn)) as conn:
        async with conn.stream(SLOW, batch_size=1) as rows:
            await rows.receive()
            fault_proxy.reset()
            with pytest.raises(ConnectionLostError) as caught:
                while True:
                    await rows.receive()
            assert caught.value.__cause__ is conn.failure
        assert conn.state is ConnectionState.FAILED
    for session in pg_cluster.sessions(pg_dsn):
        pg_cluster.terminate_backend(session.pid)


async def test_a_frozen_network_and_a_cancellation(
    pg_dsn: str, fault_proxy: FaultProxy, pg_cluster: Cluster
) -> None:
    async with connected(fault_proxy.dsn(pg_dsn), cancel_timeout=0.3) as conn:
        with anyio.fail_after(PATIENCE):
            async with conn.stream(SLOW, batch_size=1) as rows:
                await rows.receive()
                fault_proxy.freeze()
                with anyio.move_on_after(0.1) as scope:
                    while True:
                        await rows.receive()
                assert scope.cancelled_caught
                assert conn.state is ConnectionState.FAILED
                with pytest.raises(ConnectionLostError):
                    await rows.receive()
    for session in pg_cluster.sessions(pg_dsn):
        pg_cluster.terminate_backend(session.pid)


# ---------------------------------------------------------------- no rows


async def test_execute_no_rows(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        assert await conn.execute_no_rows("CREATE TABLE t (i int)") == 0
        insert = "INSERT INTO t SELECT generate_series(1, %s)"
        assert await conn.execute_no_rows(insert, [5]) == 5
        assert await conn.execute_no_rows("UPDATE t SET i = 0 WHERE i > 3") == 2
        assert await conn.execute_no_rows("SELECT 1 WHERE false") == 0
        assert await conn.execute_no_rows("") == 0
        assert await conn.execute_no_rows("DELETE FROM t; INSERT INTO t VALUES (1)") == 6
        async with conn.pipeline():
            assert await conn.execute_no_rows("INSERT INTO t VALUES (1), (2)") == 2
        with pytest.raises(UnexpectedRowsError, match=r"returned 1; what it did stays done"):
            await conn.execute_no_rows("INSERT INTO t VALUES (7) RETURNING i")
        with pytest.raises(UnexpectedRowsError):
            await conn.execute_no_rows("DELETE FROM t WHERE i = 1; SELECT * FROM t")
        with pytest.raises(UnexpectedRowsError):
            async with conn.transaction():
                await conn.execute_no_rows("DELETE FROM t RETURNING i")
        with pytest.raises(errors.UndefinedTable) as caught:
            await conn.execute_no_rows("DELETE FROM missing")
        assert caught.value.__notes__ == ["query: DELETE FROM missing"]
        cursor = await conn.execute("SELECT i FROM t ORDER BY i")
        assert await cursor.fetchall() == [(2,), (7,)]

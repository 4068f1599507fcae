"""`Connection.copy_in` and `copy_in_rows`: all of it is stored, or nothing."""

from __future__ import annotations

import select
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import psycopg
import pytest
from anyio.lowlevel import checkpoint
from psycopg import errors, sql

from pgstructured.driver import Connection, ConnectionState, CopyIn, connect
from pgstructured.errors import ConnectionLostError
from pgstructured.testing import assert_cancellable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator

    from pgstructured.testing import Cluster, FaultProxy, PgBouncer

IDLE = psycopg.pq.TransactionStatus.IDLE
INERROR = psycopg.pq.TransactionStatus.INERROR

PATIENCE = 20
"""Seconds that nothing here takes on any machine; less than what runs on would take."""

SCHEMA = """
CREATE TABLE t (a int, b text);
CREATE TABLE slow (a int, b text);
CREATE FUNCTION nap() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_sleep(30); RETURN NEW; END $$;
CREATE TRIGGER naps BEFORE INSERT ON slow FOR EACH ROW EXECUTE FUNCTION nap();
CREATE TABLE checked (a int, b text);
CREATE TRIGGER checks AFTER INSERT ON checked FOR EACH STATEMENT EXECUTE FUNCTION nap();
CREATE TABLE chatty (a int, b text);
CREATE FUNCTION chat() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE NOTICE '%', repeat('x', 9000); RETURN NEW; END $$;
CREATE TRIGGER chats BEFORE INSERT ON chatty FOR EACH ROW EXECUTE FUNCTION chat();
"""

COPY = "COPY t FROM STDIN"


@pytest.fixture
def dsn(pg_dsn: str) -> str:
    with psycopg.connect(pg_dsn, autocommit=True) as conn:
        conn.execute(SCHEMA)
    return pg_dsn


@asynccontextmanager
async def connected(dsn: str, **options: Any) -> AsyncGenerator[Connection[Any]]:
    conn = await connect(dsn, **options)
    conn._close_timeout = PATIENCE  # or what runs on goes on
    try:
        yield conn
    finally:
        await conn.aclose()


async def stored(conn: Connection[Any], table: str = "t") -> list[Any]:
    query = sql.SQL("SELECT * FROM {} ORDER BY 1").format(sql.Identifier(table))
    return await (await conn.execute(query)).fetchall()


async def assert_nothing_stored(conn: Connection[Any]) -> None:
    """Also that the connection can be used."""
    assert conn.state is ConnectionState.OPEN, conn.failure
    assert conn.pgconn.transaction_status == IDLE
    for table in ("t", "slow", "checked"):
        assert await stored(conn, table) == []


def await_bytes(conn: Connection[Any]) -> None:
    """Wait until something is there to be read, and leave it there."""
    assert select.select([conn.fileno()], [], [], PATIENCE)[0]


# ---------------------------------------------------------------- Jane Street's four ways to feed


async def test_feeding_wait(dsn: str) -> None:
    # `Wait` is an await between two sends.
    async with connected(dsn) as conn:
        async with conn.copy_in(COPY) as copy:
            for i in range(64):
                await copy.send(b"%d\t%s\n" % (i, b"x" * 1000))
                await anyio.sleep(0.001)
        assert copy.row_count == 64
        assert len(await stored(conn)) == 64


async def test_feeding_data(dsn: str) -> None:
    # `Data` is a send; pieces have nothing to do with rows.
    data = b"".join(b"%d\t%s\n" % (i, b"x" * 1000) for i in range(500))
    async with connected(dsn) as conn:
        async with conn.copy_in(COPY) as copy:
            assert isinstance(copy, CopyIn)
            for start in range(0, len(data), 777):
                await copy.send(data[start : start + 777])
            assert copy.row_count == 0
        assert copy.row_count == 500
        assert await stored(conn) == [(i, "x" * 1000) for i in range(500)]


async def test_feeding_finished(dsn: str) -> None:
    # `Finished` is leaving the block.
    async with connected(dsn) as conn:
        async with conn.copy_in(COPY) as copy:
            pass
        assert copy.row_count == 0
        for use in (copy.send(b""), copy.send_row([1, "x"]), copy.abort("late")):
            with pytest.raises(anyio.ClosedResourceError):
                await use
        await assert_nothing_stored(conn)


async def test_feeding_abort(dsn: str) -> None:
    # `Abort` is abort(): the server is told why, and leaving is no error.
    async with connected(dsn) as conn:
        notes: list[str] = []
        async with conn.copy_in(COPY) as copy:
            await copy.send(b"1\tx\n" * 100_000)
            for bad in (None, 1, b"bytes", "a NUL\0"):
                with pytest.raises(ValueError, match="reason must be"):
                    await copy.abort(bad)  # type: ignore[arg-type]  # wrong on purpose
            await copy.abort("no more of it: ☃")
            for use in (copy.send(b""), copy.send_row([1, "x"]), copy.abort("again")):
                with pytest.raises(anyio.ClosedResourceError):
                    await use
            await conn.execute("SELECT 1")  # it is over
        assert copy.row_count == 0
        assert notes == []
        await assert_nothing_stored(conn)


async def test_the_reason_is_in_the_servers_log(dsn: str, pg_cluster: Cluster) -> None:
    async with connected(dsn) as conn:
        async with conn.copy_in(COPY) as copy:
            await copy.abort("reason number 4711")
        with pytest.raises(ZeroDivisionError):
            async with conn.copy_in(COPY):
                raise ZeroDivisionError("what it was about is nobody's business")
    log = pg_cluster.log_text()
    assert "COPY from stdin failed: reason number 4711" in log
    assert "COPY from stdin failed: interrupted by ZeroDivisionError" in log
    assert "nobody's business" not in log


# ---------------------------------------------------------------- sqlx's tests of COPY


async def test_sqlx_it_can_copy_in(dsn: str) -> None:
    async with connected(dsn) as conn:
        async with conn.copy_in("COPY t (a) FROM STDIN") as copy:
            await copy.send(b"1\n")
            await copy.send(b"\\N\n2")
        assert copy.row_count == 3
        assert await stored(conn) == [(1, None), (2, None), (None, None)]


async def test_sqlx_it_can_abort_copy_in(dsn: str) -> None:
    async with connected(dsn) as conn:
        async with conn.copy_in(COPY) as copy:
            await copy.abort("this is only a test")
        await assert_nothing_stored(conn)


async def test_sqlx_it_does_not_accept_other_statements(dsn: str) -> None:
    async with connected(dsn) as conn:
        with pytest.raises(psycopg.ProgrammingError):
            async with conn.copy_in("INSERT INTO t VALUES (1)"):
                pass
        await assert_nothing_stored(conn)


async def test_sqlx_a_dropped_copy_in_leaves_a_usable_connection(dsn: str) -> None:
    async with connected(dsn) as conn:
        with pytest.raises(ZeroDivisionError):
            async with conn.copy_in(COPY) as copy:
                await copy.send(b"1\tx\n")
                raise ZeroDivisionError
        await assert_nothing_stored(conn)


async def test_sqlx_it_errors_on_corrupted_data(dsn: str) -> None:
    # Its issue 3699: the COPY after a failed one.
    async with connected(dsn) as conn:
        with pytest.raises(errors.InvalidTextRepresentation) as caught:
            async with conn.copy_in(COPY) as copy:
                await copy.send(b"not a number\tx\n")
        assert caught.value.__notes__ == [f"query: {COPY}"]
        await assert_nothing_stored(conn)
        async with conn.copy_in(COPY) as copy:
            await copy.send(b"1\tx\n")
        assert await stored(conn) == [(1, "x")]


# ---------------------------------------------------------------- statements


NO_COPIES: Any = [
    "SELECT 1",
    "INSERT INTO t VALUES (1)",
    "",
    "COPY",
    "COPY t",
    "COPY t TO STDOUT",
    "COPY (DELETE FROM t RETURNING 1) TO STDOUT",
    "COPY t FROM '/etc/hostname'",
    "COPY t FROM 'stdin'",
    "COPY t FROM PROGRAM 'true'",
    "COPY t FROM STDIN; INSERT INTO t VALUES (1)",
    "INSERT INTO t VALUES (1); COPY t FROM STDIN",
    "/* COPY t FROM STDIN */ INSERT INTO t VALUES (1)",
    "/* COPY /* nested */ t FROM STDIN",
    "COPY ☃$a$ FROM STDIN; INSERT INTO t VALUES (1) --$a$ FROM STDIN",
    "COPY t FROM -- \r STDIN; INSERT INTO t VALUES (1)",
]


async def test_what_is_no_copy_from_us_is_not_run(dsn: str) -> None:
    async with connected(dsn) as conn:
        for statement in NO_COPIES:
            with pytest.raises(psycopg.ProgrammingError) as caught:
                async with conn.copy_in(statement):
                    pass
            assert caught.value.sqlstate is None  # the server was not asked
        await assert_nothing_stored(conn)


COPIES: Any = [
    "copy t from stdin",
    b"COPY t FROM STDIN;  -- that's all",
    "/* a /* nested */ comment */ COPY public.t(a, b) -- FROM 'file'\n FROM/**/STDIN",
    'COPY "t" ("a", "b") FROM STDIN WITH (FORMAT text) WHERE a IS NOT NULL ;',
    "COPY t FROM stdout",
    sql.SQL("COPY {} FROM STDIN").format(sql.Identifier("t")),
    "COPY t FROM STDIN WHERE b <> $tag$;$tag$ AND b <> ';' AND b <> E'\\';'",
]


async def test_statements_that_are_one(dsn: str) -> None:
    async with connected(dsn) as conn:
        for statement in COPIES:
            async with conn.copy_in(statement) as copy:
                await copy.send_row((1, "x"))
            assert await stored(conn) == [(1, "x")]
            await conn.execute("TRUNCATE t")


OTHER_FORMATS: Any = [
    "(FORMAT csv)",
    "(FORMAT 'csv')",
    "CSV",
    "(DELIMITER ';')",
    "(NULL '')",
    "WITH NULL AS 'x'",
]


async def test_rows_in_other_formats_are_refused(dsn: str) -> None:
    async with connected(dsn) as conn:
        for options in OTHER_FORMATS:
            async with conn.copy_in(f"COPY t FROM STDIN {options}") as copy:
                with pytest.raises(psycopg.ProgrammingError, match="send bytes"):
                    await copy.send_row([1, "x"])
        await assert_nothing_stored(conn)
        async with conn.copy_in("COPY t FROM STDIN (FORMAT csv, HEADER)") as copy:
            await copy.send(b'a,b\n1,"x,y"\n')
        assert await stored(conn) == [(1, "x,y")]


async def test_an_unknown_table(dsn: str) -> None:
    async with connected(dsn) as conn:
        with pytest.raises(errors.UndefinedTable) as caught:
            async with conn.copy_in("COPY missing FROM STDIN"):
                pass
        assert caught.value.__notes__ == ["query: COPY missing FROM STDIN"]
        await assert_nothing_stored(conn)


async def test_not_in_a_pipeline(dsn: str) -> None:
    async with connected(dsn) as conn:
        async with conn.pipeline():
            with pytest.raises(psycopg.NotSupportedError):
                async with conn.copy_in(COPY):
                    pass
        await assert_nothing_stored(conn)
    with pytest.raises(TypeError, match="no public constructor"):
        CopyIn()  # type: ignore[call-arg]


# ---------------------------------------------------------------- rows


async def test_rows_of_objects(dsn: str) -> None:
    rows = [(1, "a\tb\n\\\r"), (2, None), (3, "'\"\\N"), (4, "")]
    async with connected(dsn) as conn:
        async with conn.copy_in(COPY) as copy:
            for row in rows:
                await copy.send_row(row)
        assert copy.row_count == 4
        assert await stored(conn) == rows


async def test_rows_and_bytes_keep_their_order(dsn: str) -> None:
    async with connected(dsn) as conn:
        await conn.execute("ALTER TABLE t ADD n serial")
        async with conn.copy_in("COPY t (a, b) FROM STDIN") as copy:
            await copy.send_row([1, "x"])
            await copy.send(b"2\ty\n")
            await copy.send_row([3, "z" * 70_000])
            await copy.send(b"4\t" + b"u" * 70_000 + b"\n")
            await copy.send_row([5, "v"])
        cursor = await conn.execute("SELECT a FROM t ORDER BY n")
        assert await cursor.fetchall() == [(i,) for i in range(1, 6)]


async def test_binary(dsn: str) -> None:
    async with connected(dsn) as conn:
        async with conn.copy_in("COPY t FROM STDIN (FORMAT binary)") as copy:
            pass
        assert await stored(conn) == []
        rows = [(1, "x"), (2, None), (3, "\t\n")]
        async with conn.copy_in("COPY t FROM STDIN (FORMAT binary)") as copy:
            copy.set_types(["int4", "text"])
            for row in rows:
                await copy.send_row(row)
        assert await stored(conn) == rows
        async with conn.copy_out("COPY t TO STDOUT (FORMAT binary)") as out:
            data = b"".join([piece async for piece in out])
        async with conn.copy_in("COPY t FROM STDIN (FORMAT binary)") as copy:
            await copy.send(data)
        assert len(await stored(conn)) == 6


async def test_a_row_that_cannot_be_adapted_leaves_no_half_of_it(dsn: str) -> None:
    async with connected(dsn) as conn:
        async with conn.copy_in(COPY) as copy:
            await copy.send_row([1, "x"])
            with pytest.raises(psycopg.ProgrammingError):
                await copy.send_row([2, object()])
            await copy.send_row([3, "y"])
        assert await stored(conn) == [(1, "x"), (3, "y")]


async def test_much_at_once(dsn: str) -> None:
    async with connected(dsn) as conn:
        data = b"1\t" + b"x" * 10_000_000 + b"\n"
        async with conn.copy_in(COPY) as copy:
            await copy.send(data)
            await copy.send(memoryview(data))  # type: ignore[arg-type]
            await copy.send(bytearray(data))  # type: ignore[arg-type]
            with pytest.raises(TypeError):
                await copy.send("text")  # type: ignore[arg-type]
        cursor = await conn.execute("SELECT sum(length(b)) FROM t")
        assert await cursor.fetchone() == (30_000_000,)


async def test_a_server_that_talks_all_the_time(dsn: str) -> None:
    # It takes no data while nobody takes its notices.
    async with connected(dsn) as conn:
        heard = 0

        def hear(_: object) -> None:
            nonlocal heard
            heard += 1

        conn.add_notice_handler(hear)
        with anyio.fail_after(3 * PATIENCE):
            async with conn.copy_in("COPY chatty FROM STDIN") as copy:
                for i in range(3000):
                    await copy.send_row([i, "x" * 3000])
        assert copy.row_count == heard == 3000


async def test_through_a_transaction_pooler(pgbouncer_transaction: PgBouncer, dsn: str) -> None:
    async with connected(pgbouncer_transaction.dsn(dsn)) as conn:
        assert await conn.copy_in_rows("t", ["a", "b"], [(1, "x")]) == 1
        async with conn.copy_in(COPY) as copy:
            await copy.abort("no")
        with pytest.raises(errors.InvalidTextRepresentation):
            await conn.copy_in_rows("t", ["a", "b"], [("x", "x")])
        assert await stored(conn) == [(1, "x")]


# ---------------------------------------------------------------- errors


async def test_an_endless_feed_hears_of_an_error(dsn: str) -> None:
    async with connected(dsn) as conn:
        with pytest.raises(errors.InvalidTextRepresentation) as caught, anyio.fail_after(PATIENCE):
            async with conn.copy_in(COPY) as copy:
                await copy.send(b"not a number\tx\n")
                while True:
                    await copy.send(b"1\tx\n" * 5_000)
                    await anyio.sleep(0.01)
        assert caught.value.__notes__ == [f"query: {COPY}"]
        await assert_nothing_stored(conn)


async def test_an_error_that_the_body_swallows(dsn: str) -> None:
    async with connected(dsn) as conn:
        with pytest.raises(anyio.ClosedResourceError) as closed:
            async with conn.copy_in(COPY) as copy:
                await copy.send(b"not a number\tx\n")
                with pytest.raises(errors.InvalidTextRepresentation) as caught:
                    while True:
                        await copy.send(b"1\tx\n" * 50_000)
        assert closed.value.__cause__ is caught.value
        await assert_nothing_stored(conn)


async def test_a_constraint_at_the_end(dsn: str) -> None:
    async with connected(dsn) as conn:
        await conn.execute("ALTER TABLE t ADD UNIQUE (a)")
        with pytest.raises(errors.UniqueViolation):
            await conn.copy_in_rows("t", ["a", "b"], [(1, "x"), (1, "y")])
        await assert_nothing_stored(conn)


async def test_aborting_what_has_failed_already(dsn: str) -> None:
    async with connected(dsn) as conn:
        async with conn.copy_in(COPY) as copy:
            await copy.send(b"not a number\tx\n" * 10_000)
            await anyio.sleep(0.05)
            await copy.abort("too late")
        await assert_nothing_stored(conn)


async def test_in_a_transaction(dsn: str) -> None:
    async with connected(dsn) as conn:
        async with conn.transaction():
            assert await conn.copy_in_rows("t", ["a"], [(1,)]) == 1
        assert await stored(conn) == [(1, None)]
        with pytest.raises(errors.InFailedSqlTransaction):
            async with conn.transaction():
                async with conn.copy_in(COPY) as copy:
                    await copy.abort("no")
                assert conn.pgconn.transaction_status == INERROR
                await conn.execute("SELECT 1")
        async with conn.transaction():
            with pytest.raises(ZeroDivisionError):
                async with conn.transaction(), conn.copy_in(COPY) as copy:
                    raise ZeroDivisionError
            await conn.execute("DELETE FROM t")
        await assert_nothing_stored(conn)


async def test_the_end_of_a_transaction_ends_what_is_still_open(dsn: str) -> None:
    async with connected(dsn) as conn:
        with pytest.raises(anyio.BusyResourceError, match="copying into"):
            async with conn.transaction():
                opened = conn.copy_in(COPY)
                copy = await opened.__aenter__()
                await copy.send(b"1\tx\n")
        await assert_nothing_stored(conn)
        with pytest.raises(anyio.ClosedResourceError):
            await opened.__aexit__(None, None, None)
        await assert_nothing_stored(conn)


# ---------------------------------------------------------------- one at a time, and its end


async def test_other_operations_meanwhile(dsn: str) -> None:
    async with connected(dsn) as conn:
        async with conn.copy_in(COPY) as copy:
            for operation in (
                lambda: conn.execute("SELECT 1"),
                conn.commit,
                lambda: conn.stream("SELECT 1").__aenter__(),
                lambda: conn.copy_in_rows("t", ["a"], []),
            ):
                with pytest.raises(anyio.BusyResourceError, match="copying into"):
                    await operation()
            await copy.send(b"1\tx\n")
        assert await stored(conn) == [(1, "x")]


async def test_two_tasks_that_send(dsn: str) -> None:
    async with connected(dsn) as conn:
        async with anyio.create_task_group() as tasks:
            with pytest.raises(ZeroDivisionError):
                async with conn.copy_in("COPY slow FROM STDIN") as copy:

                    async def send() -> None:
                        with pytest.raises(anyio.ClosedResourceError):
                            while True:
                                await copy.send(b"1\tx\n" * 100_000)

                    tasks.start_soon(send)
                    while not copy._occupation._is_running:
                        await checkpoint()
                    with pytest.raises(anyio.BusyResourceError):
                        await copy.send(b"2\tx\n")
                    with pytest.raises(anyio.BusyResourceError):
                        await copy.send_row([2, "x"])
                    raise ZeroDivisionError
        await assert_nothing_stored(conn)


async def test_closing_leaves_the_end_to_the_block(dsn: str) -> None:
    async with connected(dsn) as conn:
        async with conn.copy_in(COPY) as copy:
            await copy.send(b"1\tx\n")
            for _ in range(2):
                await copy.aclose()
            with pytest.raises(anyio.ClosedResourceError):
                await copy.send(b"1\tx\n")
            assert await copy_is_open(conn)
        assert copy.row_count == 1
        with pytest.raises(ZeroDivisionError):
            async with conn.copy_in(COPY) as copy:
                await copy.send(b"2\tx\n")
                await copy.aclose()
                raise ZeroDivisionError
        assert await stored(conn) == [(1, "x")]


async def copy_is_open(conn: Connection[Any]) -> bool:
    try:
        await conn.execute("SELECT 1")
    except anyio.BusyResourceError:
        return True
    return False


async def test_closing_the_connection(dsn: str) -> None:
    async with connected(dsn) as conn:
        with pytest.raises(anyio.ClosedResourceError):
            async with conn.copy_in(COPY) as copy:
                await conn.aclose()
                for use in (copy.send(b""), copy.send_row([1, "x"]), copy.abort("late")):
                    with pytest.raises(anyio.ClosedResourceError):
                        await use
        assert conn.state is ConnectionState.CLOSED
        with pytest.raises(psycopg.OperationalError, match="the connection is closed"):
            async with conn.copy_in(COPY):
                pass


async def test_closing_the_connection_under_a_sender(dsn: str) -> None:
    async with connected(dsn) as conn, anyio.create_task_group() as tasks:
        with pytest.raises(anyio.ClosedResourceError), anyio.fail_after(PATIENCE):
            async with conn.copy_in("COPY slow FROM STDIN") as copy:
                tasks.start_soon(conn.aclose)
                while True:
                    await copy.send(b"1\tx\n" * 100_000)
        await conn.wait_closed()
        assert conn.state is ConnectionState.CLOSED
    async with connected(dsn) as conn:
        await assert_nothing_stored(conn)


async def test_a_session_that_is_killed(dsn: str, pg_cluster: Cluster) -> None:
    async with connected(dsn) as conn:
        with pytest.raises(ConnectionLostError):
            async with conn.copy_in(COPY) as copy:
                await copy.send(b"1\tx\n")
                pg_cluster.terminate_backend(conn.info.backend_pid)
                with pytest.raises((errors.AdminShutdown, ConnectionLostError)):
                    while True:
                        await copy.send(b"1\tx\n" * 5_000)
                        await checkpoint()
                assert conn.state is ConnectionState.FAILED
                with pytest.raises(ConnectionLostError) as caught:
                    await copy.send(b"1\tx\n")
                assert caught.value.__cause__ is conn.failure
        with pytest.raises(ConnectionLostError):
            await conn.copy_in_rows("t", ["a"], [])
    async with connected(dsn) as conn:
        await assert_nothing_stored(conn)


async def test_a_session_that_was_killed_before_the_end(dsn: str, pg_cluster: Cluster) -> None:
    async with connected(dsn) as conn:
        with pytest.raises(errors.AdminShutdown):
            async with conn.copy_in(COPY) as copy:
                await copy.send(b"1\tx\n")
                pg_cluster.terminate_backend(conn.info.backend_pid)
                await_bytes(conn)
        assert isinstance(conn.failure, errors.AdminShutdown)
        assert copy.row_count == 0
    async with connected(dsn) as conn:
        async with conn.copy_in(COPY) as copy:
            pg_cluster.terminate_backend(conn.info.backend_pid)
            await_bytes(conn)
            await copy.abort("no")
        assert isinstance(conn.failure, errors.AdminShutdown)
    async with connected(dsn) as conn:
        await assert_nothing_stored(conn)


async def test_a_network_that_is_reset(
    dsn: str, fault_proxy: FaultProxy, end_sessions: Callable[[], None]
) -> None:
    async with connected(fault_proxy.dsn(dsn)) as conn:
        with pytest.raises(ConnectionLostError), anyio.fail_after(PATIENCE):
            async with conn.copy_in(COPY) as copy:
                await copy.send(b"1\tx\n")
                fault_proxy.reset()
                while True:
                    await copy.send(b"1\tx\n" * 5_000)
        assert conn.state is ConnectionState.FAILED
    end_sessions()
    async with connected(dsn) as conn:
        await assert_nothing_stored(conn)


# ---------------------------------------------------------------- cancellation


async def test_pending_cancellations(dsn: str) -> None:
    async with connected(dsn) as conn:

        async def enter() -> None:
            async with conn.copy_in(COPY):
                raise AssertionError("it was to be cancelled")

        await assert_cancellable(enter)
        await assert_nothing_stored(conn)
        for name, arguments in (("send", [b"1\tx\n"]), ("send_row", [[1, "x"]]), ("abort", ["no"])):
            with pytest.raises(anyio.ClosedResourceError):
                async with conn.copy_in(COPY) as copy:
                    await copy.send(b"1\tx\n")
                    await assert_cancellable(lambda: getattr(copy, name)(*arguments))  # noqa: B023
                    await assert_nothing_stored(conn)
            await assert_nothing_stored(conn)
        async with conn.copy_in(COPY) as copy:
            await assert_cancellable(copy.aclose)
        with anyio.CancelScope() as scope:
            async with conn.copy_in(COPY) as copy:
                await copy.send(b"1\tx\n")
                scope.cancel()  # noticed at the end of the block
        assert scope.cancelled_caught
        await assert_nothing_stored(conn)
        await assert_cancellable(lambda: conn.copy_in_rows("t", ["a"], [(1,)]))
        await assert_nothing_stored(conn)


async def test_a_cancelled_body(dsn: str) -> None:
    async with connected(dsn) as conn:
        with anyio.move_on_after(0.1) as scope:
            async with conn.copy_in(COPY) as copy:
                await copy.send(b"1\tx\n")
                await anyio.sleep(30)
        assert scope.cancelled_caught
        await assert_nothing_stored(conn)


async def test_a_cancelled_send(dsn: str) -> None:
    async with connected(dsn) as conn:
        with anyio.fail_after(PATIENCE), anyio.move_on_after(0.3) as scope:
            async with conn.copy_in("COPY slow FROM STDIN") as copy:
                while True:
                    await copy.send(b"1\tx\n" * 100_000)
        assert scope.cancelled_caught
        await assert_nothing_stored(conn)
        with pytest.raises(anyio.ClosedResourceError):
            async with conn.copy_in("COPY slow FROM STDIN") as copy:
                with anyio.move_on_after(0.3):
                    while True:
                        await copy.send(b"1\tx\n" * 100_000)
                await assert_nothing_stored(conn)  # at once
        await assert_nothing_stored(conn)


async def test_a_cancelled_end(dsn: str) -> None:
    async with connected(dsn) as conn:
        with anyio.fail_after(PATIENCE), anyio.move_on_after(0.3) as scope:
            async with conn.copy_in("COPY checked FROM STDIN") as copy:
                await copy.send(b"1\tx\n")
        assert scope.cancelled_caught
        assert copy.row_count == 0
        await assert_nothing_stored(conn)


async def test_a_cancelled_entry(dsn: str) -> None:
    async with connected(dsn) as other, connected(dsn) as conn, other.transaction():
        await other.execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        with anyio.fail_after(PATIENCE), anyio.move_on_after(0.1) as scope:
            async with conn.copy_in(COPY):
                raise AssertionError("it was to wait")
        assert scope.cancelled_caught
        assert conn.pgconn.transaction_status == IDLE
        await conn.execute("SELECT 1")


async def test_a_body_that_raises_while_the_server_is_busy(dsn: str) -> None:
    # It doesn't read what we say, so it has to be cancelled.
    async with connected(dsn) as conn:
        with anyio.fail_after(PATIENCE), pytest.raises(ZeroDivisionError):
            async with conn.copy_in("COPY slow FROM STDIN") as copy:
                await copy.send(b"1\tx\n" * 100_000)
                raise ZeroDivisionError
        await assert_nothing_stored(conn)


@pytest.mark.parametrize("how", ["cancelled", "raised", "aborted"])
async def test_a_frozen_network(
    dsn: str, fault_proxy: FaultProxy, end_sessions: Callable[[], None], how: str
) -> None:
    async with connected(fault_proxy.dsn(dsn), cancel_timeout=0.3) as conn:
        raised: Exception | None = None
        with anyio.fail_after(PATIENCE), anyio.CancelScope() as scope:
            try:
                async with conn.copy_in(COPY) as copy:
                    await copy.send(b"1\tx\n")
                    fault_proxy.freeze()
                    if how == "aborted":
                        await copy.abort("no")
                    elif how == "raised":
                        raise ZeroDivisionError
                    else:
                        scope.deadline = anyio.current_time() + 0.2
                        while True:
                            await copy.send(b"1\tx\n" * 100_000)
            except ZeroDivisionError as exc:
                raised = exc
        assert scope.cancelled_caught == (how == "cancelled")
        assert (raised is not None) == (how == "raised")
        assert conn.state is ConnectionState.FAILED
        assert "no answer" in str(conn.failure)
    end_sessions()
    async with connected(dsn) as conn:
        await assert_nothing_stored(conn)


# ---------------------------------------------------------------- copy_in_rows


async def test_copy_in_rows(dsn: str) -> None:
    rows = [(i, f"name\t{i}") for i in range(4_000)]

    async def arrive() -> AsyncIterator[Any]:
        for row in rows:
            await checkpoint()
            yield row

    class Arriving:
        def __aiter__(self) -> AsyncIterator[Any]:
            return self._rows()

        async def _rows(self) -> AsyncIterator[Any]:
            for row in rows:
                yield row

    async with connected(dsn) as conn:
        for given in (rows, iter(rows), (list(row) for row in rows), arrive(), Arriving()):
            assert await conn.copy_in_rows("t", ["a", "b"], given) == 4_000
            assert await stored(conn) == rows
            await conn.execute("TRUNCATE t")
        assert await conn.copy_in_rows(("public", "t"), ("b",), [("x",)]) == 1
        assert await conn.copy_in_rows("t", ["a"], []) == 0
        assert await stored(conn) == [(None, "x")]


async def test_names_are_taken_literally(dsn: str) -> None:
    table, column = 'we"ird; DROP TABLE t', 'a" ) FROM STDIN; --'
    async with connected(dsn) as conn:
        await conn.execute(
            sql.SQL("CREATE TABLE {} ({} int)").format(
                sql.Identifier(table), sql.Identifier(column)
            )
        )
        assert await conn.copy_in_rows(table, [column], [(1,)]) == 1
        assert await stored(conn, table) == [(1,)]
        await assert_nothing_stored(conn)
        with pytest.raises(errors.UndefinedTable):
            await conn.copy_in_rows("public.t", ["a"], [(1,)])
        await conn.execute('CREATE SCHEMA "S"; CREATE TABLE "S"."T" ("A" int)')
        assert await conn.copy_in_rows(("S", "T"), ["A"], [(1,)]) == 1


async def test_rows_of_a_wrong_width(dsn: str) -> None:
    rows: list[Any] = [(1, "x"), (2, "y"), (3,)]

    async def arrive() -> AsyncIterator[Any]:
        for row in rows:
            yield row

    async with connected(dsn) as conn:
        for given in (rows, arrive()):
            with pytest.raises(ValueError, match="row 3 has 1 values, and there are 2 columns"):
                await conn.copy_in_rows("t", ["a", "b"], given)
            await assert_nothing_stored(conn)


async def test_an_iterable_that_raises_half_way(dsn: str) -> None:
    closed: list[str] = []

    def rows() -> Iterator[Any]:
        for i in range(20_000):
            yield (i, "x")
        raise ZeroDivisionError

    async def arrive() -> AsyncIterator[Any]:
        try:
            for i in range(20_000):
                yield (i, "x")
            raise ZeroDivisionError
        finally:
            closed.append("arrive")

    async def arrive_for_ever(a: object, scope: anyio.CancelScope) -> AsyncIterator[Any]:
        scope.deadline = anyio.current_time() + (0.1 if a == 1 else PATIENCE)
        try:
            while True:
                yield (a, "x")
                await checkpoint()
        finally:
            closed.append("arrive_for_ever")

    async with connected(dsn) as conn:
        for given in (rows(), arrive()):
            with pytest.raises(ZeroDivisionError):
                await conn.copy_in_rows("t", ["a", "b"], given)
            await assert_nothing_stored(conn)
        with pytest.raises(errors.InvalidTextRepresentation), anyio.CancelScope() as scope:
            await conn.copy_in_rows("t", ["a", "b"], arrive_for_ever("no number", scope))
        await assert_nothing_stored(conn)
        with anyio.CancelScope() as scope:
            await conn.copy_in_rows("slow", ["a", "b"], arrive_for_ever(1, scope))
        assert scope.cancelled_caught
        await assert_nothing_stored(conn)
    assert closed == ["arrive", "arrive_for_ever", "arrive_for_ever"]


async def test_an_iterable_that_uses_the_connection(dsn: str) -> None:
    async with connected(dsn) as conn:

        async def arrive() -> AsyncIterator[Any]:
            await conn.execute("SELECT 1")
            yield (1, "x")

        with pytest.raises(anyio.BusyResourceError):
            await conn.copy_in_rows("t", ["a", "b"], arrive())
        await assert_nothing_stored(conn)


async def test_an_endless_iterable_is_cancelled(dsn: str) -> None:
    def rows() -> Iterator[Any]:
        while True:
            yield (1, "x")

    async with connected(dsn) as conn:
        with anyio.fail_after(PATIENCE), anyio.move_on_after(0.1) as scope:
            await conn.copy_in_rows("t", ["a", "b"], rows())
        assert scope.cancelled_caught
        await assert_nothing_stored(conn)


async def test_names_that_are_none(dsn: str) -> None:
    async with connected(dsn) as conn:
        for table in ((), ("a", "b", "c")):
            with pytest.raises(ValueError, match="table must be"):
                await conn.copy_in_rows(table, ["a"], [])  # type: ignore[arg-type]
        columns: Any
        for columns in ([], "ab"):
            with pytest.raises(ValueError, match="columns must be"):
                await conn.copy_in_rows("t", columns, [])
        with pytest.raises(TypeError):
            await conn.copy_in_rows(1, ["a"], [])  # type: ignore[arg-type]
        await assert_nothing_stored(conn)

"""What Jane Street's postgres_async does and tests of queries and COPY, one test each, in our form.

Its callbacks are our streams: ``handle_columns`` is `RowStream.columns`, ``pushback`` a reader
that doesn't read, ``query_expect_no_data`` is `execute_no_rows`. ``feed_data`` gives `Wait` where
we await, `Data` where we send, `Finished` where we leave the block, `Abort` where we abort.
"""

from __future__ import annotations

import select
from typing import TYPE_CHECKING, Any

import anyio
import psycopg
import pytest
from psycopg import errors

from pgstructured.driver import Connection, ConnectionState, open_connection
from pgstructured.errors import ConnectionLostError, UnexpectedRowsError

if TYPE_CHECKING:
    from pgstructured.testing import Cluster

PATIENCE = 20
"""Seconds that nothing here takes on any machine."""

NASTY = ["", "a\tb", "a\nb", "a\rb", "a\\b", "\\N", "\\.", "é東京", None]


async def fetch(conn: Connection[Any], query: str) -> list[Any]:
    return await (await conn.execute(query)).fetchall()


async def assert_usable(conn: Connection[Any]) -> None:
    assert conn.state is ConnectionState.OPEN, conn.failure
    assert conn.info.transaction_status.name == "IDLE"
    assert await fetch(conn, "SELECT 42") == [(42,)]


# ---------------------------------------------------------------- queries


async def test_columns_come_before_rows_and_without_any(pg_dsn: str) -> None:
    async with open_connection(pg_dsn) as conn:
        for condition in ("true", "false"):
            async with conn.stream(f"SELECT 1 AS a, 'x' AS b WHERE {condition}") as rows:
                assert [column.name for column in rows.columns] == ["a", "b"]
                assert [column.type_code for column in rows.columns] == [23, 25]
                assert len([row async for row in rows]) == (condition == "true")


async def test_pushback(pg_dsn: str) -> None:
    """Nothing is read while nobody asks, and nothing is missing afterwards."""
    async with open_connection(pg_dsn) as conn:
        query = "SELECT i, repeat('x', 100) FROM generate_series(1, 65536) AS t(i)"
        async with conn.stream(query) as rows:
            seen = [(await rows.receive())[0] for _ in range(10_000)]
            for _ in range(2):  # there is more, and nobody takes it
                assert select.select([conn.fileno()], [], [], PATIENCE)[0]
                await anyio.sleep(0.05)
            seen += [row[0] async for row in rows]
        assert seen == list(range(1, 65_537))


async def test_expect_no_data(pg_dsn: str) -> None:
    async with open_connection(pg_dsn) as conn:
        assert await conn.execute_no_rows("CREATE TABLE t (a int)") == 0
        assert await conn.execute_no_rows("INSERT INTO t VALUES (%s), (2)", [1]) == 2
        assert await conn.execute_no_rows("SELECT 1 WHERE false") == 0
        assert await conn.execute_no_rows("") == 0  # its heartbeat


async def test_unexpected_data_keeps_its_side_effects(pg_dsn: str) -> None:
    """But for a transaction around it, which the error rolls back."""
    async with open_connection(pg_dsn) as conn:
        await conn.execute("CREATE TABLE t (a int)")
        with pytest.raises(UnexpectedRowsError):
            await conn.execute_no_rows("INSERT INTO t VALUES (1) RETURNING a")
        with pytest.raises(UnexpectedRowsError):
            async with conn.transaction():
                await conn.execute_no_rows("INSERT INTO t VALUES (2) RETURNING a")
        assert await fetch(conn, "SELECT a FROM t") == [(1,)]


@pytest.mark.parametrize(
    ("query", "params", "error"),
    [
        ("SELEKT", None, errors.SyntaxError),
        ("SELECT %s::int", ["x"], errors.InvalidTextRepresentation),
        ("SELECT 1 / %s", [0], errors.DivisionByZero),
    ],
    ids=["parse", "bind", "execute"],
)
async def test_failures_leave_it_usable(
    pg_dsn: str, query: str, params: list[Any] | None, error: type[Exception]
) -> None:
    async with open_connection(pg_dsn) as conn:
        for _ in range(2):
            with pytest.raises(error):
                async with conn.stream(query, params):
                    raise AssertionError("entered")
            await assert_usable(conn)


async def test_100_000_parameters(pg_dsn: str) -> None:
    """Ends its connection; ours is asked by psycopg first, which refuses."""
    async with open_connection(pg_dsn) as conn:
        query = "SELECT " + ", ".join(["%s"] * 100_000)
        with pytest.raises(psycopg.Error, match="number of parameters"):
            async with conn.stream(query, [1] * 100_000):
                raise AssertionError("entered")
        await assert_usable(conn)


async def test_a_reader_that_raises(pg_dsn: str) -> None:
    """Its query then never answers; here the error comes out, and the rest is dropped."""
    async with open_connection(pg_dsn) as conn:
        with pytest.raises(KeyError):
            async with conn.stream("SELECT generate_series(1, 100000)") as rows:
                async for _ in rows:
                    raise KeyError
        await assert_usable(conn)


async def test_copy_by_a_query_is_refused(pg_dsn: str) -> None:
    async with open_connection(pg_dsn) as conn:
        await conn.execute("CREATE TABLE t (a int)")
        for statement in ("COPY t TO STDOUT", "COPY t FROM STDIN"):
            with pytest.raises(psycopg.ProgrammingError):
                async with conn.stream(statement):
                    raise AssertionError("entered")
            await assert_usable(conn)
            with pytest.raises(psycopg.ProgrammingError):
                await conn.execute_no_rows(statement)
            await assert_usable(conn)


async def test_cancelled_by_the_server_during_pushback(pg_dsn: str, pg_cluster: Cluster) -> None:
    async with open_connection(pg_dsn) as conn:
        query = "SELECT i, repeat('x', 1000) FROM generate_series(1, 1000000) AS t(i)"
        with anyio.fail_after(PATIENCE), pytest.raises(errors.QueryCanceled):
            async with conn.stream(query) as rows:
                await rows.receive()
                pg_cluster.execute("SELECT pg_cancel_backend(%s)", [conn.info.backend_pid])
                async for _ in rows:
                    pass
        await assert_usable(conn)


# ---------------------------------------------------------------- copy_in


async def test_copy_in_rows_with_nasty_characters_and_names(pg_dsn: str) -> None:
    """It leaves the names to be escaped by the caller."""
    async with open_connection(pg_dsn) as conn:
        columns = ["a", 'quo"ted', "with space", "select", "Ä"]
        await conn.execute('CREATE SCHEMA "Nasty schema"')
        await conn.execute(
            'CREATE TABLE "Nasty schema"."t""able"'
            ' (a int, "quo""ted" text, "with space" text, "select" text, "Ä" text)'
        )
        rows = [(i, text, None, text, text) for i, text in enumerate(NASTY)]
        path = ("Nasty schema", 't"able')
        assert await conn.copy_in_rows(path, columns, rows) == len(rows)
        assert await fetch(conn, 'SELECT * FROM "Nasty schema"."t""able" ORDER BY a') == rows


async def test_copy_in_of_8192_pieces_with_waits(pg_dsn: str) -> None:
    async with open_connection(pg_dsn) as conn:
        await conn.execute("CREATE TABLE t (a text)")
        async with conn.copy_in("COPY t FROM STDIN") as copy:
            for number in range(8192):
                if number % 64 == 0:
                    await anyio.lowlevel.checkpoint()
                await copy.send(b"x" * 1023 + b"\n")
        assert copy.row_count == 8192


async def test_copy_in_of_weird_pieces(pg_dsn: str) -> None:
    """They have nothing to do with rows."""
    data = b"".join(b"%d\tnumber %d\n" % (i, i) for i in range(500))
    async with open_connection(pg_dsn) as conn:
        await conn.execute("CREATE TABLE t (a int, b text)")
        for size in (1, 7, 4096):
            async with conn.copy_in("COPY t FROM STDIN") as copy:
                for start in range(0, len(data), size):
                    await copy.send(data[start : start + size])
            assert copy.row_count == 500
        query = "SELECT count(*), sum(a) FROM t WHERE b = 'number ' || a"
        assert await fetch(conn, query) == [(1500, 3 * sum(range(500)))]


async def test_copy_in_that_aborts(pg_dsn: str) -> None:
    async with open_connection(pg_dsn) as conn:
        await conn.execute("CREATE TABLE t (a int)")
        async with conn.copy_in("COPY t FROM STDIN") as copy:
            await copy.send(b"1\n2\n")
            await copy.abort("no more")
        assert copy.row_count == 0
        assert await fetch(conn, "SELECT * FROM t") == []
        await assert_usable(conn)


async def test_copy_in_that_the_server_refuses_in_the_middle_of_waits(pg_dsn: str) -> None:
    """Heard of while data go on, and not at their end only."""
    async with open_connection(pg_dsn) as conn:
        await conn.execute("CREATE TABLE t (a int)")
        with anyio.fail_after(PATIENCE), pytest.raises(errors.InvalidTextRepresentation):
            async with conn.copy_in("COPY t FROM STDIN") as copy:
                await copy.send(b"1\nnot a number\n" + b"1\n" * 100_000)
                while True:
                    await anyio.sleep(0.01)
                    await copy.send(b"1\n" * 50_000)
        assert await fetch(conn, "SELECT * FROM t") == []
        await assert_usable(conn)


async def test_a_feed_that_raises(pg_dsn: str) -> None:
    async with open_connection(pg_dsn) as conn:
        await conn.execute("CREATE TABLE t (a int)")

        async def feed() -> Any:
            yield (1,)
            raise KeyError("the feed's own")

        with pytest.raises(KeyError, match="the feed's own"):
            await conn.copy_in_rows("t", ["a"], feed())
        assert await fetch(conn, "SELECT * FROM t") == []
        await assert_usable(conn)


# ---------------------------------------------------------------- copy_out


@pytest.mark.parametrize("options", ["", " (FORMAT binary)"], ids=["text", "binary"])
async def test_copy_out_and_in_again(pg_dsn: str, options: str) -> None:
    async with open_connection(pg_dsn) as conn, open_connection(pg_dsn) as other:
        await conn.execute("CREATE TABLE t (a int, b text)")
        await conn.execute("CREATE TABLE u (LIKE t)")
        for count in (0, len(NASTY)):  # empty, too
            await conn.copy_in_rows("t", ["a", "b"], list(enumerate(NASTY))[:count])
            async with (
                conn.copy_out(f"COPY t TO STDOUT{options}") as source,
                other.copy_in(f"COPY u FROM STDIN{options}") as sink,
            ):
                async for data in source:
                    await sink.send(data)
            assert sink.row_count == count
        assert await fetch(conn, "SELECT * FROM u ORDER BY a") == list(enumerate(NASTY))


# ---------------------------------------------------------------- errors and ends


@pytest.mark.parametrize("by", ["itself", "another"])
async def test_a_session_that_is_terminated(pg_dsn: str, pg_cluster: Cluster, by: str) -> None:
    """Why is told once; what comes after was never asked, and has 08003 and the first as cause."""
    async with open_connection(pg_dsn) as conn:
        with anyio.fail_after(PATIENCE):
            if by == "itself":
                with pytest.raises(errors.AdminShutdown):
                    await conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")
            else:
                pg_cluster.terminate_backend(conn.info.backend_pid)  # while it is idle
            await conn.wait_closed()
        assert isinstance(conn.failure, errors.AdminShutdown)
        with pytest.raises(ConnectionLostError) as later:
            async with conn.stream("SELECT 1"):
                raise AssertionError("entered")
        assert later.value.sqlstate == "08003"
        assert later.value.__cause__ is conn.failure


async def test_a_query_in_its_error(pg_dsn: str) -> None:
    """Short ones whole, long ones around the place, and never the parameters."""
    async with open_connection(pg_dsn) as conn:
        for filler in (0, 5000):
            space = " " * filler
            with pytest.raises(errors.UndefinedColumn) as caught:
                await conn.execute(f"SELECT{space} missing{space} WHERE %s = 1", [4711])
            (note,) = caught.value.__notes__
            assert "missing" in note
            assert "4711" not in note
            assert len(note) <= 2048


async def test_pg_cancel(pg_dsn: str, pg_cluster: Cluster) -> None:
    async with open_connection(pg_dsn) as conn, anyio.create_task_group() as tasks:

        async def sleep() -> None:
            with pytest.raises(errors.QueryCanceled) as caught:
                async with conn.stream("SELECT pg_sleep(60)"):
                    raise AssertionError("entered")
            assert caught.value.sqlstate == "57014"
            await assert_usable(conn)

        tasks.start_soon(sleep)
        with anyio.fail_after(PATIENCE):
            while not any(s.state == "active" for s in pg_cluster.sessions(pg_dsn)):  # noqa: ASYNC110 - the server's
                await anyio.sleep(0.01)
        pg_cluster.execute("SELECT pg_cancel_backend(%s)", [conn.info.backend_pid])

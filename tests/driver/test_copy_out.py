"""`Connection.copy_out`: bytes or rows, pulled, and settled however the COPY ends."""

from __future__ import annotations

import random
import select
from contextlib import asynccontextmanager
from datetime import date
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import anyio
import psycopg
import pytest
from anyio.lowlevel import checkpoint
from psycopg import errors

from pgstructured.driver import Connection, ConnectionState, CopyOut, connect
from pgstructured.errors import ConnectionLostError
from pgstructured.testing import assert_cancellable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from pgstructured.testing import Cluster, FaultProxy, PgBouncer

IDLE = psycopg.pq.TransactionStatus.IDLE
INTRANS = psycopg.pq.TransactionStatus.INTRANS
INERROR = psycopg.pq.TransactionStatus.INERROR

PATIENCE = 20
"""Seconds that nothing here takes on any machine; less than what runs on would take."""

BIG = "COPY (SELECT i, repeat('x', 1000) FROM generate_series(1, 1000000) t(i)) TO STDOUT"
SLOW = """
COPY (SELECT i, repeat('x', 9000), CASE WHEN i > 5 THEN pg_sleep(30) END
      FROM generate_series(1, 9) AS t(i)) TO STDOUT
"""


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


async def receive_all(copy: CopyOut, max_bytes: int) -> bytes:
    pieces: list[bytes] = []
    with pytest.raises(anyio.EndOfStream):
        while True:
            pieces += [await copy.receive(max_bytes)]
            assert 1 <= len(pieces[-1]) <= max_bytes
    return b"".join(pieces)


def numbers(count: int) -> str:
    return f"COPY (SELECT i FROM generate_series(1, {count}) AS t(i)) TO STDOUT"


# ---------------------------------------------------------------- bytes


async def test_receiving(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        for max_bytes in (1, 7, 100, 65536, 10_000_000):
            count = 300 if max_bytes < 100 else 30_000
            async with conn.copy_out(numbers(count)) as copy:
                assert isinstance(copy, CopyOut)
                data = await receive_all(copy, max_bytes)
                assert data == b"".join(b"%d\n" % i for i in range(1, count + 1))
                with pytest.raises(anyio.EndOfStream):
                    await copy.receive()
                await assert_usable(conn)  # what has ended occupies nothing
            with pytest.raises(anyio.ClosedResourceError):
                await copy.receive()


async def test_iterating(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        async with conn.copy_out(BIG.replace("1000000", "3000")) as copy:
            sizes = [len(piece) async for piece in copy]
        assert sum(sizes) == sum(len(str(i)) for i in range(1, 3001)) + 3000 * 1002
        assert max(sizes) <= 65536
        assert len(sizes) < 1500  # not row by row


async def test_one_big_value(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        async with conn.copy_out("COPY (SELECT repeat('x', 5000000)) TO STDOUT") as copy:
            assert len(await receive_all(copy, 1000)) == 5_000_001


async def test_nothing(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        async with conn.copy_out("COPY (SELECT 1 WHERE false) TO STDOUT") as copy:
            with pytest.raises(anyio.EndOfStream):
                await copy.receive()
            await assert_usable(conn)
        async with conn.copy_out("COPY (SELECT 1 WHERE false) TO STDOUT") as copy:
            assert [row async for row in copy.rows()] == []
        await assert_usable(conn)


async def test_bad_input(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        await conn.execute("CREATE TABLE t (i int)")
        async with conn.copy_out(numbers(1)) as copy:
            with pytest.raises(ValueError, match="max_bytes must be at least 1, not 0"):
                await copy.receive(0)
            assert await copy.receive() == b"1\n"
        statement: Any
        for statement in (
            "SELECT 1",
            "INSERT INTO t VALUES (1)",
            "COPY t FROM STDIN",
            "COPY t TO '/nowhere/file'",
            "COPY t TO PROGRAM 'true'",
            "COPY t TO STDOUT; INSERT INTO t VALUES (1)",
            "",
        ):
            with pytest.raises(psycopg.ProgrammingError) as caught:
                async with conn.copy_out(statement):
                    pass
            assert caught.value.sqlstate is None  # the server was not asked
        cursor = await conn.execute("SELECT * FROM t")
        assert await cursor.fetchall() == []
        with pytest.raises(errors.UndefinedTable) as undefined:
            async with conn.copy_out("COPY missing TO STDOUT"):
                pass
        assert undefined.value.__notes__ == ["query: COPY missing TO STDOUT"]
        with pytest.raises(TypeError, match="no public constructor"):
            CopyOut()  # type: ignore[call-arg]
        await assert_usable(conn)


async def test_through_a_transaction_pooler(pgbouncer_transaction: PgBouncer, pg_dsn: str) -> None:
    async with connected(pgbouncer_transaction.dsn(pg_dsn)) as conn:
        async with conn.copy_out(numbers(1000)) as copy:
            assert len([row async for row in copy.rows()]) == 1000
        async with conn.copy_out(BIG) as copy:
            await copy.receive()
        await assert_usable(conn)


# ---------------------------------------------------------------- rows

VALUES = "SELECT 1, 'a\tb', NULL::text, 1.50::numeric, DATE '2024-02-29' FROM generate_series(1, 3)"
ROW = (1, "a\tb", None, Decimal("1.50"), date(2024, 2, 29))
TYPES = ["int4", "text", "text", "numeric", "date"]


@pytest.mark.parametrize("options", ["", "(FORMAT binary)"])
async def test_typed_rows(pg_dsn: str, options: str) -> None:
    async with (
        connected(pg_dsn) as conn,
        conn.copy_out(f"COPY ({VALUES}) TO STDOUT {options}") as copy,
    ):
        copy.set_types(TYPES)
        rows = copy.rows()
        assert await rows.__anext__() == ROW
        assert [row async for row in copy.rows()] == [ROW, ROW]  # goes on
        with pytest.raises(StopAsyncIteration):
            await rows.__anext__()
        await assert_usable(conn)


async def test_the_end_of_binary_rows_by_itself(
    pg_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgstructured.driver._copying_out._PIECE", 1)
    async with (
        connected(pg_dsn) as conn,
        conn.copy_out(f"COPY ({VALUES}) TO STDOUT (FORMAT binary)") as copy,
    ):
        copy.set_types(TYPES)
        assert [row async for row in copy.rows()] == [ROW, ROW, ROW]


async def test_untyped_rows(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        async with conn.copy_out(f"COPY ({VALUES}) TO STDOUT") as copy:
            expected = ("1", "a\tb", None, "1.50", "2024-02-29")
            assert [row async for row in copy.rows()] == [expected] * 3
        async with conn.copy_out("COPY (SELECT 1) TO STDOUT (FORMAT binary)") as copy:
            assert [row async for row in copy.rows()] == [(b"\0\0\0\1",)]


async def test_either_rows_or_bytes(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        async with conn.copy_out(numbers(3)) as copy:
            await copy.receive(1)
            with pytest.raises(psycopg.ProgrammingError, match="no rows"):
                copy.rows()
        async with conn.copy_out(numbers(3)) as copy:
            copy.rows()
            with pytest.raises(psycopg.ProgrammingError, match="can't be received"):
                await copy.receive()
        async with conn.copy_out("COPY (SELECT 1, 2) TO STDOUT CSV") as copy:
            with pytest.raises(psycopg.ProgrammingError, match="receive bytes"):
                copy.rows()
            assert await copy.receive() == b"1,2\n"
        await assert_usable(conn)


async def test_a_row_that_cannot_be_read(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        async with conn.copy_out("COPY (SELECT 'x') TO STDOUT") as copy:
            copy.set_types(["int4"])
            with pytest.raises((psycopg.DataError, ValueError)):
                await copy.rows().__anext__()
            with pytest.raises(anyio.ClosedResourceError):
                await copy.rows().__anext__()
        await assert_usable(conn)


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("seed", range(2))
async def test_everything_comes_back_as_it_was(pg_dsn: str, seed: int) -> None:
    rng = random.Random(seed)

    def make_text() -> str | None:
        kind = rng.random()
        if kind < 0.2:
            return None
        alphabet = "ab\t\n\r\\\"'\b\v\f,;.N\x01\x7fäß☃𝄞" if kind < 0.9 else "x"
        return "".join(rng.choices(alphabet, k=rng.choice([0, 1, 2, 10, 5000])))

    def make_bytes() -> bytes | None:
        return None if rng.random() < 0.2 else rng.randbytes(rng.choice([0, 1, 10, 3000]))

    every_byte = bytes(range(256))
    rows = [(0, "\\N", every_byte), (1, "\\.", b"\\.")]
    rows += [(i, make_text(), make_bytes()) for i in range(2, 300)]  # type: ignore[misc]
    async with connected(pg_dsn) as conn:
        await conn.execute("CREATE TABLE t (i int, t text, b bytea); CREATE TABLE u (LIKE t)")
        assert await conn.copy_in_rows("t", ["i", "t", "b"], rows) == 300
        cursor = await conn.execute("SELECT * FROM t ORDER BY i")
        assert await cursor.fetchall() == rows
        for options in ("", "(FORMAT csv)", "(FORMAT binary)"):
            await conn.execute("TRUNCATE u")
            pieces: list[bytes] = []
            async with conn.copy_out(f"COPY t TO STDOUT {options}") as source:
                with pytest.raises(anyio.EndOfStream):
                    while True:
                        pieces += [await source.receive(rng.choice([1, 3, 1000, 70_000]))]
            async with conn.copy_in(f"COPY u FROM STDIN {options}") as sink:
                for piece in pieces:
                    cut = rng.randint(0, len(piece))
                    await sink.send(piece[:cut])
                    await sink.send(piece[cut:])
            assert sink.row_count == 300
            cursor = await conn.execute("SELECT * FROM u ORDER BY i")
            assert await cursor.fetchall() == rows
            if options != "(FORMAT csv)":
                async with conn.copy_out(f"COPY u TO STDOUT {options}") as source:
                    source.set_types(["int4", "text", "bytea"])
                    assert [row async for row in source.rows()] == rows


async def test_from_one_table_into_another(pg_dsn: str) -> None:
    async with connected(pg_dsn) as here, connected(pg_dsn) as there:
        await here.execute("CREATE TABLE t AS SELECT i FROM generate_series(1, 50000) AS t(i)")
        await here.execute("CREATE TABLE u (i int)")
        async with (
            here.copy_out("COPY t TO STDOUT") as source,
            there.copy_in("COPY u FROM STDIN") as sink,
        ):
            async for piece in source:
                await sink.send(piece)
        assert sink.row_count == 50_000


# ---------------------------------------------------------------- leaving early


async def test_sqlx_what_is_not_read_to_its_end(pg_dsn: str) -> None:
    # There it has to be read or the connection closed; here nothing is left to do.
    async with connected(pg_dsn) as conn:
        with anyio.fail_after(PATIENCE):
            async with conn.copy_out(BIG) as copy:
                await copy.receive()
        await assert_usable(conn)
        async with conn.copy_out(BIG):
            pass
        await assert_usable(conn)


async def test_what_is_small_is_read_to_its_end(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        async with conn.transaction():
            async with conn.copy_out(numbers(100)) as copy:
                await copy.receive(1)
            assert conn.pgconn.transaction_status == INTRANS
            await conn.execute("SELECT 1")
        with pytest.raises(errors.InFailedSqlTransaction):
            async with conn.transaction():
                async with conn.copy_out(BIG) as copy:
                    await copy.receive(1)
                assert conn.pgconn.transaction_status == INERROR
                await conn.execute("SELECT 1")
        await assert_usable(conn)


async def test_what_is_slow_is_cancelled(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        with anyio.fail_after(PATIENCE):
            async with conn.copy_out(SLOW) as copy:
                await copy.receive()
        await assert_usable(conn)


async def test_a_body_that_raises(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        with pytest.raises(ZeroDivisionError):
            async with conn.copy_out(BIG):
                raise ZeroDivisionError
        await assert_usable(conn)


async def test_closing_early(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn, conn.copy_out(BIG) as copy:
        await copy.receive(1)
        for _ in range(2):
            await copy.aclose()
        await assert_usable(conn)
        with pytest.raises(anyio.ClosedResourceError):
            await copy.receive()


# ---------------------------------------------------------------- others, errors and ends


async def test_other_operations_meanwhile(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        async with conn.copy_out(BIG) as copy:
            await copy.receive(10)
            for operation in (
                lambda: conn.execute("SELECT 1"),
                conn.commit,
                lambda: conn.copy_out(BIG).__aenter__(),
            ):
                with pytest.raises(anyio.BusyResourceError, match="copying out of"):
                    await operation()
            assert await copy.receive(10)
        await assert_usable(conn)


async def test_an_error_in_the_middle(pg_dsn: str) -> None:
    statement = (
        "COPY (SELECT 1 / (3000 - i), repeat('x', 100) FROM generate_series(1, 9999) t(i)) "
        "TO STDOUT"
    )
    async with connected(pg_dsn) as conn:
        size = 0
        with pytest.raises(errors.DivisionByZero) as caught:
            async with conn.copy_out(statement) as copy:
                async for piece in copy:
                    size += len(piece)
        assert size == 2999 * 103
        assert caught.value.__notes__ == [f"query: {statement}"]
        await assert_usable(conn)


async def test_the_end_of_a_transaction_ends_what_is_still_open(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        with pytest.raises(anyio.BusyResourceError, match="copying out of"):
            async with conn.transaction():
                opened = conn.copy_out(BIG)
                copy = await opened.__aenter__()
                await copy.receive(10)
        await assert_usable(conn)
        with pytest.raises(anyio.ClosedResourceError):
            await copy.receive()
        await opened.__aexit__(None, None, None)


async def test_two_tasks_that_receive(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn, anyio.create_task_group() as tasks:
        async with conn.copy_out(SLOW) as copy:

            async def receive() -> None:
                with pytest.raises(anyio.ClosedResourceError):
                    while True:
                        await copy.receive()

            tasks.start_soon(receive)
            while not copy._occupation._is_running:
                await checkpoint()
            with pytest.raises(anyio.BusyResourceError):
                await copy.receive()
        await assert_usable(conn)


async def test_closing_the_connection(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        async with conn.copy_out(BIG) as copy:
            await copy.receive(1)
            await conn.aclose()
            with pytest.raises(anyio.ClosedResourceError):
                await copy.receive(1)
        with pytest.raises(psycopg.OperationalError, match="the connection is closed"):
            async with conn.copy_out(BIG):
                pass
    async with connected(pg_dsn) as conn:
        async with conn.copy_out(BIG) as copy:
            await copy.rows().__anext__()
            await conn.aclose()
            with pytest.raises(anyio.ClosedResourceError):
                await copy.rows().__anext__()


async def test_a_session_that_is_killed(pg_dsn: str, pg_cluster: Cluster) -> None:
    async with connected(pg_dsn) as conn:
        async with conn.copy_out(SLOW) as copy:
            pg_cluster.terminate_backend(conn.info.backend_pid)
            with pytest.raises(errors.AdminShutdown):
                while True:
                    await copy.receive()
            with pytest.raises(ConnectionLostError) as caught:
                await copy.receive()
            assert caught.value.__cause__ is conn.failure
        assert isinstance(conn.failure, errors.AdminShutdown)


async def test_a_session_that_has_ended_when_it_is_left(pg_dsn: str, pg_cluster: Cluster) -> None:
    async with connected(pg_dsn) as conn:
        async with conn.copy_out(SLOW) as copy:
            await copy.receive(100)
            pg_cluster.terminate_backend(conn.info.backend_pid)
            assert select.select([conn.fileno()], [], [], PATIENCE)[0]
            await anyio.sleep(0.1)
        assert isinstance(conn.failure, errors.AdminShutdown)


async def test_a_network_that_is_reset(
    pg_dsn: str, fault_proxy: FaultProxy, end_sessions: Callable[[], None]
) -> None:
    async with connected(fault_proxy.dsn(pg_dsn)) as conn:
        with pytest.raises(ConnectionLostError), anyio.fail_after(PATIENCE):
            async with conn.copy_out(SLOW) as copy:
                await copy.receive()
                fault_proxy.reset()
                while True:
                    await copy.receive()
        assert conn.state is ConnectionState.FAILED
    end_sessions()


@pytest.mark.parametrize("how", ["cancelled", "left"])
async def test_a_frozen_network(
    pg_dsn: str, fault_proxy: FaultProxy, end_sessions: Callable[[], None], how: str
) -> None:
    async with connected(fault_proxy.dsn(pg_dsn), cancel_timeout=0.3) as conn:
        with anyio.fail_after(PATIENCE), anyio.CancelScope() as scope:
            async with conn.copy_out(SLOW) as copy:
                await copy.receive()
                fault_proxy.freeze()
                if how == "cancelled":
                    scope.deadline = anyio.current_time() + 0.2
                    while True:
                        await copy.receive()
        assert scope.cancelled_caught == (how == "cancelled")
        assert conn.state is ConnectionState.FAILED
        assert "no answer" in str(conn.failure)
    end_sessions()


# ---------------------------------------------------------------- cancellation


async def test_pending_cancellations(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:

        async def enter() -> None:
            async with conn.copy_out(BIG):
                raise AssertionError("it was to be cancelled")

        await assert_cancellable(enter)
        await assert_usable(conn)
        for size in (1, 65536):
            async with conn.copy_out(BIG) as copy:
                await copy.receive(size)
                await assert_cancellable(copy.receive)
                await assert_usable(conn)
                with pytest.raises(anyio.ClosedResourceError):
                    await copy.receive()
        async with conn.copy_out(BIG) as copy:

            async def iterate() -> None:
                async for _ in copy.rows():
                    pass

            await assert_cancellable(iterate)
            await assert_usable(conn)
        async with conn.copy_out(numbers(1)) as copy:
            await copy.receive()
            with pytest.raises(anyio.EndOfStream):
                await copy.receive()
            await assert_cancellable(copy.receive)


async def test_a_cancelled_receive(pg_dsn: str) -> None:
    async with connected(pg_dsn) as conn:
        with anyio.fail_after(PATIENCE), anyio.move_on_after(0.2) as scope:
            async with conn.copy_out(SLOW) as copy:
                async for _ in copy:
                    pass
        assert scope.cancelled_caught
        await assert_usable(conn)
        with anyio.fail_after(PATIENCE), anyio.move_on_after(0.2) as scope:
            async with conn.copy_out(BIG) as copy:
                async for _ in copy:
                    pass
        assert scope.cancelled_caught
        await assert_usable(conn)


async def test_a_cancelled_entry(pg_dsn: str) -> None:
    async with connected(pg_dsn) as other, connected(pg_dsn) as conn, other.transaction():
        await other.execute("CREATE TABLE t (i int)")
        await other.execute("LOCK TABLE pg_class IN ACCESS EXCLUSIVE MODE")
        with anyio.fail_after(PATIENCE), anyio.move_on_after(0.1) as scope:
            async with conn.copy_out("COPY pg_class TO STDOUT"):
                raise AssertionError("it was to wait")
        assert scope.cancelled_caught
        assert conn.pgconn.transaction_status == IDLE

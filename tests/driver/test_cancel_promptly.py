"""Operations that never have to wait for the server are cancelled as promptly as others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from pgstructured.driver import Connection, ConnectionState, connect

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

    from pgstructured.testing import FaultProxy

PROMPTLY = 20.0  # less than any of the operations takes, or than giving it up would
GIVEN_UP = 50.0


async def copy_rows(conn: Connection[Any]) -> None:
    async with conn.cursor() as cur, cur.copy("COPY t FROM STDIN") as copy:
        for number in range(100_000_000):
            await copy.write_row((number,))


async def copy_bytes(conn: Connection[Any]) -> None:
    async with conn.cursor() as cur, cur.copy("COPY t FROM STDIN") as copy:
        for _ in range(100_000_000):
            await copy.write(b"1\n" * 20_000)


async def many(conn: Connection[Any]) -> None:
    def rows() -> Generator[tuple[int]]:
        for number in range(100_000_000):
            yield (number,)

    async with conn.cursor() as cur:
        await cur.executemany("INSERT INTO t VALUES (%s)", rows())


async def many_returning(conn: Connection[Any]) -> None:
    def rows() -> Generator[tuple[int]]:
        for number in range(100_000_000):
            yield (number,)

    async with conn.cursor() as cur:
        await cur.executemany("INSERT INTO t VALUES (%s) RETURNING n", rows(), returning=True)


async def stream(conn: Connection[Any]) -> None:
    async for _ in conn.cursor().stream("SELECT generate_series(1, 100000000)"):
        pass


async def copy_out(conn: Connection[Any]) -> None:
    statement = "COPY (SELECT generate_series(1, 100000000)) TO STDOUT"
    async with conn.cursor() as cur, cur.copy(statement) as copy:
        async for _ in copy:
            pass


OPERATIONS = [copy_rows, copy_bytes, many, many_returning, stream, copy_out]


@pytest.fixture
async def conn(pg_dsn):
    connection = await connect(pg_dsn, cancel_timeout=GIVEN_UP)
    await connection.execute("CREATE TABLE t (n int)")
    yield connection
    await connection.aclose()


async def assert_settled(conn: Connection[Any]) -> None:
    assert conn.state is ConnectionState.OPEN, conn.failure
    row = await (await conn.execute("SELECT count(*) FROM t")).fetchone()
    assert row == (0,)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda fn: fn.__name__)
async def test_cancelled_by_a_scope(
    conn: Connection[Any], operation: Callable[[Connection[Any]], Awaitable[None]]
) -> None:
    with anyio.fail_after(PROMPTLY), anyio.move_on_after(0.2) as scope:
        await operation(conn)
    assert scope.cancelled_caught
    await assert_settled(conn)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda fn: fn.__name__)
async def test_cancelled_by_another_task_in_a_transaction(
    conn: Connection[Any], operation: Callable[[Connection[Any]], Awaitable[None]]
) -> None:
    with anyio.fail_after(PROMPTLY):
        async with anyio.create_task_group() as tg:

            async def work() -> None:
                async with conn.transaction():
                    await operation(conn)

            tg.start_soon(work)
            await anyio.sleep(0.2)
            tg.cancel_scope.cancel()
    await assert_settled(conn)


async def test_every_operation_has_a_budget_of_its_own(pg_dsn) -> None:
    """Cancelled for longer than one budget, a healthy connection is as good as before."""
    conn = await connect(pg_dsn, cancel_timeout=1.5)
    until = anyio.current_time() + 2.5
    while anyio.current_time() < until:
        with anyio.CancelScope() as scope:
            scope.deadline = anyio.current_time() + 0.002
            await conn.execute("SELECT pg_sleep(30)")
    row = await (await conn.execute("SELECT 1")).fetchone()
    assert row == (1,)
    await conn.aclose()


async def test_executemany_ends_also_where_no_cancel_request_arrives(
    pg_dsn: str, fault_proxy: FaultProxy
) -> None:
    """As behind a load balancer, which may send it to another server."""
    conn = await connect(fault_proxy.dsn(pg_dsn), cancel_timeout=GIVEN_UP)
    await conn.execute("CREATE TABLE t (n int)")
    fault_proxy.refuse()
    with anyio.fail_after(PROMPTLY), anyio.move_on_after(0.2):
        await many(conn)
    await assert_settled(conn)
    await conn.aclose()


async def test_a_cancelled_copy_has_one_budget_for_its_statement_and_its_end(
    pg_dsn: str, fault_proxy: FaultProxy
) -> None:
    conn = await connect(fault_proxy.dsn(pg_dsn), cancel_timeout=1.5)
    await conn.execute("CREATE TABLE t (n int)")
    fault_proxy.delay(0.3)  # each of the two takes some 0.9 seconds to settle
    with anyio.CancelScope() as scope:
        async with conn.cursor() as cur, cur.copy("COPY t FROM STDIN") as copy:
            scope.cancel()
            while True:
                await copy.write(b"1\n" * 20_000)
    assert conn.state is ConnectionState.FAILED


async def test_a_rollback_has_a_budget_of_its_own(pg_dsn: str, fault_proxy: FaultProxy) -> None:
    conn = await connect(fault_proxy.dsn(pg_dsn), cancel_timeout=4.0, autocommit=False)
    await conn.execute("SELECT 1")
    fault_proxy.delay(0.5)  # five times: 2.5 s
    with anyio.move_on_after(0.1):
        await conn.execute("SELECT pg_sleep(30)")
    fault_proxy.delay(1.0)  # twice: more than what is left of the budget, less than all of it
    with anyio.move_on_after(0.1):
        await conn.rollback()
    fault_proxy.delay(0.0)
    assert conn.state is ConnectionState.OPEN, conn.failure
    await conn.aclose()

"""Streams and COPY, cancelled at each wait for the server, and at random: idle again, or failed."""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import psycopg
import pytest
from anyio.lowlevel import checkpoint

from pgstructured.driver import Connection, ConnectionState, connect

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from pgstructured.testing import PgBouncer

IDLE = psycopg.pq.TransactionStatus.IDLE
SECONDS = float(os.environ.get("PGSTRUCTURED_FUZZ_SECONDS", "2"))
WORKERS = 4
PATIENCE = 30
"""Seconds that nothing here takes on any machine."""

ROWS = [(i, "x" * 200) for i in range(2_000)]
DATA = b"".join(b"%d\t%s\n" % (i, text.encode()) for i, text in ROWS)
SOME = "SELECT i, repeat('x', 500) FROM generate_series(1, 1000) AS t(i)"
BIG = "SELECT i, repeat('x', 1000) FROM generate_series(1, 1000000) AS t(i)"

MOST = 12
"""Waits at which an operation is cancelled; reading what is left early may take many more."""

Operation = Callable[[Connection[Any]], Awaitable[object]]
OPERATIONS: dict[str, Operation] = {}


def operation(function: Operation) -> Operation:
    OPERATIONS[function.__name__] = function
    return function


@operation
async def stream(conn: Connection[Any]) -> None:
    async with conn.stream(SOME, batch_size=50) as rows:
        assert len([row async for row in rows]) == 1000


@operation
async def stream_left_early(conn: Connection[Any]) -> None:
    async with conn.stream(BIG) as rows:
        await rows.receive_many()


@operation
async def stream_in_a_transaction(conn: Connection[Any]) -> None:
    async with conn.transaction():
        await conn.execute_no_rows("INSERT INTO t SELECT 1, 'x' FROM generate_series(1, 2000)")
        async with conn.stream(SOME) as rows:
            assert len([row async for row in rows]) == 1000


@operation
async def copy_in(conn: Connection[Any]) -> None:
    async with conn.copy_in("COPY t FROM STDIN") as copy:
        for start in range(0, len(DATA), 10_000):
            await copy.send(DATA[start : start + 10_000])
            await checkpoint()
    assert copy.row_count == 2000


@operation
async def copy_in_rows(conn: Connection[Any]) -> None:
    async def arrive() -> AsyncIterator[Any]:
        for row in ROWS:
            yield row

    assert await conn.copy_in_rows("t", ["a", "b"], ROWS) == 2000
    assert await conn.copy_in_rows("t", ["a", "b"], arrive()) == 2000


@operation
async def copy_in_aborted(conn: Connection[Any]) -> None:
    async with conn.copy_in("COPY t FROM STDIN") as copy:
        await copy.send(DATA)
        await copy.abort("no")


@operation
async def copy_out(conn: Connection[Any]) -> None:
    async with conn.copy_out(f"COPY ({SOME}) TO STDOUT") as copy:
        size = sum([len(data) async for data in copy])
    assert size == 1000 * 502 + sum(len(str(i)) for i in range(1, 1001))
    async with conn.copy_out(f"COPY ({SOME}) TO STDOUT") as copy:
        assert len([row async for row in copy.rows()]) == 1000


@operation
async def copy_out_left_early(conn: Connection[Any]) -> None:
    async with conn.copy_out(f"COPY ({BIG}) TO STDOUT") as copy:
        await copy.receive(1000)


@pytest.fixture
def dsn(pg_dsn: str) -> str:
    with psycopg.connect(pg_dsn, autocommit=True) as conn:
        conn.execute("CREATE TABLE t (a int, b text)")
    return pg_dsn


@asynccontextmanager
async def connected(dsn: str) -> AsyncGenerator[Connection[Any]]:
    conn = await connect(dsn)
    try:
        yield conn
    finally:
        await conn.aclose()


async def assert_idle_and_whole(conn: Connection[Any]) -> None:
    assert conn.state is ConnectionState.OPEN, conn.failure
    assert conn.pgconn.transaction_status == IDLE
    assert not conn._lock.locked()
    cursor = await conn.execute("SELECT count(*) %% 2000, %s::int FROM t", [42])
    assert await cursor.fetchone() == (0, 42)


@pytest.fixture(params=["direct", "transaction", "session"])
def way(request: pytest.FixtureRequest, dsn: str) -> str:
    """Straight, through a PgBouncer that pools transactions, and one that pools sessions."""
    if request.param == "direct":
        return dsn
    bouncer: PgBouncer = request.getfixturevalue(f"pgbouncer_{request.param}")
    return bouncer.dsn(dsn)


@pytest.mark.parametrize("name", OPERATIONS)
async def test_cancelled_at_each_wait(way: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    async with connected(way) as conn:
        kind: Any = type(conn._registered)
        original = kind.wait
        for number in range(MOST):
            waits = 0
            with anyio.fail_after(PATIENCE), anyio.CancelScope() as scope:

                async def wait(self: Any, interest: int, at: int = number) -> int:
                    nonlocal waits
                    waits += 1
                    if waits > at:
                        scope.cancel()
                    ready: int = await original(self, interest)
                    return ready

                with monkeypatch.context() as patch:
                    patch.setattr(kind, "wait", wait)
                    await OPERATIONS[name](conn)
            await assert_idle_and_whole(conn)
            if not scope.cancel_called:
                break
        assert number > 1


async def test_cancelled_at_random(dsn: str) -> None:
    rng = random.Random(os.environ.get("PGSTRUCTURED_FUZZ_SEED", "5"))
    cancelled = 0
    deadline = anyio.current_time() + SECONDS

    async def work() -> None:
        nonlocal cancelled
        async with connected(dsn) as conn:
            while anyio.current_time() < deadline:
                run = OPERATIONS[rng.choice(list(OPERATIONS))]
                with anyio.fail_after(PATIENCE), anyio.move_on_after(rng.random() * 0.03) as scope:
                    await run(conn)
                cancelled += scope.cancelled_caught
                await assert_idle_and_whole(conn)

    async with anyio.create_task_group() as tasks:
        for _ in range(WORKERS):
            tasks.start_soon(work)
    assert cancelled > 0

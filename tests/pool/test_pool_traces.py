"""What a borrower leaves behind is not the next one's, whichever way it came there."""

from __future__ import annotations

from typing import Any

import anyio
import psycopg
import pytest

from pgstructured.pool import open_pool

IS_FREE = "SELECT count(*) = 0 FROM pg_locks WHERE locktype = 'advisory'"
TAKE = "SELECT pg_advisory_lock(1)"


async def by_stream(conn):
    async with conn.stream(TAKE) as rows:
        async for _ in rows:
            pass


async def by_stream_left_early(conn):
    async with conn.stream("SELECT pg_advisory_lock(1), generate_series(1, 100000)"):
        pass


async def by_copy_out(conn):
    async with conn.copy_out(f"COPY ({TAKE}) TO STDOUT") as out:
        async for _ in out:
            pass


async def by_server_cursor(conn):
    async with conn.transaction(), conn.cursor("mine") as cursor:
        await cursor.execute(TAKE)
        await cursor.fetchall()


async def by_pipeline(conn):
    async with conn.pipeline():
        await conn.execute(TAKE)


async def by_executemany(conn):
    await conn.cursor().executemany("SELECT pg_advisory_lock(%s)", [(1,), (2,)])


async def by_client_cursor(conn):
    await psycopg.AsyncClientCursor(conn).execute("SELECT pg_advisory_lock(%s)", (1,))


async def by_execute_no_rows(conn):
    await conn.execute_no_rows("DO $$ BEGIN PERFORM pg_advisory_lock(1); END $$")


async def by_psycopgs_stream(conn):
    async for _ in conn.cursor().stream(TAKE):
        pass


async def by_psycopgs_copy(conn):
    async with conn.cursor().copy(f"COPY ({TAKE}) TO STDOUT") as copy:
        async for _ in copy:
            pass


WAYS = [
    by_stream,
    by_stream_left_early,
    by_copy_out,
    by_server_cursor,
    by_pipeline,
    by_executemany,
    by_client_cursor,
    by_execute_no_rows,
    by_psycopgs_stream,
    by_psycopgs_copy,
]


@pytest.mark.parametrize("way_to_run", WAYS, ids=lambda function: function.__name__)
async def test_however_a_statement_is_run(pg_dsn, kit, way_to_run):
    async with open_pool(pg_dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            await way_to_run(conn)
            assert not await kit.fetch(conn, IS_FREE)
        async with pool.acquire() as conn:
            assert await kit.fetch(conn, IS_FREE)


async def test_what_leaves_nothing_is_not_wiped(pg_dsn):
    """Streams, COPY and the like are seen for what they are: nothing is reset, no hook runs."""
    introduced = []

    async def on_connect(conn):
        introduced.append(conn)

    async with open_pool(pg_dsn, max_size=1, on_connect=on_connect) as pool:
        async with pool.acquire() as conn:
            await conn.execute("CREATE TABLE t (i int)")
        for _ in range(2):
            async with pool.acquire() as conn:
                assert await conn.copy_in_rows("t", ["i"], [(1,), (2,)]) == 2
                async with conn.copy_out("COPY t TO STDOUT") as out:
                    assert [row async for row in out.rows()]
                async with conn.stream("SELECT * FROM t") as rows:
                    await rows.receive()
                async with conn.transaction(), conn.cursor("mine") as cursor:
                    await cursor.execute("SELECT * FROM t")
                    await cursor.fetchone()
                await conn.cursor().executemany("INSERT INTO t VALUES (%s)", [(3,), (4,)])
                await conn.execute_no_rows("UPDATE t SET i = i")
                async with conn.transaction():
                    await conn.execute("SELECT set_config('app.tenant', 'x', true)")
                await conn.execute("CREATE TABLE IF NOT EXISTS templates (temp int)")
                await conn.execute("INSERT INTO templates VALUES (1)")
        assert introduced == [conn]
        assert pool.statistics().opened == 1


async def test_a_server_cursor_with_hold(pg_dsn, kit):
    async with open_pool(pg_dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            cursor = conn.cursor("mine", withhold=True)
            await cursor.execute("SELECT 1")
            assert await kit.fetch(conn, "SELECT count(*) FROM pg_cursors WHERE is_holdable") == 1
        async with pool.acquire() as conn:
            assert await kit.fetch(conn, "SELECT count(*) FROM pg_cursors") == 0
        cursor._close()


SPELLINGS = {
    "DO'BEGIN PERFORM pg_advisory_lock(1); END'": IS_FREE,
    "DO/**/$$BEGIN PERFORM set_config('work_mem', '1234kB', false); END$$": (
        "SELECT current_setting('work_mem') <> '1234kB'"
    ),
    'LISTEN"something"': "SELECT count(*) = 0 FROM pg_listening_channels()",
    "CREATE OR REPLACE TEMP VIEW mine AS SELECT 1": "SELECT to_regclass('mine') IS NULL",
    "SET/**/work_mem='1234kB'": "SELECT current_setting('work_mem') <> '1234kB'",
    "SET--\nwork_mem='1234kB'": "SELECT current_setting('work_mem') <> '1234kB'",
    "CREATE TEMP TABLE mine ()": "SELECT to_regclass('mine') IS NULL",
    'PREPARE"mine"AS SELECT 1': "SELECT count(*) = 0 FROM pg_prepared_statements",
    "EXPLAIN ANALYZE SELECT pg_advisory_lock(1)": IS_FREE,
    "SET SESSION work_mem = '1234kB'": "SELECT current_setting('work_mem') <> '1234kB'",
}


@pytest.mark.parametrize("statement", SPELLINGS)
async def test_however_it_is_spelled(pg_dsn, kit, statement):
    async with open_pool(pg_dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            await conn.execute(statement)
            assert not await kit.fetch(conn, SPELLINGS[statement])
        async with pool.acquire() as conn:
            assert await kit.fetch(conn, SPELLINGS[statement])


@pytest.mark.parametrize(
    "statement", [TAKE, "CREATE TEMP TABLE other ()", "SET work_mem = '1234kB'", "DO 'BEGIN END'"]
)
async def test_what_on_connect_has_done_is_done_again(pg_dsn, kit, statement):
    """What wipes the borrower's traces wipes those of the hook too."""

    async def on_connect(conn):
        await conn.execute("LISTEN ours")
        await conn.execute("CREATE TEMP TABLE IF NOT EXISTS ours ()")
        await conn.execute("SET search_path = pg_temp, public")

    async with open_pool(pg_dsn, max_size=1, on_connect=on_connect) as pool:
        async with pool.acquire() as first:
            await first.execute(statement)
        async with pool.acquire() as conn:
            assert conn is first
            assert await kit.fetch(conn, "SELECT count(*) FROM pg_listening_channels()") == 1
            assert await kit.fetch(conn, "SELECT to_regclass('ours') IS NOT NULL")
            assert await kit.fetch(conn, "SHOW search_path") == "pg_temp, public"


async def test_callbacks_of_a_transaction_that_was_never_begun(pg_dsn):
    called: list[Any] = []
    async with open_pool(pg_dsn, max_size=1, autocommit=False) as pool:
        async with pool.acquire() as conn:
            conn.after_commit(lambda: called.append("mine"))
        async with pool.acquire() as again:
            assert again is conn
            await again.execute("SELECT 1")
            await again.commit()
    assert not called


async def test_handlers_that_were_exchanged(pg_dsn):
    """As many as before are not the same as before."""
    seen = []

    async def on_connect(conn):
        conn.add_notice_handler(ours)

    def ours(_):
        seen.append("ours")

    def theirs(_):
        seen.append("theirs")

    async with open_pool(pg_dsn, max_size=1, on_connect=on_connect) as pool:
        async with pool.acquire() as conn:
            conn.remove_notice_handler(ours)
            conn.add_notice_handler(theirs)
        async with pool.acquire() as again:
            assert again is conn
            await again.execute("DO $$ BEGIN RAISE WARNING 'x'; END $$")
    assert seen == ["ours"]


async def test_a_task_that_goes_on_after_its_block(pg_dsn, kit):
    """A child that keeps the connection it had: what it begins is not the next one's."""
    async with open_pool(pg_dsn, max_size=1) as pool:
        async with pool.acquire() as conn:
            pass
        await conn.execute("BEGIN")  # nobody has it
        async with pool.acquire() as again:
            assert again.info.transaction_status.name == "IDLE"


async def test_a_reset_and_a_native_cancellation(pg_dsn, fault_proxy, kit, anyio_backend_name):
    """asyncio's own gets through a shield; what is being cleaned up is cleaned up all the same."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no other cancellation than that of scopes")
    import asyncio

    async with open_pool(fault_proxy.dsn(pg_dsn), max_size=1) as pool:
        await pool.wait_ready()

        async def use():
            async with pool.acquire() as conn:
                await conn.execute("BEGIN")
                await conn.execute(TAKE)
                fault_proxy.delay(0.02)  # so that it has to wait
                asyncio.get_running_loop().call_soon(task.cancel)

        for _ in range(5):
            task = asyncio.create_task(use())
            with pytest.raises(asyncio.CancelledError):
                await task
            fault_proxy.delay(0)
            async with pool.acquire() as conn:
                assert await kit.fetch(conn, IS_FREE)
        assert pool.statistics().opened == 1
        assert kit.held(pool) == (0, 0, 0)


async def test_every_acquire_has_its_release(pg_dsn, events):
    """Also where ``on_acquire`` fails: who counts them comes to zero."""

    async def fail(_):
        raise KeyError("mine")

    async with open_pool(pg_dsn, on_acquire=fail) as pool:
        with pytest.raises(KeyError):
            async with pool.acquire():
                raise AssertionError("entered")
        with anyio.CancelScope() as scope:
            scope.cancel()
            async with pool.acquire():
                raise AssertionError("entered")
    names = [name for name, _ in events]
    assert names.count("pool.acquired") == names.count("pool.released")

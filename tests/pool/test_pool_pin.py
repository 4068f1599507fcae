"""Pins, transactions, and poolers."""

from __future__ import annotations

from typing import Any, cast

import anyio
import psycopg
import pytest

from pgstructured.errors import PoolNestedAcquireError, SessionRequiredError
from pgstructured.pool import open_pool, session_conninfo


async def test_a_pin_is_one_session(way, kit):
    """Also where held connections are not: several tasks, and fewer sessions than they."""
    async with open_pool(way.dsn, max_size=8, **way.options) as pool:

        async def work():
            async with pool.pin() as conn:
                pids = set()
                for _ in range(10):
                    pids.add(await kit.fetch(conn))
                    await anyio.lowlevel.checkpoint()
                assert len(pids) == 1
                in_transaction = conn.info.transaction_status.name == "INTRANS"
                assert in_transaction == (way.mode == "transaction")

        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(work)


async def test_a_held_connection_is_no_pin_behind_a_transaction_pooler(pg_dsn, pg_cluster, kit):
    from pgstructured.testing import PgBouncer

    with PgBouncer(pg_cluster, pool_mode="transaction", default_pool_size=3) as bouncer:
        async with open_pool(bouncer.dsn(pg_dsn), max_size=8) as pool:
            all_have_one = anyio.Event()
            has_moved = anyio.Event()

            async def work():
                async with pool.acquire() as conn:
                    if pool.statistics().in_use == 8:
                        all_have_one.set()
                    await all_have_one.wait()
                    pids = set()
                    while not has_moved.is_set():  # the pooler may give one the same for long
                        pids.add(await kit.fetch(conn))
                        if len(pids) > 1:
                            has_moved.set()

            with anyio.fail_after(30):
                async with anyio.create_task_group() as tasks:
                    for _ in range(8):
                        tasks.start_soon(work)


async def test_acquiring_in_a_pin_gives_the_pinned(pg_dsn, kit):
    async with open_pool(pg_dsn, max_size=1) as pool:
        async with pool.pin() as conn:
            async with pool.acquire() as same:
                assert same is conn
                same.row_factory = psycopg.rows.dict_row
            assert conn.row_factory is psycopg.rows.dict_row  # its block goes on
            async with pool.pin() as same:
                assert same is conn
            async with pool.transaction() as same:
                assert same is conn
                assert conn.info.transaction_status.name == "INTRANS"
            assert conn.info.transaction_status.name == "IDLE"
            async with pool.pin(transaction=True):
                assert conn.info.transaction_status.name == "INTRANS"
            assert pool.statistics().in_use == 1
        assert kit.held(pool) == (0, 0, 0)
        async with pool.acquire() as again:
            assert again is conn
            assert again.row_factory is not psycopg.rows.dict_row
            with pytest.raises(PoolNestedAcquireError):
                async with pool.acquire():
                    raise AssertionError("entered")


async def test_child_tasks_do_not_inherit_it(pg_dsn):
    async with open_pool(pg_dsn, max_size=2) as pool, pool.pin() as conn:

        async def child():
            async with pool.acquire() as other:
                assert other is not conn

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child)


async def test_pins_of_two_pools(pg_dsn):
    async with open_pool(pg_dsn) as one, open_pool(pg_dsn) as two:
        async with one.pin() as a, two.pin() as b, one.acquire() as c:
            assert a is c
            assert a is not b


async def test_a_pin_as_a_transaction(way, kit):
    async with open_pool(way.dsn, max_size=1, **way.options) as pool:
        async with pool.acquire() as conn:
            await conn.execute("CREATE TABLE t (i int)")
        with pytest.raises(KeyError):
            async with pool.pin(transaction=True) as conn:
                await conn.execute("INSERT INTO t VALUES (1)")
                raise KeyError
        async with pool.pin(transaction=True), pool.acquire() as conn:
            await conn.execute("INSERT INTO t VALUES (2)")
        async with pool.acquire() as conn:
            cursor = await conn.execute("SELECT i FROM t")
            assert await cursor.fetchall() == [(2,)]
        if way.mode == "transaction":
            with pytest.raises(SessionRequiredError, match="only a transaction"):
                async with pool.pin(transaction=False):
                    raise AssertionError("entered")
            assert kit.held(pool) == (0, 0, 0)
            async with pool.pin(), pool.pin() as conn:
                assert conn.info.transaction_status.name == "INTRANS"
        else:
            async with pool.pin(transaction=False) as conn:
                assert conn.info.transaction_status.name == "IDLE"


async def test_transactions(way, kit):
    async with open_pool(way.dsn, max_size=1, **way.options) as pool:
        async with pool.transaction(
            isolation_level=psycopg.IsolationLevel.SERIALIZABLE, read_only=True, deferrable=True
        ) as conn:
            for name, value in (
                ("transaction_isolation", "serializable"),
                ("transaction_read_only", "on"),
                ("transaction_deferrable", "on"),
            ):
                assert await kit.fetch(conn, f"SHOW {name}") == value
        async with pool.transaction() as conn:
            assert await kit.fetch(conn, "SHOW transaction_isolation") == "read committed"
        async with pool.pin(transaction=False) if way.mode == "direct" else pool.acquire() as conn:
            if way.mode != "direct":
                return
            async with pool.transaction(read_only=True):
                assert await kit.fetch(conn, "SHOW transaction_read_only") == "on"
            assert conn.read_only is None
            async with conn.transaction():
                with pytest.raises(psycopg.ProgrammingError, match="a transaction is open"):
                    async with pool.transaction(read_only=True):
                        raise AssertionError("entered")
        with pytest.raises(ValueError):
            async with pool.transaction(isolation_level=cast("Any", 77)):
                raise AssertionError("entered")


async def test_where_sessions_are(pg_dsn, kit):
    """What leads to sessions of one's own: past the pooler, or where the pool connects."""

    async def ask(pool):
        conninfo = session_conninfo(pool)
        return conninfo if isinstance(conninfo, str) else await conninfo()

    async with open_pool(pg_dsn, direct_conninfo="dbname=direct") as pool:
        assert await ask(pool) == "dbname=direct"
    async with open_pool(pg_dsn, user="postgres", row_factory=psycopg.rows.dict_row) as pool:
        found = psycopg.conninfo.conninfo_to_dict(await ask(pool))
        assert found == {**psycopg.conninfo.conninfo_to_dict(pg_dsn), "user": "postgres"}
    async with open_pool(pg_dsn, pooler="transaction") as pool:
        with pytest.raises(SessionRequiredError, match="direct_conninfo"):
            session_conninfo(pool)

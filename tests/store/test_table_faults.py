"""Cancelled at every await, killed in the middle, a thousand at once: all or nothing."""

from __future__ import annotations

import random
from contextlib import suppress

import anyio
import psycopg
import pytest

from pgstructured.errors import ConnectionLostError
from pgstructured.pool import open_pool
from pgstructured.store import TableStore


async def retrieve(store, conn):
    assert len(await store.retrieve(connection=conn)) == 3


async def persist(store, conn):
    assert await store.persist({"id": 10}, connection=conn) == 1


async def persist_many(store, conn):
    rows = [{"id": i} for i in range(10, 9010)]  # three statements
    assert await store.persist(rows, connection=conn) == 9000


async def mutate(store, conn):
    assert await store.mutate({"name": "x"}, "id >= 0", connection=conn) == 3


async def purge(store, conn):
    assert await store.purge("id < 9", connection=conn) == 3


async def ping(store, conn):
    await store.ping(connection=conn)


async def stream(store, conn):
    async with store.stream(connection=conn) as rows:
        assert len([row async for row in rows]) == 3


async def stream_left_early(store, conn):
    async with store.stream(connection=conn) as rows:
        await rows.receive()


OPERATIONS = (retrieve, persist, persist_many, mutate, purge, ping, stream, stream_left_early)
WHOLE = {
    (3, 0, 0),
    (4, 0, 0),  # persist
    (9003, 0, 0),  # persist_many
    (3, 3, 0),  # mutate
    (0, 0, 0),  # purge
}


def state(items):
    rows = items()
    return len(rows), len([row for row in rows if row["name"]]), 0


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("inside", [False, True])
async def test_cancelled_at_every_await(dsn, items, sql, kit, operation, inside):
    async with open_pool(dsn, max_size=1) as pool:
        await pool.wait_ready()
        is_over = False
        number = cancelled = 0
        while not is_over:
            assert number < 200
            for schema in ("public", None):
                sql("TRUNCATE items; INSERT INTO items (id) VALUES (1), (2), (3)")
                store = TableStore(pool, "items", schema=schema)
                with anyio.fail_after(kit.soon):
                    if inside:
                        async with pool.transaction() as conn:
                            with anyio.CancelScope() as scope:
                                await kit.cancel_at(operation(store, conn), scope, number)
                            status = conn.info.transaction_status.name
                            assert status in {"INTRANS", "INERROR"}
                    else:
                        with anyio.CancelScope() as scope:
                            await kit.cancel_at(operation(store, None), scope, number)
                cancelled += scope.cancelled_caught
                assert state(items) in WHOLE
                told = pool.statistics()
                assert (told.idle, told.in_use, told.tasks_waiting) == (1, 0, 0)
                # As good as ever.
                await TableStore(pool, "items").retrieve({"id": 1})
            is_over = not scope.cancel_called
            number += 1
        assert cancelled or number < 5  # what it waits for may be there before the cancellation
        assert pool.statistics().opened == 1


async def test_killed_in_the_middle(pg_dsn, items, sql, kit):
    """The error is the server's; the pool has another one for the next operation."""
    sql("CREATE VIEW slow AS SELECT pg_sleep(60)::text, 1 AS id")
    kill = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE query LIKE '%slow%' AND state = 'active' AND pid <> pg_backend_pid()"
    )
    async with open_pool(pg_dsn, max_size=1) as pool:
        for settings in (None, {"app.tenant": "a"}):
            for schema in (None, "public"):
                slow = TableStore(pool, "slow", schema=schema, settings=settings)

                async def stream(slow=slow):
                    async with slow.stream():
                        raise AssertionError("entered")

                async def in_transaction(slow=slow):
                    async with pool.transaction() as conn:
                        await slow.retrieve(connection=conn)

                for use in (slow.retrieve, stream, in_transaction):
                    with (
                        anyio.fail_after(kit.soon),
                        pytest.raises(psycopg.OperationalError) as caught,
                    ):
                        async with anyio.create_task_group() as tasks:

                            async def end(tasks=tasks):
                                while not sql(kill):  # noqa: ASYNC110 - it is the server's
                                    await anyio.sleep(0.01)

                            tasks.start_soon(end)
                            try:
                                await use()
                            except psycopg.OperationalError as exc:
                                error = exc
                            tasks.cancel_scope.cancel()
                        raise error
                    assert caught.value.sqlstate in {"57P01", "08003", None}
                    assert await TableStore(pool, "items").persist([{"id": 1}, {"id": 2}]) == 2
                    assert await TableStore(pool, "items").purge(None, all_rows=True) == 2


async def test_killed_while_idle(pg_dsn, items, sql):
    async with open_pool(pg_dsn, max_size=1) as pool:
        store = TableStore(pool, "items")
        await store.persist({"id": 1})
        sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
            " AND datname = current_database()"
        )
        with suppress(psycopg.OperationalError):  # where the news of its end has not come yet
            await store.retrieve()
        assert await store.retrieve(columns=["id"]) == [{"id": 1}]


async def test_a_silent_network_is_left_within_bounds(pg_dsn, items, fault_proxy, kit):
    async with open_pool(fault_proxy.dsn(pg_dsn), max_size=1, cancel_timeout=0.2) as pool:
        for settings in (None, {"app.tenant": "a"}):
            store = TableStore(pool, "items", schema="public", settings=settings)
            for use in (
                store.retrieve,
                lambda s=store: s.persist({"id": 1}),
                lambda s=store: s.persist([{"id": 1}, {"id": 2}]),
            ):
                await store.ping()
                fault_proxy.freeze()
                with anyio.fail_after(kit.soon), anyio.move_on_after(0.05) as scope:
                    await use()
                assert scope.cancelled_caught
                fault_proxy.thaw()
                told = pool.statistics()
                assert (told.idle, told.in_use) == (0, 0)
        # The server has it or has it not: the pool goes on.
        await TableStore(pool, "items").persist({"id": 5}, on_conflict="ignore")


async def test_the_connection_has_failed_before(pg_dsn, items):
    async with open_pool(pg_dsn, max_size=1) as pool, pool.acquire() as conn:
        for settings in (None, {"app.tenant": "a"}):
            store = TableStore(pool, "items", schema="public", settings=settings)
            with pytest.raises(psycopg.OperationalError):
                await conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")
            for use in (store.retrieve, store.ping):
                with pytest.raises(ConnectionLostError):
                    await use(connection=conn)
            with pytest.raises(ConnectionLostError):
                async with store.stream(connection=conn):
                    raise AssertionError("entered")


async def test_a_thousand_at_once(dsn, items, kit):
    async with open_pool(dsn, max_size=10, acquire_timeout=None) as pool:
        store = TableStore(pool, "items")

        async def work(number):
            assert await store.persist({"id": number, "name": str(number)}) == 1
            (row,) = await store.retrieve({"id": number}, columns=["name"])
            assert row == {"name": str(number)}
            assert await store.mutate({"name": "done"}, "id = ${id}", bindings={"id": number}) == 1

        with anyio.fail_after(2 * kit.soon):
            async with anyio.create_task_group() as tasks:
                for number in range(1000):
                    tasks.start_soon(work, number)
        assert {row["name"] for row in items()} == {"done"}
        assert len(items()) == 1000
        assert pool.statistics().size <= 10
        assert pool.statistics().in_use == 0


async def test_cancelled_again_and_again(dsn, items, sql):
    """At moments left to chance: what was stored is counted exactly, all or none of each call."""
    chance = random.Random(3)
    certain = set()
    possible = set()
    async with open_pool(dsn, max_size=4) as pool:
        store = TableStore(pool, "items")

        async def work(worker):
            for round_ in range(15):
                first = (worker * 100 + round_) * 10
                group = frozenset(range(first, first + chance.choice((1, 5))))
                possible.add(group)
                with anyio.move_on_after(chance.choice((None, chance.uniform(0, 0.05)))):
                    await store.persist([{"id": i, "name": "n"} for i in group])
                    certain.add(group)
                    async with store.stream(batch_size=10) as rows:
                        await rows.receive()

        async with anyio.create_task_group() as tasks:
            for worker in range(16):
                tasks.start_soon(work, worker)
        stored = {row["id"] for row in items()}
        assert certain
        for group in possible:
            assert group <= stored or (group not in certain and not group & stored)
        told = pool.statistics()
        assert (told.in_use, told.tasks_waiting, told.closed_broken) == (0, 0, 0)

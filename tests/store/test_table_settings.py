"""Settings for an operation: tenants kept apart by row-level security."""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any, cast

import anyio
import psycopg
import pytest

from pgstructured.errors import InvalidIdentifierError
from pgstructured.pool import open_pool
from pgstructured.store import TableStore

NOW = "SELECT current_setting('app.tenant', true)"


@pytest.fixture
def tenants(sql):
    """A table that shows each tenant its own rows only, and a role that has to obey."""
    sql("DO $$ BEGIN CREATE ROLE tenant_app LOGIN; EXCEPTION WHEN duplicate_object THEN END $$")
    sql("CREATE TABLE claims (id int PRIMARY KEY, tenant text NOT NULL, what text)")
    sql("ALTER TABLE claims ENABLE ROW LEVEL SECURITY")
    sql(
        "CREATE POLICY own ON claims"
        " USING (tenant = current_setting('app.tenant', true))"
        " WITH CHECK (tenant = current_setting('app.tenant', true))"
    )
    sql("GRANT ALL ON claims TO tenant_app")
    sql("INSERT INTO claims VALUES (1, 'a', 'of a'), (2, 'b', 'of b'), (3, 'b', 'of b')")
    yield lambda: sql("SELECT * FROM claims ORDER BY id")
    sql("DROP OWNED BY tenant_app")


def as_tenant(pool, tenant):
    return TableStore(
        pool, "claims", schema="public", settings={"role": "tenant_app", "app.tenant": tenant}
    )


async def test_each_sees_and_writes_its_own(dsn, tenants):
    async with open_pool(dsn) as pool:
        a, b = as_tenant(pool, "a"), as_tenant(pool, "b")
        for _ in range(8):  # and prepared
            assert [row["id"] for row in await a.retrieve()] == [1]
            assert [row["id"] for row in await b.retrieve(order_by="id")] == [2, 3]
        async with b.stream(order_by="id") as rows:
            assert [row["id"] async for row in rows] == [2, 3]
        assert await a.mutate({"what": "x"}, None, all_rows=True) == 1
        assert await b.purge("id < 3") == 1
        assert await a.persist({"id": 4, "tenant": "a"}) == 1
        assert await a.persist([{"id": i, "tenant": "a"} for i in (5, 6)], returning=["id"]) == [
            {"id": 5},
            {"id": 6},
        ]
        for data in ({"id": 7, "tenant": "b"}, [{"id": 7, "tenant": "b"}] * 2):
            with pytest.raises(psycopg.errors.InsufficientPrivilege) as caught:
                await a.persist(data)
            assert caught.value.sqlstate == "42501"
        await a.ping()
        assert [(row["id"], row["tenant"]) for row in tenants()] == [
            (1, "a"), (3, "b"), (4, "a"), (5, "a"), (6, "a"),
        ]  # fmt: skip
        assert pool.statistics().closed_broken == 0


async def test_found_by_the_first_operation_as_well(dsn, tenants):
    async with open_pool(dsn) as pool:
        settings = {"role": "tenant_app", "app.tenant": "a"}
        assert len(await TableStore(pool, "claims", settings=settings).retrieve()) == 1
        async with TableStore(pool, "claims", settings=settings).stream() as rows:
            assert len([row async for row in rows]) == 1
        store = TableStore(pool, "claims", settings=settings)
        assert await store.persist([{"id": i, "tenant": "a"} for i in (5, 6)]) == 2


async def test_a_schema_for_each_tenant(dsn, sql):
    """``search_path`` is a setting, too."""
    for tenant in ("t1", "t2"):
        sql(f"CREATE SCHEMA {tenant}; CREATE TABLE {tenant}.claims (x text)")
    async with open_pool(dsn) as pool:
        for tenant in ("t1", "t2"):
            store = TableStore(pool, "claims", settings={"search_path": tenant})
            await store.persist({"x": tenant})
            assert await store.retrieve() == [{"x": tenant}]
        await TableStore(pool, "claims", settings={"search_path": "t2"}).ping()
    assert sql("SELECT * FROM t1.claims") == [{"x": "t1"}]


async def test_nothing_of_it_is_left(dsn, tenants, kit):
    async with open_pool(dsn, max_size=1) as pool:
        store = as_tenant(pool, "a")
        await store.retrieve()
        with pytest.raises(psycopg.errors.UniqueViolation):
            await store.persist({"id": 1, "tenant": "a"})
        with pytest.raises(psycopg.errors.UniqueViolation):
            await store.persist([{"id": 9, "tenant": "a"}, {"id": 1, "tenant": "a"}])
        async with store.stream():
            pass
        async with pool.acquire() as conn:
            assert await kit.fetch(conn, NOW) in (None, "")
            assert await kit.fetch(conn, "SELECT current_user") != "tenant_app"
            await store.retrieve(connection=conn)
            assert await kit.fetch(conn, NOW) in (None, "")
        # Nor was the connection wiped for it, which would be a round trip each time.
        assert pool.statistics().opened == 1


async def test_it_does_not_cost_a_reset(pg_dsn, items, monkeypatch):
    from pgstructured.driver import PooledConnection

    seen = []
    original = PooledConnection.is_untouched

    def is_untouched(self):
        seen.append(original(self))
        return seen[-1]

    monkeypatch.setattr(PooledConnection, "is_untouched", is_untouched)
    async with open_pool(pg_dsn) as pool:
        store = TableStore(pool, "items", schema="public", settings={"app.tenant": "a"})
        await store.retrieve()
        async with store.stream():
            pass
    assert set(seen) == {True}


async def test_in_a_transaction_of_the_callers_it_is_set_back(dsn, tenants, kit):
    async with open_pool(dsn, max_size=1) as pool:
        a, b = as_tenant(pool, "a"), as_tenant(pool, "b")
        for before in (None, "theirs"):
            async with pool.transaction() as conn:
                if before is not None:
                    await conn.execute("SET LOCAL app.tenant = 'theirs'")

                async def check(conn=conn, before=before):
                    assert (await kit.fetch(conn, NOW) or None) == before
                    assert await kit.fetch(conn, "SELECT current_user") != "tenant_app"

                assert len(await a.retrieve(connection=conn)) == 1
                await check()
                assert len(await b.retrieve(connection=conn)) == 2
                await check()
                assert await a.mutate({"what": "?"}, "id > 0", connection=conn) == 1
                await check()
                rows_of_a = [{"id": i, "tenant": "a"} for i in (5, 6)]
                assert await a.persist(rows_of_a, connection=conn) == 2
                await check()
                async with b.stream(connection=conn) as rows:
                    assert len([row async for row in rows]) == 2
                await check()
                async with b.stream(connection=conn) as rows:
                    await rows.receive()
                await check()
                # An error is undone, and the transaction goes on.
                with pytest.raises(psycopg.errors.UniqueViolation):
                    await a.persist({"id": 1, "tenant": "a"}, connection=conn)
                await check()
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    await b.persist([{"id": i, "tenant": "a"} for i in (7, 8)], connection=conn)
                await check()
                with pytest.raises(psycopg.errors.UndefinedColumn):
                    async with a.stream({"nope": 1}, connection=conn):
                        raise AssertionError("entered")
                await check()
                assert await a.purge("id > 4", connection=conn) == 2
                await a.ping(connection=conn)
                await check()
        assert [row["what"] for row in tenants()] == ["?", "of b", "of b"]


async def test_what_needs_the_old_role_is_set_back_as_well(dsn, tenants, kit):
    settings = {"session_replication_role": "replica", "role": "tenant_app", "app.tenant": "a"}
    async with open_pool(dsn) as pool:
        store = TableStore(pool, "claims", settings=settings)
        for _ in range(2):
            async with pool.transaction() as conn:
                assert len(await store.retrieve(connection=conn)) == 1
                assert await kit.fetch(conn, "SHOW session_replication_role") == "origin"
                assert await kit.fetch(conn, "SELECT current_user") != "tenant_app"


async def test_a_stream_that_is_left_early(dsn, sql, kit):
    """It is cancelled on the server; in a transaction of the caller's that goes on."""
    sql("CREATE VIEW endless AS SELECT generate_series(1, 1000000000) AS i")
    async with open_pool(dsn, max_size=1) as pool:
        store = TableStore(pool, "endless", settings={"app.tenant": "a"})
        for _ in range(2):
            async with store.stream() as rows:
                assert await rows.receive() == {"i": 1}
            async with pool.transaction() as conn:
                await conn.execute("CREATE TEMP TABLE t ON COMMIT DROP AS SELECT 1")
                async with store.stream(connection=conn) as rows:
                    assert await rows.receive() == {"i": 1}
                assert await kit.fetch(conn, NOW) in (None, "")
                assert await kit.fetch(conn, "SELECT count(*) FROM t") == 1
                with pytest.raises(ZeroDivisionError):
                    async with store.stream(connection=conn) as rows:
                        raise ZeroDivisionError
                assert await kit.fetch(conn, NOW) in (None, "")
        assert pool.statistics().closed_broken == 0


async def test_an_error_at_the_commit_is_told(dsn, sql):
    """Where deferred checks are made; what is sent at once has its COMMIT in it."""
    sql("CREATE TABLE t (i int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    async with open_pool(dsn) as pool:
        for settings in (None, {"app.x": "y"}):
            store = TableStore(pool, "t", schema="public", settings=settings)
            await store.purge(None, all_rows=True)
            assert await store.persist({"i": 1}) == 1
            with pytest.raises(psycopg.errors.UniqueViolation):
                await store.persist({"i": 1})
            with pytest.raises(psycopg.errors.UniqueViolation):
                await store.persist([{"i": 1}, {"i": 2}])
            assert await store.retrieve() == [{"i": 1}]
        assert pool.statistics().closed_broken == 0


async def test_settings_that_the_server_refuses(dsn, items):
    async with open_pool(dsn) as pool:
        for name, value, error in (
            ("statement_timeout", "soon", psycopg.errors.InvalidParameterValue),
            ("no_such_setting", "x", psycopg.errors.UndefinedObject),
            ("role", "nobody_at_all", psycopg.errors.InvalidParameterValue),
        ):
            store = TableStore(pool, "items", schema="public", settings={name: value})
            with pytest.raises(error):
                await store.persist({"id": 1})
            with pytest.raises(error):
                await store.persist([{"id": 1}, {"id": 2}])
            with pytest.raises(error):
                async with store.stream():
                    raise AssertionError("entered")
            async with pool.transaction() as conn:
                with pytest.raises(error):
                    await store.retrieve(connection=conn)
                await conn.execute("SELECT 1")
        assert items() == []


@pytest.mark.parametrize("settings", [None, {"app.x": "y"}])
async def test_a_value_that_psycopg_can_not_send(dsn, items, settings):
    """Found when a part of it is sent already: nothing is stored, and no transaction is left."""
    async with open_pool(dsn, max_size=1) as pool:
        store = TableStore(pool, "items", schema="public", settings=settings)
        bad: list[Any] = [{"id": object()}, [{"id": 1}, {"id": object()}], {"id": [{"a": 1}]}]
        for data in bad:
            with pytest.raises(psycopg.ProgrammingError, match="cannot adapt"):
                await store.persist(data)
            with pytest.raises(psycopg.ProgrammingError, match="cannot adapt"):
                await store.mutate({"name": object()}, "id > 0")
            with pytest.raises(psycopg.ProgrammingError, match="cannot adapt"):
                async with store.stream({"id": object()}):
                    raise AssertionError("entered")
            async with pool.acquire() as conn:
                assert conn.info.transaction_status.name == "IDLE"
        assert items() == []
        assert pool.statistics().opened == 1


async def test_a_time_limit_is_a_setting(dsn, sql):
    sql("CREATE VIEW slow AS SELECT pg_sleep(60)::text")
    async with open_pool(dsn) as pool:
        store = TableStore(pool, "slow", schema="public", settings={"statement_timeout": "20ms"})
        with pytest.raises(psycopg.errors.QueryCanceled):
            await store.retrieve()


def test_names_and_values_are_looked_at():
    pool = cast("Any", None)
    for name in ("", "a b", "a;b", "a'", ".a", "a.", "1a", "é", "a..b", 5):
        with pytest.raises(InvalidIdentifierError, match="setting name"):
            TableStore(pool, "t", settings={cast("Any", name): "x"})
    for value in (5, None, b"x"):
        with pytest.raises(TypeError, match=r"app\.x must be a str, not"):
            TableStore(pool, "t", settings={"app.x": cast("Any", value)})
    with pytest.raises(ValueError, match="NUL"):
        TableStore(pool, "t", settings={"app.x": "a\0b"})
    TableStore(pool, "t", settings={"app.x$y_1.Z": "'; anything at all é"})


async def test_values_are_only_ever_values(dsn, items, kit):
    value = "t'; DROP TABLE items; --é\\"
    async with open_pool(dsn) as pool:
        store = TableStore(pool, "items", settings={"app.tenant": value, "app.other": "%s"})
        await store.persist({"id": 1})
        await store.persist({"id": 2})
        async with pool.transaction() as conn:
            await store.persist({"id": 3}, connection=conn)
    assert len(items()) == 3


# ---------------------------------------------------------------- cancelled, and many at once


@pytest.mark.parametrize("inside", [False, True])
async def test_tasks_that_share_a_connection_keep_their_settings(pg_dsn, sql, kit, inside):
    """Operations take turns: none is run in another's transaction, as another tenant."""
    sql("CREATE TABLE t (i int, tenant text DEFAULT current_setting('app.tenant', true))")
    async with open_pool(pg_dsn, max_size=1) as pool, pool.acquire() as conn:

        async def work(tenant):
            settings = {"app.tenant": tenant} if tenant else None
            for schema in ("public", None, "public"):
                store = TableStore(pool, "t", schema=schema, settings=settings)
                expected = {"i": 1, "tenant": tenant}
                for use in (
                    store.persist({"i": 1}, returning="*", connection=conn),
                    store.persist([{"i": 1}] * 2, returning=["i", "tenant"], connection=conn),
                    store.persist([{"i": 1}] * 5000, returning="*", connection=conn),
                ):
                    for row in await use:
                        assert {**row, "tenant": row["tenant"] or ""} == expected
                await store.ping(connection=conn)

        with anyio.fail_after(kit.soon):
            async with conn.transaction() if inside else nullcontext():
                async with anyio.create_task_group() as tasks:
                    for tenant in ("a", "b", "", "c", ""):
                        tasks.start_soon(work, tenant)
        assert conn.info.transaction_status.name == "IDLE"
    found = sql("SELECT coalesce(tenant, '') AS tenant, count(*) FROM t GROUP BY 1 ORDER BY 1")
    each = 3 * 5003
    assert [(row["tenant"], row["count"]) for row in found] == [
        ("", 2 * each), ("a", each), ("b", each), ("c", each),
    ]  # fmt: skip


async def test_a_stream_keeps_other_tasks_out_of_its_settings(pg_dsn, tenants, kit):
    """Also when it has come to its end; its own task may go on in its block."""
    async with open_pool(pg_dsn, max_size=1) as pool, pool.acquire() as conn:
        a, b = as_tenant(pool, "a"), as_tenant(pool, "b")
        plain = TableStore(pool, "claims", schema="public")
        refused = []

        async def ask(store, *, task_status):
            with pytest.raises(anyio.BusyResourceError):
                if store is b:
                    task_status.started()
                    async with store.stream(connection=conn):
                        raise AssertionError("entered")
                else:
                    task_status.started()
                    await store.retrieve(connection=conn)
            refused.append(store)

        with anyio.fail_after(kit.soon):
            async with anyio.create_task_group() as tasks:
                async with a.stream(connection=conn) as rows:
                    assert [row["id"] async for row in rows] == [1]
                    for store in (a, b, plain):
                        await tasks.start(ask, store)
                    assert [row["id"] for row in await b.retrieve(connection=conn)] == [2, 3]
                    async with b.stream(connection=conn) as others:
                        assert [row["id"] async for row in others] == [2, 3]
                    assert [row["id"] for row in await a.retrieve(connection=conn)] == [1]
                    await kit.eventually(lambda: len(refused) == 3)
            assert len(await plain.retrieve(connection=conn)) == 3
            async with plain.stream(connection=conn) as rows:
                assert len([row async for row in rows]) == 3
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(lambda: plain.purge("id = 1", connection=conn))
        assert [row["id"] for row in tenants()] == [2, 3]


@pytest.mark.parametrize("operation", ["retrieve", "persist", "many", "stream"])
@pytest.mark.parametrize("inside", [False, True])
async def test_cancelled_at_every_await(dsn, tenants, kit, operation, inside):
    """Whatever is given back, or goes on, has nothing of the tenant's."""

    async def use(store, conn):
        if operation == "retrieve":
            await store.retrieve(connection=conn)
        elif operation == "persist":
            await store.persist({"id": 10, "tenant": "a"}, connection=conn)
        elif operation == "many":
            await store.persist([{"id": i, "tenant": "a"} for i in (10, 11)], connection=conn)
        else:
            async with store.stream(connection=conn) as rows:
                await rows.receive()

    async with open_pool(dsn, max_size=1) as pool:
        await pool.wait_ready()
        number = cancelled = 0
        is_over = False
        while not is_over:
            assert number < 200
            for known in (True, False):
                store = as_tenant(pool, "a")
                if not known:
                    settings = {"role": "tenant_app", "app.tenant": "a"}
                    store = TableStore(pool, "claims", settings=settings)
                with anyio.fail_after(kit.soon):
                    if inside:
                        async with pool.transaction() as conn:
                            with anyio.CancelScope() as scope:
                                await kit.cancel_at(use(store, conn), scope, number)
                            if conn.info.transaction_status.name == "INTRANS":
                                assert await kit.fetch(conn, NOW) in (None, "")
                                assert await kit.fetch(conn, "SELECT current_user") != "tenant_app"
                    else:
                        with anyio.CancelScope() as scope:
                            await kit.cancel_at(use(store, None), scope, number)
                cancelled += scope.cancelled_caught
                async with pool.acquire() as conn:
                    assert conn.info.transaction_status.name == "IDLE"
                    assert await kit.fetch(conn, NOW) in (None, "")
                    assert await kit.fetch(conn, "SELECT current_user") != "tenant_app"
                    count = await kit.fetch(conn, "SELECT count(*) FROM claims WHERE id > 9")
                    assert count in ((0, 2) if operation == "many" else (0, 1))
                    await conn.execute("DELETE FROM claims WHERE id > 9")
            is_over = not scope.cancel_called
            number += 1
        assert cancelled or number < 5  # what it waits for may be there before the cancellation
        assert pool.statistics().opened == 1


async def test_many_tenants_cancelled_at_random(dsn, tenants, sql, kit):
    """Nobody ever sees a row of another's, and no connection keeps a setting."""
    sql("TRUNCATE claims")
    sql("INSERT INTO claims SELECT i, 't' || i % 20, 'x' FROM generate_series(0, 199) AS t(i)")
    chance = random.Random(11)
    wrong: list[dict[str, Any]] = []
    ended = cancelled = 0
    async with open_pool(dsn, max_size=4) as pool:

        async def work(tenant):
            nonlocal ended, cancelled
            store = as_tenant(pool, tenant)
            for _ in range(12):
                limit = chance.choice((None, chance.uniform(0, 0.05)))
                with anyio.move_on_after(limit) as scope:
                    way = chance.randrange(4)
                    if way == 0:
                        rows = await store.retrieve()
                    elif way == 1:
                        async with store.stream() as stream:
                            rows = [row async for row in stream]
                    elif way == 2:
                        async with pool.transaction() as conn:
                            rows = await store.retrieve(connection=conn)
                    else:
                        await store.mutate({"what": tenant}, "id >= 0")
                        rows = await store.retrieve()
                    wrong.extend(row for row in rows if row["tenant"] != tenant)
                    assert len(rows) == 10
                    ended += 1
                cancelled += scope.cancelled_caught
                with anyio.CancelScope(shield=True):
                    async with pool.acquire() as conn:
                        assert await kit.fetch(conn, NOW) in (None, "")

        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(work, f"t{number}")
        assert ended
        assert cancelled
        assert pool.statistics().closed_broken == 0
    assert wrong == []
    assert all(row["what"] in ("x", row["tenant"]) for row in tenants())

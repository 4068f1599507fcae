"""Seed 003, item by item, in our form; and axon's own tests of it (research/store.md, 1.14).

`PostgresStoreBackend` is `TableStore` on a pool: what it calls a connection is the pool's, its pin
is `Pool.pin`, and `StoreConn` is ``connection=``.
"""

from __future__ import annotations

import datetime as dt
import json
from contextlib import suppress
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import anyio
import psycopg
import pytest

from pgstructured.errors import (
    AmbiguousTableError,
    ConninfoError,
    FilterError,
    PoolTimeoutError,
    TableNotFoundError,
)
from pgstructured.pool import open_pool
from pgstructured.store import TableStore, mask_conninfo, resolve_conninfo, to_jsonable

# ---------------------------------------------------------------- connect


async def test_connect_is_lazy(pg_dsn, items, monkeypatch):
    """`connect`: a bounded pool that makes no connection before the first operation."""
    monkeypatch.setenv("CLAIMS_DB", pg_dsn)
    async with open_pool("env:CLAIMS_DB", max_size=3) as pool:
        store = TableStore(pool, "items")
        assert pool.statistics().opened == 0
        await store.retrieve()
        assert pool.statistics().opened == 1
        async with anyio.create_task_group() as tasks:
            for number in range(30):
                tasks.start_soon(store.persist, {"id": number})
        assert pool.statistics().size <= 3


async def test_a_malformed_connection_string_is_a_typed_error(monkeypatch):
    """`StoreError::PoolInit`, `EmptyEnvVarName`, `MissingEnvVar`; none of them shows it."""
    monkeypatch.delenv("NOT_THERE", raising=False)
    for conninfo in ("postgres://u:hunter2@h:port/db", "host=h password='hunter2"):
        with pytest.raises(ConninfoError) as caught:
            async with open_pool(conninfo):
                raise AssertionError("entered")
        assert "hunter2" not in str(caught.value)
    for conninfo in ("env:", "env:NOT_THERE", "env:not a name"):
        with pytest.raises(ConninfoError):
            await resolve_conninfo(conninfo)


async def test_the_environment_is_read(monkeypatch):
    monkeypatch.setenv("CLAIMS_DB", "postgres://here/db")
    assert await resolve_conninfo("env:CLAIMS_DB") == "postgres://here/db"
    assert await resolve_conninfo("host=there") == "host=there"


@pytest.mark.parametrize(
    ("name", "namespace", "expected"),
    [
        (None, None, "pgstructured"),
        ("claims", None, "pgstructured/claims"),
        ("claims", "tenant_42", "pgstructured/claims/tenant_42"),
        (None, "tenant_42", "pgstructured/tenant_42"),
        ("x" * 100, None, ("pgstructured/" + "x" * 100)[:63]),
        ("é" * 40, None, "pgstructured/" + "?" * 40),
    ],
)
async def test_every_session_says_whose_it_is(pg_dsn, sql, name, namespace, expected):
    """`connect_named` and `connect_named_with_namespace`."""
    sql("CREATE VIEW me AS SELECT current_setting('application_name') AS name")
    async with open_pool(pg_dsn, name=name, namespace=namespace) as pool:
        assert await TableStore(pool, "me").retrieve() == [{"name": expected}]
        seen = sql("SELECT application_name AS name FROM pg_stat_activity")
        assert {"name": expected} in seen


def test_masked_dsn():
    """Its defects stay out: no user eaten, nothing of the password left."""
    assert "user=u" in mask_conninfo("postgres://u:p@h/db")
    assert mask_conninfo("postgres://u@h/db") == "user=u dbname=db host=h"
    for conninfo in (
        "postgres://u:secret@h/db",
        "postgres://u:secr%40et@h/db",
        "postgres://u:se@secret@h/db",
        "postgres://h/db?user=u&password=secret",
        "host=h password=secret",
        "host=h password='sec ret secret'",
    ):
        assert "secret" not in mask_conninfo(conninfo)
        assert "secr" not in mask_conninfo(conninfo)


# ---------------------------------------------------------------- acquire_pin


async def test_a_pin_holds_one_backend(dsn, sql):
    """Also behind a transaction pooler, where axon's did not."""
    sql("CREATE VIEW pid AS SELECT pg_backend_pid() AS pid")
    async with open_pool(dsn, max_size=8) as pool:
        store = TableStore(pool, "pid")

        async def flow():
            async with pool.pin() as conn:
                pids: set[int] = set()
                for _ in range(10):
                    pids.update(row["pid"] for row in await store.retrieve())
                    pids.update(row["pid"] for row in await store.retrieve(connection=conn))
                assert len(pids) == 1

        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(flow)
        assert pool.statistics().in_use == 0


async def test_a_pin_that_is_not_to_be_had(pg_dsn, items):
    """`StoreError::Connect`: the pool is exhausted."""
    async with open_pool(pg_dsn, max_size=1, acquire_timeout=1) as pool:
        store = TableStore(pool, "items")
        async with anyio.create_task_group() as tasks:

            async def hold(*, task_status):
                async with pool.pin():
                    task_status.started()
                    await anyio.sleep_forever()

            await tasks.start(hold)
            with pytest.raises(PoolTimeoutError):
                await store.retrieve()
            with pytest.raises(TimeoutError):
                async with pool.pin():
                    raise AssertionError("entered")
            tasks.cancel_scope.cancel()
        assert await store.retrieve() == []


# ---------------------------------------------------------------- operations


async def test_query_insert_mutate_purge_ping(dsn, items):
    async with open_pool(dsn) as pool:
        store = TableStore(pool, "items")
        await store.ping()
        assert await store.persist({"id": 1, "name": "x"}) == 1
        bindings = {"name": "x"}
        (row,) = await store.retrieve("name = '${name}'", bindings=bindings)
        assert row["id"] == 1
        assert await store.mutate({"name": "y"}, "name = '${name}'", bindings=bindings) == 1
        assert await store.purge("name = 'y'") == 1
        assert items() == []


async def test_a_clone_is_as_good(pg_dsn, items):
    """`Clone`: the pool is shared; making a store costs nothing."""
    async with open_pool(pg_dsn) as pool:
        for number in range(20):
            await TableStore(pool, "items").persist({"id": number})
        assert pool.statistics().opened == 1


async def test_ping_says_what_is_wrong(fault_proxy, pg_dsn, items, kit):
    async with open_pool(fault_proxy.dsn(pg_dsn), acquire_timeout=1) as pool:
        store = TableStore(pool, "items")
        async with open_pool(pg_dsn) as direct:
            await TableStore(direct, "items").ping()
        fault_proxy.refuse()
        fault_proxy.reset()
        with pytest.raises((PoolTimeoutError, psycopg.OperationalError)):
            await store.ping()
        fault_proxy.accept()
        with anyio.fail_after(kit.soon):
            while True:
                with suppress(PoolTimeoutError):  # it pauses between its attempts
                    await store.ping()
                    break


# ---------------------------------------------------------------- axon's tests


async def test_t1_a_uuid_key_in_another_schema(dsn, sql):
    sql(
        "CREATE SCHEMA claims;"
        " CREATE TABLE claims.t (id uuid PRIMARY KEY, n numeric, at timestamptz)"
    )
    async with open_pool(dsn) as pool:
        store = TableStore(pool, "t")
        key = uuid4()
        assert await store.persist({"id": str(key), "n": "1.10", "at": "2026-01-31T12:00Z"}) == 1
        for value in (key, str(key)):
            (row,) = await store.retrieve({"id": value})
            assert row["id"] == key
            assert len(await store.retrieve("id = '${id}'", bindings={"id": value})) == 1
            assert len(await store.retrieve("id = ${id}", bindings={"id": value})) == 1
        assert row["n"] == Decimal("1.10")
        assert await store.mutate({"n": 5}, {"id": key}) == 1
        assert await store.purge({"id": key}) == 1


@pytest.mark.parametrize("fresh", [False, True])
async def test_t2_and_t3_twenty_operations_on_two_tables(pg_cluster, pg_dsn, sql, fresh):
    """Through five sessions; and with what is known of the tables forgotten before each."""
    from pgstructured.testing import PgBouncer

    sql("CREATE SCHEMA s; CREATE TABLE s.one (i int); CREATE TABLE s.two (i int)")
    with PgBouncer(pg_cluster, pool_mode="transaction", default_pool_size=5) as bouncer:
        async with open_pool(bouncer.dsn(pg_dsn), max_size=10) as pool:
            kept = {name: TableStore(pool, name) for name in ("one", "two")}

            async def work(number):
                for name in ("one", "two"):
                    store = TableStore(pool, name) if fresh else kept[name]
                    await store.persist({"i": number})
                    store = TableStore(pool, name) if fresh else kept[name]
                    assert await store.retrieve({"i": number}) == [{"i": number}]

            for round_ in range(5):
                async with anyio.create_task_group() as tasks:
                    for number in range(20):
                        tasks.start_soon(work, 100 * round_ + number)
            assert len(await kept["one"].retrieve()) == len(await kept["two"].retrieve()) == 100


async def test_t4_alter_table_between_operations(dsn, items, sql):
    async with open_pool(dsn, max_size=1) as pool:
        store = TableStore(pool, "items")
        for number in range(10):
            await store.persist({"id": number})
            assert len(await store.retrieve(order_by="id")) == number + 1
            sql(f"ALTER TABLE items ADD COLUMN c{number} int DEFAULT {number}")
            assert (await store.retrieve({"id": number}))[0][f"c{number}"] == number
            sql(f"ALTER TABLE items ALTER COLUMN c{number} TYPE text")
            assert (await store.retrieve({"id": number}))[0][f"c{number}"] == str(number)


async def test_t5_transactions_one_after_the_other(dsn, items):
    async with open_pool(dsn, max_size=2) as pool:
        store = TableStore(pool, "items")
        for number in range(10):
            with pytest.raises(ZeroDivisionError):
                async with pool.pin(transaction=True):
                    await store.persist({"id": number, "name": "undone"})
                    raise ZeroDivisionError
            async with pool.pin(transaction=True):
                await store.persist({"id": number, "name": "kept"})
                assert len(await store.retrieve({"id": number})) == 1
        assert {row["name"] for row in items()} == {"kept"}


async def test_rows_are_json_when_asked(pg_dsn, sql):
    sql(
        "CREATE VIEW kinds AS SELECT true AS b, 1::int2 AS i, 1.5::float8 AS f,"
        " 'NaN'::float8 AS nan,"
        " 1.10::numeric AS n, 'x'::text AS t, '8c6dd4a1-6b43-4a4f-9f5d-0a0f6d2a8f0e'::uuid AS u,"
        " '2026-01-31 12:00+01'::timestamptz AS tz, '2026-01-31'::date AS d,"
        " '{\"a\": 1}'::jsonb AS j, '\\x00ff'::bytea AS y, NULL AS nothing,"
        " ARRAY[1.5::numeric] AS a, '10.0.0.1'::inet AS ip"
    )
    async with open_pool(pg_dsn) as pool:
        (row,) = await TableStore(pool, "kinds").retrieve()
    assert isinstance(row["u"], UUID)
    assert isinstance(row["tz"], dt.datetime)
    told: dict[str, Any] = json.loads(json.dumps(to_jsonable(row), allow_nan=False))
    assert told["n"] == "1.10"
    assert told["nan"] is None
    assert told["tz"] == "2026-01-31T11:00:00Z"
    assert told["y"] == "AP8="
    assert told["a"] == ["1.5"]
    assert told["ip"] == "10.0.0.1"


@pytest.mark.parametrize(
    "where",
    [
        "id = 1; DROP TABLE items",
        "id = 1 -- and",
        "1 = 1",
        "id = 1 OR",
        "name = 'x' UNION SELECT 1",
        "pg_sleep(1) = 1",
        "name = 'unfinished",
    ],
)
async def test_a_malicious_filter_is_refused(pg_dsn, items, where):
    async with open_pool(pg_dsn) as pool:
        store = TableStore(pool, "items")
        await store.persist({"id": 1, "name": "x"})
        with pytest.raises(FilterError):
            await store.purge(where)
        assert len(items()) == 1


async def test_a_malicious_value_is_a_value(dsn, items):
    value = "x'; DROP TABLE items; --"
    async with open_pool(dsn) as pool:
        store = TableStore(pool, "items")
        await store.persist({"id": 1, "name": value})
        assert len(await store.retrieve("name = '${v}'", bindings={"v": value})) == 1
        assert len(await store.retrieve("name = 'x\\'; DROP TABLE items; --'")) == 1
        assert len(await store.retrieve({"name": value})) == 1
    assert len(items()) == 1


async def test_text_is_not_mangled(dsn, items):
    """axon's bindings made Latin-1 of UTF-8."""
    async with open_pool(dsn) as pool:
        store = TableStore(pool, "items")
        await store.persist({"id": 1, "name": "José 東京"})
        assert len(await store.retrieve("name = 'José 東京'")) == 1
        assert len(await store.retrieve("name = 'José ${city}'", bindings={"city": "東京"})) == 1


async def test_a_write_that_heals_is_written_once(dsn, sql):
    sql("CREATE SCHEMA a; CREATE SCHEMA b; CREATE TABLE a.t (i int)")
    async with open_pool(dsn) as pool:
        store = TableStore(pool, "t")
        for number in range(10):
            await store.persist({"i": number})
            home = ("a", "b")[number % 2]
            sql(f"ALTER TABLE {home}.t SET SCHEMA {'b' if home == 'a' else 'a'}")
        assert len(await store.retrieve()) == 10


async def test_resolved_outside_of_the_current_schema_or_refused(dsn, sql):
    sql("CREATE SCHEMA a; CREATE SCHEMA b; CREATE TABLE b.t (i int)")
    async with open_pool(dsn) as pool:
        assert await TableStore(pool, "t").retrieve() == []
        sql("CREATE TABLE a.t (i int)")
        with pytest.raises(AmbiguousTableError) as caught:
            await TableStore(pool, "t").retrieve()
        assert caught.value.schemas == ("a", "b")
        with pytest.raises(TableNotFoundError):
            await TableStore(pool, "u").retrieve()


# ---------------------------------------------------------------- defects that stay out


async def test_an_empty_filter_does_not_delete_everything(pg_dsn, items):
    async with open_pool(pg_dsn) as pool:
        store = TableStore(pool, "items")
        await store.persist({"id": 1})
        with pytest.raises(ValueError, match="all_rows"):
            await store.purge("")
        with pytest.raises(ValueError, match="all_rows"):
            await store.mutate({"name": "x"}, "")
    assert len(items()) == 1


async def test_an_unknown_binding_is_not_taken_literally(pg_dsn, items):
    async with open_pool(pg_dsn) as pool:
        with pytest.raises(FilterError):
            await TableStore(pool, "items").retrieve("name = '${nope}'", bindings={"yes": 1})


async def test_errors_have_their_sqlstate(pg_dsn, items):
    async with open_pool(pg_dsn) as pool:
        store = TableStore(pool, "items")
        await store.persist({"id": 1})
        with pytest.raises(psycopg.Error) as caught:
            await store.persist({"id": 1})
        assert caught.value.sqlstate == "23505"


async def test_a_stream_does_not_materialise(pg_dsn, sql):
    sql("CREATE VIEW endless AS SELECT generate_series(1, 1000000000) AS i")
    async with open_pool(pg_dsn) as pool:
        with anyio.fail_after(20):
            async with TableStore(pool, "endless").stream() as rows:
                assert await rows.receive() == {"i": 1}

"""`TableStore`: what it stores and finds, on which connection, and what it refuses."""

from __future__ import annotations

import collections
import datetime as dt
from contextlib import suppress
from decimal import Decimal
from typing import Any, cast
from uuid import uuid4

import anyio
import psycopg
import pytest
from psycopg.rows import dict_row, namedtuple_row, scalar_row
from psycopg.types import TypeInfo
from psycopg.types.hstore import register_hstore
from psycopg.types.json import Json, Jsonb

from pgstructured.errors import (
    FilterError,
    InvalidIdentifierError,
    PoolNestedAcquireError,
)
from pgstructured.pool import open_pool
from pgstructured.store import TableStore
from pgstructured.testing import assert_cancellable


@pytest.fixture
async def pool(pg_dsn):
    async with open_pool(pg_dsn) as pool:
        yield pool


# ---------------------------------------------------------------- operations


async def test_rows_go_in_and_come_out(dsn, items):
    async with open_pool(dsn) as pool:
        store = TableStore(pool, "items")
        row = {"id": 1, "name": "José 東京", "price": Decimal("1.50"), "tags": ["a", "b"]}
        assert await store.persist({**row, "doc": {"x": [1, None]}}) == 1
        (stored,) = await store.retrieve()
        assert stored == {
            **row,
            "doc": {"x": [1, None]},
            "made": dt.datetime(2026, 1, 31, 12, tzinfo=dt.UTC),
        }
        assert items() == [stored]
        assert await store.mutate({"name": "x", "price": None}, {"id": 1}) == 1
        assert await store.mutate({"name": "y"}, "id = 7") == 0
        assert items()[0]["name"] == "x"
        assert items()[0]["price"] is None
        assert await store.purge({"id": 7}) == 0
        assert await store.purge("id = ${id}", bindings={"id": 1}) == 1
        assert items() == []


async def test_what_is_retrieved(pool, items):
    store = TableStore(pool, "items")
    await store.persist([{"id": i, "name": None if i == 3 else f"n{i % 2}"} for i in range(6)])

    async def ids(*args, **options):
        return [row["id"] for row in await store.retrieve(*args, **options)]

    assert await ids(order_by="id") == [0, 1, 2, 3, 4, 5]
    assert await ids(order_by="id desc", limit=2) == [5, 4]
    assert await ids(order_by=["name desc nulls last", "id"], limit=3) == [1, 5, 0]
    assert await ids({"name": None}) == [3]
    assert await ids({"name": "n1", "id": [1, 2, 3]}) == [1]
    assert await ids({"id": []}) == []
    assert await ids("name = 'n1' and not id = 1") == [5]
    assert await ids("name = ${name}", bindings={"name": "n1"}, order_by="id") == [1, 5]
    assert await ids(limit=0) == []
    assert await ids(order_by=[], limit=6, where="  ") == list(range(6))
    assert await store.retrieve({"id": 2}, columns=["name", "id"]) == [{"name": "n0", "id": 2}]
    assert list((await store.retrieve({"id": 2}, columns=["name", "id"]))[0]) == ["name", "id"]
    for name in ("n0", "é", "n0"):  # the second is looked at more closely
        assert len(await store.retrieve({"name": name})) == (3 if name == "n0" else 0)


async def test_a_stream_is_read_while_the_server_makes_it(pool, sql):
    """So of rows without an end the first come, and a reader that stops is not drowned."""
    sql("CREATE VIEW endless AS SELECT generate_series(1, 1000000000) AS i")
    store = TableStore(pool, "endless")
    for _ in range(2):
        with anyio.fail_after(20):
            async with store.stream(batch_size=10) as rows:
                assert [await rows.receive() for _ in range(25)] == [{"i": i} for i in range(1, 26)]
    assert pool.statistics().closed_broken == 0


async def test_a_stream_has_the_options_of_retrieve(dsn, items):
    async with open_pool(dsn) as pool:
        store = TableStore(pool, "items")
        await store.persist([{"id": i} for i in range(10)])
        async with store.stream(
            "id < ${most}", bindings={"most": 5}, columns=["id"], order_by="id desc", limit=3
        ) as rows:
            assert [row async for row in rows] == [{"id": 4}, {"id": 3}, {"id": 2}]
            with pytest.raises(anyio.EndOfStream):
                await rows.receive()
        async with store.stream({"id": 99}) as rows:
            assert [row async for row in rows] == []
        with pytest.raises(ValueError, match="batch_size"):
            async with store.stream(batch_size=0):
                raise AssertionError("entered")


async def test_ping(pool, items):
    await TableStore(pool, "items").ping()
    await TableStore(pool, "items", schema="public").ping()
    async with pool.acquire() as conn:
        await TableStore(pool, "items").ping(connection=conn)


async def test_returning(pool, items):
    store = TableStore(pool, "items")
    assert await store.persist({"id": 1, "name": "a"}, returning=["id"]) == [{"id": 1}]
    assert await store.persist({"id": 2, "name": "a"}, returning="name") == [{"name": "a"}]
    (row,) = await store.persist([{"id": 3}], returning="*")
    assert row == items()[2]
    rows: list[dict[str, Any]] = [{"id": i} for i in (9, 7, 8)]
    assert await store.persist(rows, returning=["id"]) == rows
    assert await store.persist([], returning=["id"]) == []


async def test_on_conflict(pool, items):
    store = TableStore(pool, "items")
    await store.persist({"id": 1, "name": "first"})
    with pytest.raises(psycopg.errors.UniqueViolation) as caught:
        await store.persist({"id": 1, "name": "second"})
    assert caught.value.sqlstate == "23505"
    assert caught.value.diag.constraint_name == "items_pkey"
    assert await store.persist({"id": 1, "name": "second"}, on_conflict="ignore") == 0
    assert await store.persist({"id": 1}, on_conflict="ignore", returning=["id"]) == []
    rows: list[dict[str, Any]] = [{"id": i, "name": "n"} for i in (1, 2, 2, 3)]
    assert await store.persist(rows, on_conflict="ignore", returning=["id"]) == [
        {"id": 2},
        {"id": 3},
    ]
    assert [row["name"] for row in items()] == ["first", "n", "n"]


# ---------------------------------------------------------------- values


async def test_values_of_every_kind(pool, sql):
    sql(
        "CREATE TABLE kinds (id uuid PRIMARY KEY, b bytea, j json, jb jsonb, d date, n numeric,"
        " a int[], i interval, f float8, t bool, v varchar(3))"
    )
    store = TableStore(pool, "kinds")
    row = {
        "id": uuid4(),
        "b": b"\x00\xff%s",
        "j": {"a": 1},
        "jb": {"b": [1, {"c": None}]},
        "d": dt.date(2026, 1, 31),
        "n": Decimal("12345678901234567890.123"),
        "a": [1, 2, 3],
        "i": dt.timedelta(days=1),
        "f": 1.5,
        "t": True,
        "v": "%s;",
    }
    assert await store.persist(row) == 1
    assert await store.retrieve({"id": row["id"]}) == [row]
    assert await store.retrieve({"jb": row["jb"]}, columns=["v"]) == [{"v": "%s;"}]
    await store.mutate({"jb": Jsonb([1, 2]), "j": Json("text")}, {"id": row["id"]})
    (stored,) = await store.retrieve(columns=["j", "jb"])
    assert stored == {"j": "text", "jb": [1, 2]}
    ordered = collections.OrderedDict(z=1)
    more = {**row, "id": uuid4(), "jb": ordered, "j": {}}
    assert await store.persist([more, {**more, "id": uuid4()}], returning=["jb"]) == [
        {"jb": {"z": 1}},
        {"jb": {"z": 1}},
    ]
    assert await store.mutate({"jb": collections.OrderedDict(y=2)}, {"id": row["id"]}) == 1
    assert await store.retrieve({"id": row["id"]}, columns=["jb"]) == [{"jb": {"y": 2}}]
    with pytest.raises(psycopg.errors.StringDataRightTruncation):
        await store.mutate({"v": "much too long"}, {"id": row["id"]})
    with pytest.raises(psycopg.errors.DatatypeMismatch):
        await store.mutate({"jb": [1, 2]}, {"id": row["id"]})  # a list is an array


async def test_a_rule_of_the_users_for_dictionaries_stands(pg_dsn, sql):
    """As with ``hstore``, which psycopg registers for them."""
    sql("CREATE EXTENSION hstore; CREATE TABLE h (id int, h hstore)")

    async def on_connect(conn):
        info = await TypeInfo.fetch(conn, "hstore")
        register_hstore(info, conn)

    async with open_pool(pg_dsn, on_connect=on_connect) as pool:
        store = TableStore(pool, "h")
        assert await store.persist({"id": 1, "h": {"a": "b"}}) == 1
        assert await store.retrieve({"h": {"a": "b"}}) == [{"id": 1, "h": {"a": "b"}}]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("where", [None, "", "  \n ", {}])
async def test_an_empty_filter_deletes_nothing_unless_it_is_meant(pool, items, sql, where):
    store = TableStore(pool, "items")
    sql("INSERT INTO items (id) VALUES (1), (2)")
    before = pool.statistics().acquired
    with pytest.raises(FilterError, match=r"purge .* all_rows=True"):
        await store.purge(where)
    with pytest.raises(FilterError, match=r"mutate .* all_rows=True"):
        await store.mutate({"name": "x"}, where)
    assert pool.statistics().acquired == before
    assert [row["name"] for row in items()] == [None, None]
    assert await store.mutate({"name": "x"}, where, all_rows=True) == 2
    assert await store.purge({"id": 1}, all_rows=True) == 1
    assert await store.purge(where, all_rows=True) == 1


async def test_what_is_refused_before_anything_is_sent(pool):
    store = TableStore(pool, "no_such_table")
    bad: Any = store
    with pytest.raises(ValueError, match="no columns"):
        await store.persist({})
    with pytest.raises(ValueError, match="row 1 has no columns"):
        await store.persist([{}, {"a": 1}])
    with pytest.raises(ValueError, match="no columns"):
        await store.mutate({}, {"id": 1})
    with pytest.raises(ValueError, match=r"row 3 lacks 'b': .* nothing was stored"):
        await store.persist([{"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1}])
    with pytest.raises(ValueError, match="row 2 has 'c' besides"):
        await store.persist([{"a": 1}, {"a": 1, "c": 2}])
    with pytest.raises(ValueError, match="row 2 lacks 'a' and has 'b' besides"):
        await store.persist([{"a": 1}, {"b": 1}])
    with pytest.raises(TypeError, match=r"row 2 must be a mapping .* not int"):
        await bad.persist([{"a": 1}, 5])
    for data in (5, "text", b"bytes", None):
        with pytest.raises(TypeError, match="data must be a mapping"):
            await bad.persist(data)
        with pytest.raises(TypeError, match="data must be a mapping"):
            await bad.mutate(data, {"id": 1})
    with pytest.raises(TypeError, match="not list"):
        await bad.mutate([{"a": 1}], {"id": 1})
    for limit in (-1, 1.5, "1", True):
        with pytest.raises(ValueError, match="limit must be"):
            await bad.retrieve(limit=limit)
        with pytest.raises(ValueError, match="limit must be"):
            bad.stream(limit=limit)
    for rows in ({"a": 1}, [{"a": 1}], [{"a": 1}, {"a": 2}]):
        with pytest.raises(ValueError, match='on_conflict must be "error" or "ignore"'):
            await bad.persist(rows, on_conflict="update")
    with pytest.raises(FilterError):
        await store.retrieve("a = ")
    with pytest.raises(FilterError, match="unknown"):
        await store.retrieve("a = ${nope}", bindings={"x": 1})
    for _ in range(2):
        with pytest.raises(FilterError):
            await store.retrieve({"a": "\0"})
        assert await _is_missing(store, {"a": "fine"})  # the text is known from now on
    with pytest.raises(FilterError):
        await store.retrieve(order_by="a; drop table b")
    with pytest.raises(TypeError):
        await bad.retrieve(5)
    with pytest.raises(TypeError, match=r"order_by: .* not dict"):  # whose "desc" would be lost
        await bad.retrieve(order_by={"a": "desc"})


async def test_names_that_are_none(pool):
    store = TableStore(pool, "no_such_table")
    bad: Any = store
    for name in ('a"b', "a;b", "", "a" * 64, "é", 5):
        with pytest.raises(InvalidIdentifierError):
            await bad.persist({name: 1})
        with pytest.raises(InvalidIdentifierError):
            await bad.persist([{name: 1}, {name: 2}])
        with pytest.raises(InvalidIdentifierError):
            await bad.mutate({name: 1}, {"id": 1})
        with pytest.raises(InvalidIdentifierError):
            await bad.retrieve({name: 1})
        with pytest.raises(InvalidIdentifierError):
            await bad.retrieve(columns=[name])
        with pytest.raises(InvalidIdentifierError):
            await bad.persist({"a": 1}, returning=[name])
    with pytest.raises(InvalidIdentifierError):
        await bad.retrieve(columns=[["a"]])
    with pytest.raises(InvalidIdentifierError):
        await store.retrieve(columns=["a", "a"])
    for table in ("", "a b", "a.b", None):
        with pytest.raises(InvalidIdentifierError, match="table"):
            TableStore(pool, cast("str", table))
    with pytest.raises(InvalidIdentifierError, match="schema"):
        TableStore(pool, "t", schema="a-b")


async def _is_missing(store, where):
    with pytest.raises(LookupError):
        await store.retrieve(where)
    return True


async def test_more_filters_than_are_remembered(pool, sql):
    columns = [f"c{i}" for i in range(600)]
    sql(f"CREATE TABLE wide ({', '.join(f'{name} int' for name in columns)})")
    store = TableStore(pool, "wide")
    await store.persist(dict.fromkeys(columns, 1))
    for name in columns:
        assert len(await store.retrieve({name: 1}, columns=[name])) == 1


async def test_a_name_is_only_ever_a_name(pool, sql):
    sql('CREATE TABLE "Order" ("Select" int, "from" text)')
    store = TableStore(pool, "Order")
    await store.persist({"Select": 1, "from": "x"})
    await store.mutate({"from": '\'; DROP TABLE "Order"; --'}, {"Select": 1})
    assert await store.retrieve("Select = 1", order_by="from desc") == [
        {"Select": 1, "from": '\'; DROP TABLE "Order"; --'}
    ]
    assert repr(store) == '<TableStore "Order">'
    assert repr(TableStore(pool, "t", schema="S")) == '<TableStore "S"."t">'


# ---------------------------------------------------------------- kinds of tables


async def test_views_partitions_and_foreign_tables(pool, sql, pg_dsn, items):
    sql("INSERT INTO items (id, name) VALUES (1, 'a'), (2, 'b')")
    sql("CREATE VIEW names AS SELECT id, name FROM items")
    sql("CREATE MATERIALIZED VIEW counts AS SELECT count(*) AS n FROM items")
    sql("CREATE TABLE parts (id int) PARTITION BY RANGE (id)")
    sql("CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (10)")
    view = TableStore(pool, "names")
    assert await view.persist({"id": 3, "name": "c"}) == 1
    assert await view.mutate({"name": "z"}, {"id": 3}) == 1
    assert len(await view.retrieve()) == 3
    assert await TableStore(pool, "counts").retrieve() == [{"n": 2}]
    with pytest.raises(psycopg.errors.WrongObjectType) as caught:
        await TableStore(pool, "counts").purge({"n": 2})
    assert caught.value.sqlstate == "42809"
    sql("CREATE VIEW read_only AS SELECT count(*) AS n FROM items")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        await TableStore(pool, "read_only").mutate({"n": 1}, all_rows=True, where=None)
    parts = TableStore(pool, "parts")
    assert await parts.persist([{"id": 1}, {"id": 2}]) == 2
    with pytest.raises(psycopg.errors.CheckViolation):
        await parts.persist({"id": 99})
    assert await parts.purge("id > 0") == 2
    params = psycopg.conninfo.conninfo_to_dict(pg_dsn)
    sql("CREATE EXTENSION postgres_fdw")
    sql(
        f"CREATE SERVER here FOREIGN DATA WRAPPER postgres_fdw OPTIONS"
        f" (host '{params['host']}', port '{params['port']}', dbname '{params['dbname']}')"
    )
    sql(f"CREATE USER MAPPING FOR CURRENT_USER SERVER here OPTIONS (user '{params['user']}')")
    sql("CREATE FOREIGN TABLE far (id int, name text) SERVER here OPTIONS (table_name 'items')")
    far = TableStore(pool, "far")
    assert await far.persist({"id": 4, "name": "d"}) == 1
    assert await far.retrieve({"id": 4}) == [{"id": 4, "name": "d"}]


async def test_generated_and_identity_columns(pool, sql):
    sql(
        "CREATE TABLE made (id int GENERATED ALWAYS AS IDENTITY, a int,"
        " twice int GENERATED ALWAYS AS (a * 2) STORED)"
    )
    store = TableStore(pool, "made")
    assert await store.persist({"a": 4}, returning="*") == [{"id": 1, "a": 4, "twice": 8}]
    for data in ({"id": 5}, {"twice": 5}):
        for rows in (data, [data, data]):
            with pytest.raises(psycopg.errors.GeneratedAlways):
                await store.persist(rows)
        with pytest.raises(psycopg.errors.GeneratedAlways):
            await store.mutate(data, {"a": 4})
    assert await store.retrieve() == [{"id": 1, "a": 4, "twice": 8}]


# ---------------------------------------------------------------- connections


async def test_the_connection_is_the_one_given_or_pinned_or_any(pg_dsn, items, kit):
    async with open_pool(pg_dsn, max_size=2) as pool:
        store = TableStore(pool, "items")
        async with pool.acquire() as conn:
            with pytest.raises(PoolNestedAcquireError):
                await store.retrieve()
            async with conn.transaction(force_rollback=True):
                assert await store.persist({"id": 1}, connection=conn) == 1
                assert await store.mutate({"name": "x"}, {"id": 1}, connection=conn) == 1
                assert len(await store.retrieve(connection=conn)) == 1
                async with store.stream(connection=conn) as rows:
                    assert len([row async for row in rows]) == 1
                assert await store.purge({"id": 1}, connection=conn) == 1
                assert await store.persist([{"id": 1}, {"id": 2}], connection=conn) == 2
            assert items() == []
        async with pool.pin() as conn:
            async with conn.transaction(force_rollback=True):
                await store.persist({"id": 1})
                async with store.stream() as rows:
                    assert len([row async for row in rows]) == 1
                assert len(await store.retrieve()) == 1
            assert items() == []
        await store.persist({"id": 1})
        assert len(items()) == 1
        assert pool.statistics().opened == 1


async def test_an_error_in_a_transaction_of_the_callers_is_its_own(pool, items):
    store = TableStore(pool, "items")
    async with pool.acquire() as conn:
        async with conn.transaction():
            await store.persist({"id": 1}, connection=conn)
            with pytest.raises(psycopg.errors.UniqueViolation):
                async with conn.transaction():
                    await store.persist({"id": 1}, connection=conn)
            await store.persist({"id": 2}, connection=conn)
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            async with conn.transaction():
                with pytest.raises(psycopg.errors.UniqueViolation):
                    await store.persist({"id": 1}, connection=conn)
                await store.persist({"id": 3}, connection=conn)
    assert [row["id"] for row in items()] == [1, 2]


@pytest.mark.parametrize("settings", [None, {"app.x": "y"}])
async def test_without_autocommit(pg_dsn, items, settings):
    """An operation is a transaction of its own, unless one is open."""
    async with open_pool(pg_dsn, autocommit=False, max_size=1) as pool:
        store = TableStore(pool, "items", settings=settings)
        for _ in range(2):
            await store.purge(None, all_rows=True)
            assert await store.persist({"id": 1}) == 1
            assert await store.persist([{"id": 2}, {"id": 3}]) == 2
            assert await store.mutate({"name": "x"}, {"id": 3}) == 1
            assert len(await store.retrieve()) == 3
            async with store.stream() as rows:
                assert len([row async for row in rows]) == 3
            assert len(items()) == 3
        async with pool.acquire() as conn:
            await conn.execute("SELECT 1")
            await store.purge(None, all_rows=True, connection=conn)
            assert len(await store.retrieve(connection=conn)) == 0
            await conn.rollback()
        assert len(items()) == 3


async def test_rows_are_dictionaries_whatever_the_connection_makes_of_them(pg_dsn, items):
    for factory in (scalar_row, namedtuple_row, dict_row):
        async with open_pool(pg_dsn, row_factory=factory) as pool:
            store = TableStore(pool, "items", settings={"app.x": "y"})
            for _ in range(2):
                await store.purge(None, all_rows=True)
                await store.persist([{"id": 1}, {"id": 2}])
                expected: list[dict[str, Any]] = [{"id": 1}, {"id": 2}]
                assert await store.retrieve(columns=["id"], order_by="id") == expected
                async with store.stream(columns=["id"], order_by="id") as rows:
                    assert [row async for row in rows] == expected
            async with pool.acquire() as conn:
                async with store.stream(connection=conn):
                    assert conn.row_factory is factory
                async with conn.transaction():
                    assert len(await store.retrieve(connection=conn)) == 2


async def test_a_task_that_shares_the_connection_has_its_rows_as_ever(pool, items, kit):
    """Rows are made dictionaries for the stream alone, also while it waits to begin."""
    store = TableStore(pool, "items", schema="public")
    seen = []
    async with pool.acquire() as conn:

        async def ask():
            while True:
                with suppress(anyio.BusyResourceError):  # while it streams
                    cursor = await conn.execute("SELECT 1")
                    seen.append(await cursor.fetchone())
                await anyio.lowlevel.checkpoint()

        with anyio.fail_after(kit.soon):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ask)
                while len(seen) < 20:
                    await anyio.lowlevel.checkpoint()
                    async with store.stream(connection=conn) as rows:
                        assert [row async for row in rows] == []
                    await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
    assert set(seen) == {(1,)}


@pytest.mark.parametrize("settings", [None, {"app.x": "y"}])
async def test_in_a_pipeline_of_the_callers(pool, items, settings, kit):
    store = TableStore(pool, "items", schema="public", settings=settings)
    async with pool.acquire() as conn:
        async with conn.pipeline():
            await conn.execute("SELECT 1")
            assert await store.persist({"id": 1}, connection=conn) == 1
            assert await store.persist([{"id": 2}, {"id": 3}], connection=conn) == 2
            assert await store.mutate({"name": "x"}, "id > 1", connection=conn) == 2
            assert len(await store.retrieve(connection=conn)) == 3
        if settings:
            assert await kit.fetch(conn, "SELECT current_setting('app.x', true)") == ""
        with pytest.raises(psycopg.ProgrammingError, match="pipeline"):
            async with conn.pipeline(), store.stream(connection=conn):
                raise AssertionError("entered")
    assert len(items()) == 3


async def test_in_a_pipeline_and_a_transaction_of_the_callers(pool, items):
    async with pool.acquire() as conn, conn.pipeline(), conn.transaction():
        assert await TableStore(pool, "items").persist({"id": 1}, connection=conn) == 1
        assert await TableStore(pool, "items").mutate({"id": 2}, {"id": 1}, connection=conn) == 1
    assert [row["id"] for row in items()] == [2]


@pytest.mark.parametrize("settings", [None, {"app.x": "y"}])
async def test_client_side_binding_works_too(pg_dsn, items, settings):
    async with open_pool(pg_dsn) as pool, pool.pin() as conn:
        conn.cursor_factory = psycopg.AsyncClientCursor
        store = TableStore(pool, "items", settings=settings)
        await store.persist({"id": 1, "name": "it's 100%"})
        await store.persist([{"id": 2, "name": "%s"}, {"id": 3, "name": None}])
        assert await store.retrieve({"name": "it's 100%"}, columns=["id"]) == [{"id": 1}]
        assert len(await store.retrieve({"name": "%s"})) == 1
        async with store.stream({"name": "%s"}, columns=["id"]) as rows:
            assert [row async for row in rows] == [{"id": 2}]
        async with conn.transaction():
            assert await store.mutate({"name": "%"}, {"id": 3}) == 1


@pytest.mark.parametrize("settings", [None, {"app.x": "y"}])
async def test_cursors_with_other_placeholders_work_too(pg_dsn, items, settings):
    async with open_pool(pg_dsn) as pool, pool.pin() as conn:
        conn.cursor_factory = psycopg.AsyncRawCursor
        store = TableStore(pool, "items", settings=settings)
        for _ in range(2):
            assert await store.persist({"id": 1, "name": "$1 %s"}) == 1
            assert await store.persist([{"id": 2}, {"id": 3}]) == 2
            async with store.stream({"name": "$1 %s"}, columns=["id"]) as rows:
                assert conn.cursor_factory is psycopg.AsyncRawCursor
                assert [row async for row in rows] == [{"id": 1}]
            async with conn.transaction():
                assert await store.mutate({"name": "x"}, "id > 1") == 2
                await store.ping()
            assert await store.purge("id > 0") == 3


@pytest.mark.parametrize("settings", [None, {"app.x": "y"}])
async def test_a_transaction_is_as_the_connection_wants_them(dsn, sql, items, settings):
    """Isolated, or read only; each time, and not only where it is begun by a statement."""
    sql(
        "CREATE VIEW isolation AS SELECT current_setting('transaction_isolation') AS level,"
        " current_setting('transaction_deferrable') AS deferrable"
    )

    async def on_connect(conn):
        await conn.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE)
        await conn.set_deferrable(True)

    async with open_pool(dsn, max_size=1, on_connect=on_connect) as pool:
        store = TableStore(pool, "isolation", settings=settings)
        for _ in range(3):
            expected = [{"level": "serializable", "deferrable": "on"}]
            assert await store.retrieve() == expected
            async with store.stream() as rows:
                assert [row async for row in rows] == expected
        async with pool.acquire() as conn:
            await conn.set_read_only(True)
            store = TableStore(pool, "items", settings=settings)
            for _ in range(3):
                with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                    await store.persist({"id": 1}, connection=conn)
                assert await store.retrieve(connection=conn) == []
        # Where all is as usual a statement is its own transaction again.
        async with pool.acquire() as conn:
            await conn.set_isolation_level(None)
            await conn.set_deferrable(None)
            assert (
                await TableStore(pool, "items", settings=settings).retrieve(connection=conn) == []
            )


async def test_a_schema_with_any_name(pool, sql):
    """One that is found may have a name that is not to be given."""
    for schema in ("100%s", 'quo"te', "é-東"):
        sql(psycopg.sql.SQL("CREATE SCHEMA {}").format(psycopg.sql.Identifier(schema)))
        sql(psycopg.sql.SQL("CREATE TABLE {} (i int)").format(psycopg.sql.Identifier(schema, "o")))
        store = TableStore(pool, "o")
        assert await store.persist({"i": 1}) == 1
        assert await store.persist([{"i": 1}, {"i": 2}]) == 2
        assert len(await store.retrieve("i < 5")) == 3
        async with store.stream({"i": 2}) as rows:
            assert [row async for row in rows] == [{"i": 2}]
        sql(psycopg.sql.SQL("DROP SCHEMA {} CASCADE").format(psycopg.sql.Identifier(schema)))


# ---------------------------------------------------------------- cancellation, at the door


async def test_a_pending_cancellation_is_noticed(pool, items):
    store = TableStore(pool, "items", schema="public")

    async def stream():
        async with store.stream():
            raise AssertionError("entered")

    for use in (
        store.retrieve,
        store.ping,
        stream,
        lambda: store.persist({"id": 1}),
        lambda: store.persist([{"id": 1}, {"id": 2}]),
        lambda: store.persist([]),
        lambda: store.mutate({"name": "x"}, {"id": 1}),
        lambda: store.purge({"id": 1}),
    ):
        await assert_cancellable(use)
    assert items() == []
    assert await store.persist([]) == 0

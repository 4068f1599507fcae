"""Where the table is: found once, found again after DDL, and never by running something twice."""

from __future__ import annotations

from typing import Any

import anyio
import psycopg
import pytest

from pgstructured.driver import Connection
from pgstructured.errors import AmbiguousTableError, TableNotFoundError
from pgstructured.pool import open_pool
from pgstructured.store import TableStore


@pytest.fixture
def schemas(sql):
    """Three schemas, none of them on the search path."""
    sql("CREATE SCHEMA a; CREATE SCHEMA b; CREATE SCHEMA c")


@pytest.fixture
def round_trips(monkeypatch):
    """Counts what is waited for on connections."""
    seen = []
    original = Connection.wait

    async def wait(self, gen, *args, **kwargs):
        seen.append(gen.__name__)
        return await original(self, gen, *args, **kwargs)

    monkeypatch.setattr(Connection, "wait", wait)
    return seen


# ---------------------------------------------------------------- found


async def test_found_by_the_search_path(dsn, sql, schemas, pg_dsn, events):
    sql("CREATE TABLE a.t (x text); CREATE TABLE b.t (x text); CREATE TABLE public.t (x text)")
    async with open_pool(dsn) as pool:
        store = TableStore(pool, "t")
        await store.persist({"x": "here"})
        assert sql("SELECT * FROM public.t") == [{"x": "here"}]
        await TableStore(pool, "t", schema="b").persist({"x": "there"})
        assert sql("SELECT * FROM b.t") == [{"x": "there"}]
        assert events == [("store.resolved", {"table": "t", "schema": "public"})]
    async with open_pool(pg_dsn, options="-c search_path=c,b,a,public") as pool:
        assert await TableStore(pool, "t").retrieve() == [{"x": "there"}]


async def test_found_outside_of_the_search_path(dsn, sql, schemas):
    """As in axon: the only table of its name, wherever it is."""
    sql("CREATE TABLE a.t (x text); CREATE INDEX u ON a.t (x); CREATE TABLE b.u (x text)")
    async with open_pool(dsn) as pool:
        assert await TableStore(pool, "t").persist({"x": "1"}) == 1
        assert sql("SELECT * FROM a.t") == [{"x": "1"}]
        assert await TableStore(pool, "u").persist({"x": "1"}) == 1  # the other one is an index
        sql("CREATE SEQUENCE public.v; CREATE TABLE b.v (x text)")
        assert await TableStore(pool, "v").retrieve() == []


async def test_not_found_and_ambiguous(dsn, sql, schemas):
    sql("CREATE TABLE c.t (x text); CREATE TABLE a.t (x text); CREATE VIEW b.t AS SELECT 1 AS x")
    async with open_pool(dsn) as pool:
        store = TableStore(pool, "t")
        for _ in range(2):
            with pytest.raises(AmbiguousTableError, match=r'"t" is in .* a, b, c, .* schema=') as e:
                await store.retrieve()
            assert e.value.schemas == ("a", "b", "c")
        with pytest.raises(AmbiguousTableError):
            await store.ping()
        with pytest.raises(AmbiguousTableError):
            async with store.stream():
                raise AssertionError("entered")
        for name in ("T", "nothing", "columns"):  # the last one is information_schema's
            with pytest.raises(TableNotFoundError, match=f'"{name}".*case'):
                await TableStore(pool, name).persist([{"x": 1}, {"x": 2}])
        assert len(await TableStore(pool, "pg_class").retrieve({"relname": "t"})) == 3
        sql("DROP TABLE a.t; DROP VIEW b.t")
        assert await store.persist({"x": "now"}) == 1
        assert pool.statistics().closed_broken == 0
        async with pool.transaction() as conn:
            with pytest.raises(TableNotFoundError):
                await TableStore(pool, "nothing").retrieve(connection=conn)
            assert len(await store.retrieve(connection=conn)) == 1  # the transaction goes on


async def test_temporary_tables_are_somebodys_own(pg_dsn, sql):
    sql("CREATE TABLE t (x text)")
    async with open_pool(pg_dsn) as pool, pool.pin() as conn:
        await conn.execute("CREATE TEMP TABLE t (x text); CREATE TEMP TABLE single (x text)")
        assert await TableStore(pool, "t").persist({"x": "for all"}) == 1
        assert await TableStore(pool, "t", schema="pg_temp").persist({"x": "mine"}) == 1
        assert await TableStore(pool, "t", schema="pg_temp").retrieve() == [{"x": "mine"}]
        with pytest.raises(TableNotFoundError):
            await TableStore(pool, "single").retrieve()
    assert sql("SELECT * FROM t") == [{"x": "for all"}]


async def test_one_that_is_told_is_not_looked_for(pg_dsn, sql, schemas, events):
    sql("CREATE TABLE b.t (x text); CREATE INDEX i ON b.t (x)")
    async with open_pool(pg_dsn) as pool:
        await TableStore(pool, "t", schema="b").ping()
        with pytest.raises(TableNotFoundError, match=r'"b"\."i"'):
            await TableStore(pool, "i", schema="b").ping()
        store = TableStore(pool, "t", schema="a")
        with pytest.raises(psycopg.errors.UndefinedTable):
            await store.retrieve()
        with pytest.raises(TableNotFoundError, match=r'"a"\."t"'):
            await store.ping()
        assert events == []


async def test_it_costs_no_round_trip_after_the_first_operation(pg_dsn, items, round_trips):
    async with open_pool(pg_dsn) as pool:
        store = TableStore(pool, "items")
        await store.persist({"id": 1})
        assert len(round_trips) > 2
        for use in (
            lambda: store.persist({"id": 2}),
            lambda: store.retrieve("id > 0"),
            lambda: store.mutate({"name": "x"}, {"id": 1}),
            lambda: store.purge({"id": 1}),
        ):
            round_trips.clear()
            await use()
            assert len(round_trips) == 1


async def test_the_first_operation_is_one_transaction(pg_dsn, sql):
    """Of which nothing is left if it fails; and a transaction pooler keeps its session."""
    sql("CREATE TABLE t (i int PRIMARY KEY)")
    async with open_pool(pg_dsn) as pool:
        seen = []
        store = TableStore(pool, "t")
        async with pool.acquire() as conn:

            class Cursor(psycopg.AsyncCursor[Any]):
                def __init__(self, *args, **kwargs):
                    seen.append(conn.info.transaction_status.name)
                    super().__init__(*args, **kwargs)

            conn.cursor_factory = Cursor
            await store.persist({"i": 1}, connection=conn)
            assert seen == ["INTRANS", "INTRANS"]
            seen.clear()
            await store.persist({"i": 2}, connection=conn)
            assert seen == ["IDLE"]
        with pytest.raises(psycopg.errors.UniqueViolation):
            await TableStore(pool, "t").persist([{"i": i} for i in (3, 4, 1)])
        assert len(sql("SELECT * FROM t")) == 2


async def test_many_first_operations_at_once(dsn, sql, schemas):
    sql("CREATE TABLE a.t (x int)")
    async with open_pool(dsn) as pool:
        store = TableStore(pool, "t")
        async with anyio.create_task_group() as tasks:
            for number in range(100):
                tasks.start_soon(store.persist, {"x": number})
        assert len(await store.retrieve()) == 100


# ---------------------------------------------------------------- found again


async def test_found_again_after_it_has_moved(dsn, sql, schemas, events):
    sql("CREATE TABLE a.t (x int)")
    homes = ["a", "b"]

    def move():
        sql(f"ALTER TABLE {homes[0]}.t SET SCHEMA {homes[1]}")
        homes.reverse()
        events.clear()

    async with open_pool(dsn) as pool:
        store = TableStore(pool, "t")

        async def stream():
            async with store.stream() as rows:
                return [row async for row in rows]

        assert await store.persist({"x": 1}) == 1
        for use, expected in (
            (store.retrieve, [{"x": 1}]),
            (stream, [{"x": 1}]),
            (lambda: store.persist({"x": 2}), 1),
            (lambda: store.persist([{"x": 3}, {"x": 4}]), 2),
            (lambda: store.persist([{"x": 5}, {"x": 6}], returning=["x"]), [{"x": 5}, {"x": 6}]),
            (lambda: store.mutate({"x": 0}, "x > 1"), 5),
            (lambda: store.purge({"x": 0}), 5),
        ):
            move()
            assert await use() == expected
            (resolved, (name, facts)) = events
            assert resolved == ("store.resolved", {"table": "t", "schema": homes[0]})
            assert name == "store.retried"
            assert facts["table"] == "t"
            assert facts["error"].sqlstate == "42P01"
        assert await store.retrieve() == [{"x": 1}]
        sql(f"ALTER TABLE {homes[0]}.t RENAME TO gone")
        with pytest.raises(TableNotFoundError) as caught:
            await stream()
        assert isinstance(caught.value.__context__, psycopg.errors.UndefinedTable)
        with pytest.raises(TableNotFoundError):
            await store.retrieve()
        assert pool.statistics().closed_broken == 0


async def test_found_again_by_many_at_once(dsn, sql, schemas):
    sql("CREATE TABLE a.t (x int)")
    async with open_pool(dsn, min_size=5, max_size=5) as pool:
        await pool.wait_ready()
        store = TableStore(pool, "t")
        await store.persist({"x": 0})
        for home, other in (("a", "b"), ("b", "c"), ("c", "a")):
            sql(f"ALTER TABLE {home}.t SET SCHEMA {other}")
            async with anyio.create_task_group() as tasks:
                for _ in range(20):
                    tasks.start_soon(store.persist, {"x": 1})
        assert len(await store.retrieve()) == 61


async def test_another_that_has_the_column(dsn, sql, schemas, events):
    sql("CREATE TABLE a.t (x int)")
    async with open_pool(dsn) as pool:
        store = TableStore(pool, "t")
        await store.persist({"x": 1})
        sql("CREATE TABLE public.t (x int, y int)")
        events.clear()
        assert await store.persist({"x": 1, "y": 2}) == 1
        assert [name for name, _ in events] == ["store.resolved", "store.retried"]
        assert sql("SELECT * FROM public.t") == [{"x": 1, "y": 2}]


async def test_where_nothing_has_changed_the_error_stands(dsn, items, events):
    async with open_pool(dsn) as pool:
        store = TableStore(pool, "items")
        await store.retrieve()
        for use in (
            lambda: store.retrieve({"colour": 1}),
            lambda: store.persist({"colour": 1}),
            lambda: store.persist([{"colour": 1}, {"colour": 2}]),
            lambda: store.mutate({"name": 1}, "colour = 'x'"),
        ):
            with pytest.raises(psycopg.errors.UndefinedColumn, match="colour"):
                await use()
        for one in (store, TableStore(pool, "items")):
            with pytest.raises(psycopg.errors.UndefinedColumn):
                async with one.stream({"colour": 1}):
                    raise AssertionError("entered")
        assert {name for name, _ in events} == {"store.resolved"}
        assert await store.persist({"id": 1}) == 1


async def test_not_in_a_transaction_of_the_callers(dsn, sql, schemas, events):
    """There the statements before it would be lost. But the next one finds it."""
    sql("CREATE TABLE a.t (x int)")
    async with open_pool(dsn) as pool:
        store = TableStore(pool, "t")
        for settings in (None, {"app.x": "y"}):
            store = TableStore(pool, "t", settings=settings)
            await store.persist({"x": 1})
            sql("ALTER TABLE a.t SET SCHEMA b")
            events.clear()
            with pytest.raises(psycopg.errors.UndefinedTable):
                async with pool.transaction() as conn:
                    await store.persist({"x": 2}, connection=conn)
            assert events == []
            async with pool.transaction() as conn:
                await store.persist({"x": 3}, connection=conn)
            assert [name for name, _ in events] == ["store.resolved"]
            with pytest.raises(psycopg.errors.UndefinedTable):
                sql("ALTER TABLE b.t SET SCHEMA a")
                async with pool.transaction() as conn, store.stream(connection=conn):
                    raise AssertionError("entered")
        assert len(await store.retrieve()) == 4


@pytest.mark.parametrize("what", ["raised", "queried", "default", "called"])
async def test_what_fails_while_it_runs_is_not_run_again(pg_dsn, sql, what, events):
    """Its SQLSTATE is one that DDL causes; but a sequence has gone on, once and not twice."""
    sql("CREATE TABLE t (x int, y text); CREATE SEQUENCE effects")
    body = {
        "raised": "RAISE undefined_table USING MESSAGE = 'as if';",
        "queried": "PERFORM * FROM no_such_table;",
        "default": "PERFORM 1; RETURN NEW;",
        "called": "PERFORM no_such_function();",
    }[what]
    sql(
        "CREATE FUNCTION act() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" PERFORM nextval('effects'); {body} RETURN NEW; END $$"
    )
    sql("CREATE TRIGGER act BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION act()")
    if what == "default":
        # Here it is C that says so, without a context.
        sql("ALTER TABLE t ADD CHECK (nextval('effects') > 0 AND y::regclass IS NOT NULL)")
    async with open_pool(pg_dsn) as pool:
        store = TableStore(pool, "t")
        await store.retrieve()
        expected = "42883" if what == "called" else "42P01"
        for data in ({"x": 1, "y": "nope"}, [{"x": 1, "y": "nope"}, {"x": 2, "y": "nope"}]):
            for _ in range(2):
                before = sql("SELECT last_value FROM effects")[0]["last_value"]
                with pytest.raises(psycopg.errors.ProgrammingError) as caught:
                    await store.persist(data)
                assert caught.value.sqlstate == expected
                after = sql("SELECT last_value FROM effects")[0]["last_value"]
                assert after - before <= (2 if what == "default" else 1)
        assert [name for name, _ in events] == ["store.resolved"]
        assert sql("SELECT * FROM t") == []


# ---------------------------------------------------------------- plans that are outdated


async def test_a_plan_that_is_outdated(pg_dsn, items, sql, events):
    """ALTER TABLE changes what a prepared ``SELECT *`` gives."""
    async with open_pool(pg_dsn, max_size=1) as pool:
        for store in (TableStore(pool, "items"), TableStore(pool, "items", schema="public")):
            await store.purge(None, all_rows=True)
            await store.persist({"id": 1})
            for number in range(3):
                for _ in range(8):
                    (row,) = await store.retrieve({"id": 1})
                sql(f"ALTER TABLE items ADD column_{number} int DEFAULT 5")
                events.clear()
                (row,) = await store.retrieve({"id": 1})
                assert row[f"column_{number}"] == 5
                ((name, facts),) = events
                assert name == "store.retried"
                assert facts["error"].sqlstate == "0A000"
            sql("ALTER TABLE items DROP column_0, DROP column_1, DROP column_2")
        assert pool.statistics().opened == 1


async def test_a_plan_that_is_outdated_in_a_transaction(pg_dsn, items, sql, events):
    async with open_pool(pg_dsn, max_size=1) as pool:
        store = TableStore(pool, "items")
        for _ in range(8):
            await store.retrieve()
        sql("ALTER TABLE items ADD more int")
        with pytest.raises(psycopg.errors.FeatureNotSupported):
            async with pool.transaction() as conn:
                await store.retrieve(connection=conn)
        assert [name for name, _ in events] == ["store.resolved"]
        assert await store.retrieve() == []


async def test_a_plan_that_is_gone(pg_dsn, items, events):
    async with open_pool(pg_dsn, max_size=1) as pool:
        store = TableStore(pool, "items", settings={"app.x": "y"})
        plain = TableStore(pool, "items")
        for one in (store, plain):
            for _ in range(8):
                await one.retrieve()
            async with pool.acquire() as conn:
                forget = "DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$"
                await conn.execute(forget)
                events.clear()
                await one.persist({"id": 1}, on_conflict="ignore", connection=conn)
                assert len(await one.retrieve(connection=conn)) == 1
                assert [facts["error"].sqlstate for _, facts in events] == ["26000"]


async def test_a_stream_of_a_plan_that_is_outdated(pg_dsn, items, sql, events):
    async with open_pool(pg_dsn, max_size=1) as pool:
        store = TableStore(pool, "items", schema="public")

        async def stream():
            async with store.stream() as rows:
                return [row async for row in rows]

        await store.persist({"id": 1})
        for _ in range(8):
            await stream()
        sql("ALTER TABLE items ADD more int DEFAULT 7")
        assert (await stream())[0]["more"] == 7


async def test_features_that_are_not_supported_are_not_plans(pg_dsn, sql, events):
    """The SQLSTATE is used for other things, too."""
    sql(
        "CREATE TABLE t (x int); CREATE SEQUENCE effects;"
        " CREATE FUNCTION act() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM"
        " nextval('effects'); RAISE feature_not_supported USING MESSAGE ="
        " 'cached plan must not change result type'; END $$;"
        " CREATE TRIGGER act BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION act()"
    )
    async with open_pool(pg_dsn) as pool:
        store = TableStore(pool, "t")
        await store.retrieve()
        for number in (1, 2):
            with pytest.raises(psycopg.errors.FeatureNotSupported):
                await store.persist({"x": 1})
            assert sql("SELECT last_value FROM effects") == [{"last_value": number}]
        assert [name for name, _ in events] == ["store.resolved"]

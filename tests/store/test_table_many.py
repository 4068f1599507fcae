"""Many rows at once: all or none, in order, and by few statements."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import psycopg
import pytest

from pgstructured.driver import Connection
from pgstructured.pool import open_pool
from pgstructured.store import TableStore


@pytest.mark.parametrize("count", [1, 2, 15_999, 16_000, 16_001, 40_000])
async def test_so_many_rows(dsn, sql, count):
    sql("CREATE TABLE t (i int)")
    async with open_pool(dsn) as pool:
        store = TableStore(pool, "t")
        assert await store.persist({"i": i} for i in range(count)) == count
        assert sql("SELECT count(*), sum(i) FROM t") == [
            {"count": count, "sum": count * (count - 1) // 2}
        ]


async def test_rows_are_returned_in_order(dsn, sql):
    sql("CREATE TABLE t (i int PRIMARY KEY, n text, made int GENERATED ALWAYS AS IDENTITY)")
    async with open_pool(dsn) as pool:
        store = TableStore(pool, "t")
        numbers = [(7919 * i) % 10_007 for i in range(10_000)]
        rows: list[dict[str, Any]] = [{"i": i, "n": f"n{i}"} for i in numbers]
        stored = await store.persist(rows, returning=["i", "made"])
        assert stored == [{"i": i, "made": made} for made, i in enumerate(numbers, 1)]
        again = await store.persist(
            [{"i": i, "n": "again"} for i in (0, 20_000, 1, 20_001)],
            returning=["i"],
            on_conflict="ignore",
        )
        assert again == [{"i": 20_000}, {"i": 20_001}]
        assert await store.persist(rows, on_conflict="ignore") == 0


@pytest.mark.parametrize("settings", [None, {"app.x": "y"}])
async def test_all_or_none(dsn, items, settings):
    """Also where the last one of ten thousand is refused, and in a transaction that goes on."""
    rows = [{"id": i, "name": "x"} for i in range(9_999)]
    rows.append({"id": 0, "name": "once more"})
    async with open_pool(dsn) as pool:
        store = TableStore(pool, "items", settings=settings)
        for _ in range(2):
            with pytest.raises(psycopg.errors.UniqueViolation):
                await store.persist(rows)
            assert items() == []
        async with pool.transaction() as conn:
            with pytest.raises(psycopg.errors.UniqueViolation):
                await store.persist(rows, connection=conn)
            assert await store.persist(rows, on_conflict="ignore", connection=conn) == 9_999
        assert len(items()) == 9_999
        with pytest.raises(ValueError, match="row 10001 lacks 'name'"):
            await store.persist([*rows, {"id": -1}])


async def test_values_of_different_types_in_one_column(dsn, sql):
    """Each is converted as it would be alone."""
    sql("CREATE TABLE t (n numeric, t text, j jsonb, a int[])")
    rows: list[dict[str, Any]] = [
        {"n": 1, "t": "x", "j": {"a": 1}, "a": [1]},
        {"t": None, "n": 2**70, "a": [], "j": None},
        {"n": Decimal("1.5"), "t": "%s $1", "j": {}, "a": [None, 2]},
        {"n": 1.25, "t": "", "j": {"b": [1]}, "a": None},
    ]
    async with open_pool(dsn) as pool:
        store = TableStore(pool, "t")
        await store.persist(rows)
        assert sql("SELECT * FROM t") == rows


async def test_wide_rows(dsn, sql):
    columns = [f"c{i}" for i in range(1500)]
    sql(f"CREATE TABLE wide ({', '.join(f'{name} smallint' for name in columns)})")
    async with open_pool(dsn) as pool:
        store = TableStore(pool, "wide")
        assert await store.persist([dict.fromkeys(columns, i) for i in range(20)]) == 20
        told = sql("SELECT sum(c0) AS a, sum(c1499) AS b FROM wide")
        assert told == [{"a": 190, "b": 190}]


async def test_few_statements(pg_dsn, items, monkeypatch):
    """Ten thousand rows are not ten thousand round trips."""
    waits = []
    original = Connection.wait

    async def wait(self, gen, *args, **kwargs):
        waits.append(gen)
        return await original(self, gen, *args, **kwargs)

    monkeypatch.setattr(Connection, "wait", wait)
    async with open_pool(pg_dsn) as pool:
        store = TableStore(pool, "items", schema="public")
        await store.ping()
        waits.clear()
        await store.persist([{"id": i, "name": "x"} for i in range(10_000)])
        assert len(waits) < 10

"""What type checkers make of table stores; checked by mypy and pyright, never run."""

from __future__ import annotations

from typing import Any, assert_type

from anyio.abc import ObjectReceiveStream

from pgstructured import Pool, TableStore, connect
from pgstructured.store import to_jsonable


async def operations(pool: Pool) -> None:
    store = TableStore(pool, "t", schema="s", settings={"app.tenant": "t42"})
    connection = await connect()
    rows = await store.retrieve({"a": 1}, columns=["a"], order_by="a desc", limit=1)
    assert_type(rows, list[dict[str, Any]])
    assert_type(await store.retrieve("a = ${a}", bindings={"a": 1}), list[dict[str, Any]])
    async with store.stream(batch_size=10, connection=connection) as stream:
        assert_type(stream, ObjectReceiveStream[dict[str, Any]])
        async for row in stream:
            assert_type(row, dict[str, Any])
    assert_type(await store.persist({"a": 1}), int)
    assert_type(await store.persist([{"a": 1}, {"a": None}], on_conflict="ignore"), int)
    assert_type(await store.persist({"a": i} for i in range(5)), int)
    stored = await store.persist({"a": 1, "b": "x"}, returning=["a"], connection=connection)
    assert_type(stored, list[dict[str, Any]])
    assert_type(await store.persist([{"a": 1}], returning="*"), list[dict[str, Any]])
    assert_type(await store.mutate({"a": 1}, None, all_rows=True), int)
    assert_type(await store.purge({"a": [1, 2]}), int)
    item: dict[str, object] = {}
    assert_type(to_jsonable(item), dict[str, Any])

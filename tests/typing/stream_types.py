"""What type checkers make of streams and COPY; checked by mypy and pyright, never run."""

from __future__ import annotations

from typing import Any, assert_type

from psycopg import Column
from psycopg.rows import DictRow, TupleRow, dict_row

from pgstructured import connect
from pgstructured.driver import CopyIn, CopyOut, RowStream


async def streams() -> None:
    connection = await connect()
    async with connection.stream("select %s", [1], batch_size=10) as rows:
        assert_type(rows, RowStream[TupleRow])
        assert_type(rows.columns, tuple[Column, ...])
        assert_type(await rows.receive(), TupleRow)
        assert_type(await rows.receive_many(), list[TupleRow])
        async for row in rows:
            assert_type(row, TupleRow)
    by_name = await connect(row_factory=dict_row)
    async with by_name.stream("select 1") as dicts:
        assert_type(await dicts.receive(), DictRow)
    assert_type(await connection.execute_no_rows("delete from t"), int)


async def copies() -> None:
    connection = await connect()
    async with connection.copy_in("copy t from stdin") as sink:
        assert_type(sink, CopyIn)
        await sink.send(b"1\n")
        await sink.send_row((1, "x"))
    assert_type(sink.row_count, int)
    assert_type(await connection.copy_in_rows("t", ["a"], [(1,), [2]]), int)
    assert_type(await connection.copy_in_rows(("s", "t"), ["a"], [(1,)]), int)
    async with connection.copy_out("copy t to stdout") as source:
        assert_type(source, CopyOut)
        assert_type(await source.receive(), bytes)
        async for row in source.rows():
            assert_type(row, tuple[Any, ...])

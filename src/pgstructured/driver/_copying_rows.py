# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
# A part of `CopyIn`, for rows that somebody else makes.
"""COPY FROM STDIN of an iterable of rows."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing, nullcontext
from typing import TYPE_CHECKING, Any, cast

from psycopg import sql
from psycopg._copy_base import format_row_text

from ._copying_in import PIECE, open_copy_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractAsyncContextManager

    from ._copying_in import CopyIn
    from ._operating import OperatingConnection


async def copy_in_rows(
    conn: OperatingConnection[Any],
    table: str | tuple[str, str],
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]] | AsyncIterable[Sequence[Any]],
) -> int:
    """Do what `Connection.copy_in_rows` says."""
    statement = _statement(table, columns)
    width = len(columns)
    async with _closing(rows), open_copy_in(conn, statement) as copy:
        if isinstance(rows, AsyncIterable):
            number = 0
            async for row in rows:
                number += 1
                _check_width(row, width, number)
                await copy.send_row(row)
        else:
            await _send_all(copy, rows, width)
    return copy.row_count


async def _send_all(copy: CopyIn, rows: Iterable[Sequence[Any]], width: int) -> None:
    """Send rows that needn't be waited for, with nothing in the way: it is for speed."""
    transformer = copy._cursor._tx
    buffer = copy._buffer
    for number, row in enumerate(rows, 1):
        if len(row) != width:
            _check_width(row, width, number)
        format_row_text(row, transformer, buffer)
        if len(buffer) >= PIECE:
            await copy._send(copy._take())
            buffer = copy._buffer


def _closing(rows: object) -> AbstractAsyncContextManager[Any]:
    """Return what closes ``rows`` if it is a generator, which nobody else may know."""
    if isinstance(rows, AsyncGenerator):
        return aclosing(cast("AsyncGenerator[Any]", rows))
    return nullcontext()


def _check_width(row: Sequence[Any], width: int, number: int) -> None:
    if len(row) != width:
        raise ValueError(f"row {number} has {len(row)} values, and there are {width} columns")


def _statement(table: str | tuple[str, str], columns: Sequence[str]) -> sql.Composed:
    path = (table,) if isinstance(table, str) else tuple(table)
    if len(path) not in {1, 2}:
        raise ValueError(f'table must be "table" or ("schema", "table"), not {table!r}')
    if isinstance(columns, str) or not columns:
        raise ValueError(f"columns must be the names of one or more columns, not {columns!r}")
    return sql.SQL("COPY {} ({}) FROM STDIN").format(
        sql.Identifier(*path), sql.SQL(", ").join(map(sql.Identifier, columns))
    )

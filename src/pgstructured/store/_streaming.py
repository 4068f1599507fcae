"""Rows of a `Connection.stream` as dictionaries, whatever the connection makes of rows."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from functools import partial
from types import coroutine
from typing import TYPE_CHECKING, Any, final

from psycopg import AsyncCursor
from psycopg.rows import DictRow, dict_row

from ._cursors import wants_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator
    from types import TracebackType

    from pgstructured.driver import Connection, RowStream


@final
class DictStream(AbstractAsyncContextManager["RowStream[DictRow]"]):
    """A stream whose rows are dictionaries.

    A stream's cursor is made with its connection's row factory and its kind of cursors, in the
    first step of its entering. So they are set for this step, in which no other task can run.

    Args:
        conn: The connection.
        opening: What its `stream` gave, not entered yet.
    """

    __slots__ = ("_conn", "_opening")

    def __init__(
        self, conn: Connection[Any], opening: AbstractAsyncContextManager[RowStream[Any]]
    ) -> None:
        self._conn = conn
        self._opening = opening

    async def __aenter__(self) -> RowStream[DictRow]:
        return await _enter(self._conn, self._opening.__aenter__())

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> bool | None:
        return await self._opening.__aexit__(exc_type, exc_val, exc_tb)  # noqa: ASYNC102 - shielded and bounded inside


@coroutine
def _enter(
    conn: Connection[Any], entering: Coroutine[Any, Any, RowStream[DictRow]]
) -> Generator[Any, Any, RowStream[DictRow]]:
    step: Callable[[Any], Any] = partial(_begin, conn, entering)
    argument: Any = None
    stream: RowStream[DictRow]
    while True:
        try:
            waits_for = step(argument)
        except StopIteration as stop:
            stream = stop.value
            return stream
        try:
            step, argument = entering.send, (yield waits_for)
        except BaseException as exc:  # noqa: ASYNC103, BLE001 - handed on, as `yield from` does
            step, argument = entering.throw, exc


def _begin(conn: Connection[Any], entering: Coroutine[Any, Any, Any], argument: None) -> Any:
    own = conn.row_factory, conn.cursor_factory
    conn.row_factory = dict_row
    if wants_numbers(conn.cursor_factory):
        conn.cursor_factory = AsyncCursor
    try:
        return entering.send(argument)
    finally:
        conn.row_factory, conn.cursor_factory = own

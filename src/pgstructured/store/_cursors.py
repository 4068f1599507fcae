"""Cursors for statements with ``%s``, whatever the connection's own are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from psycopg import AsyncCursor, AsyncRawCursor

if TYPE_CHECKING:
    from psycopg.rows import AsyncRowFactory

    from pgstructured.driver import Connection

Row = TypeVar("Row")


def cursor_of(conn: Connection[Any], row_factory: AsyncRowFactory[Row]) -> AsyncCursor[Row]:
    """Return a new cursor of a connection that takes ``%s``.

    The connection's own kind, unless that wants ``$1``. The usual one is made here, for
    `Connection.cursor` is several calls, and what it checks `execute` checks again.
    """
    factory = conn.cursor_factory
    if factory is AsyncCursor or wants_numbers(factory):
        return AsyncCursor(conn, row_factory=row_factory)
    return conn.cursor(row_factory=row_factory)


def wants_numbers(factory: type[AsyncCursor[Any]]) -> bool:
    """Tell whether the placeholders of a kind of cursor are ``$1`` …, not ``%s``."""
    return issubclass(factory, AsyncRawCursor)

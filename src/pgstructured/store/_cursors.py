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

    The connection's own kind, unless that wants ``$1``. The usual one is made here, for `cursor`
    is several calls, and what it checks `execute` checks again.
    """
    if takes_percent(conn.cursor_factory):
        return conn.cursor(row_factory=row_factory)
    return AsyncCursor(conn, row_factory=row_factory)


def takes_percent(factory: type[AsyncCursor[Any]]) -> bool:
    """Tell whether it is the user's own kind of cursor, and its placeholders are ``%s``."""
    return factory is not AsyncCursor and not issubclass(factory, AsyncRawCursor)

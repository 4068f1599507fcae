"""Publishing: notifications in the caller's transaction."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar, overload

import anyio
from psycopg import AsyncConnection, AsyncCursor
from psycopg.rows import tuple_row

from ._channels import Channel, check_payload
from ._publisher_statement import NOTIFY_FOR_CURSOR, Batch

if TYPE_CHECKING:
    from collections.abc import Iterable

T = TypeVar("T")

_NOTIFY = "SELECT pg_catalog.pg_notify(%s, %s)"


@overload
async def notify(conn: AsyncConnection[Any], channel: str, payload: str = "") -> None: ...
@overload
async def notify(conn: AsyncConnection[Any], channel: Channel[T], payload: T) -> None: ...
async def notify(
    conn: AsyncConnection[Any], channel: str | Channel[Any], payload: Any = ""
) -> None:
    """Send a notification in the connection's transaction.

    It is delivered when that commits, and not at all if it is rolled back. Every transaction
    that notifies takes one lock of the whole server to commit (manual: NOTIFY, Notes).

    Args:
        conn: Any psycopg connection.
        channel: A name and a text as payload, or a `Channel` and a value for it.
        payload: What to send with it, at most 7999 bytes.

    Raises:
        ChannelNameError: if the name is impossible.
        PayloadTooLargeError: if the payload is too long.
        ValueError: if the payload has a NUL in it, or is no valid text.
        TypeError: if ``conn`` is no psycopg connection, or the payload no text.
        psycopg.Error: what the server says.

    Cancellation:
        As a statement on ``conn``.
    """
    _check_connection(conn)
    name, text = prepare(channel, payload)
    async with AsyncCursor(conn, row_factory=tuple_row) as cursor:
        await cursor.execute(_NOTIFY, (name, text))


async def notify_many(
    conn: AsyncConnection[Any], items: Iterable[tuple[str | Channel[Any], Any]]
) -> int:
    """Send notifications in the connection's transaction, all in one statement.

    As `notify`, and many times faster than one by one. All names and payloads are checked
    before anything is sent.

    Args:
        conn: Any psycopg connection.
        items: Pairs as `notify` takes them; delivered in this order. The server delivers one of
            several that are equal in one transaction.

    Returns:
        How many were given.

    Raises:
        ChannelNameError: if a name is impossible.
        PayloadTooLargeError: if a payload is too long.
        ValueError: if a payload has a NUL in it, or is no valid text.
        TypeError: if ``conn`` is no psycopg connection, or an item no such pair.
        psycopg.Error: what the server says.

    Cancellation:
        As a statement on ``conn``; a checkpoint also where there are no items.
    """
    _check_connection(conn)
    pairs: list[tuple[str, str]] = []
    for item in items:
        try:
            channel, payload = item
        except (TypeError, ValueError):
            raise TypeError(
                f"items must be pairs of a channel and a payload, not {item!r:.100}"
            ) from None
        pairs.append(prepare(channel, payload))
    if not pairs:
        await anyio.lowlevel.checkpoint()
        return 0
    batch = Batch(*(list(column) for column in zip(*pairs, strict=True)))
    async with AsyncCursor(conn, row_factory=tuple_row) as cursor:
        await cursor.execute(NOTIFY_FOR_CURSOR, batch.arrays())
    return len(batch)


def prepare(channel: str | Channel[Any], payload: Any) -> tuple[str, str]:
    """Return the channel's name and the payload as they are sent, both checked.

    Raises:
        ChannelNameError: if the name is impossible.
        PayloadTooLargeError: if the payload is too long.
        ValueError: if the payload can't be sent at all: a NUL, or half a surrogate pair.
    """
    if isinstance(channel, Channel):
        return channel.name, check_payload(channel.name, channel.payload_of(payload))
    given: Any = channel  # whatever it is
    target: Channel[Any] = _find(given) if isinstance(given, str) else Channel(given)
    text: str = payload if isinstance(payload, str) else target.payload_of(payload)
    return target.name, check_payload(target.name, text)


def _check_connection(conn: object) -> None:
    if not isinstance(conn, AsyncConnection):
        raise TypeError(
            f"conn must be a Connection, or psycopg's AsyncConnection, not {type(conn).__name__}"
        )


@lru_cache(maxsize=1024)
def _find(name: str) -> Channel[Any]:
    """Return the channel of that name; a name is checked many times, and stays right."""
    return Channel(name)

"""Appending: events into the caller's transaction, and a word to those who follow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, final

import anyio
from psycopg import AsyncCursor
from psycopg.rows import tuple_row
from psycopg.types.json import Jsonb

from pgstructured.driver import Connection
from pgstructured.observe import emit

from . import _statements as sql

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import LiteralString

    from psycopg import AsyncConnection

    from pgstructured.notify import Publisher

    from ._cursors import EventId
    from ._names import Names


@final
class Appender:
    """Appends to one log.

    Args:
        names: The log's.
        publisher: Wakes the followers after the commit; else the transaction does it.
    """

    def __init__(self, names: Names, publisher: Publisher | None) -> None:
        self._names = names
        self._channel = names.channel
        self._publisher = publisher
        self._one = _ways(names, sql.APPEND)
        self._one_of_bytes = _ways(names, sql.APPEND_BYTES)
        self._many = _ways(names, sql.APPEND_MANY, sql.APPENDED)

    async def append(self, conn: AsyncConnection[Any], topic: str, payload: Any) -> EventId:
        """Append one event; see `EventLog.append`."""
        if _is_bytes(payload):
            values, ways = (topic, payload), self._one_of_bytes
        else:
            values, ways = (topic, Jsonb(payload)), self._one
        event_id: EventId = await self._run(conn, ways, values)
        return event_id

    async def append_many(
        self, conn: AsyncConnection[Any], items: Iterable[tuple[str, Any]]
    ) -> list[EventId]:
        """Append events in one statement; see `EventLog.append_many`."""
        topics: list[str] = []
        payloads: list[Jsonb | None] = []
        bodies: list[bytes | None] = []
        for topic, payload in items:
            topics.append(topic)
            is_bytes = _is_bytes(payload)
            payloads.append(None if is_bytes else Jsonb(payload))
            bodies.append(bytes(payload) if is_bytes else None)
        if not topics:
            await anyio.lowlevel.checkpoint()
            return []
        values = (topics, payloads, bodies)
        ids: list[EventId] = await self._run(conn, self._many, values)
        return ids

    async def _run(self, conn: AsyncConnection[Any], ways: _Ways, values: tuple[Any, ...]) -> Any:
        # psycopg's own connections don't tell when they have committed.
        publishing = conn if self._publisher and isinstance(conn, Connection) else None
        async with AsyncCursor(conn, row_factory=tuple_row) as cursor:
            if publishing is None:
                await cursor.execute(ways.notifying, (*values, self._channel))
            else:
                await cursor.execute(ways.silent, values)
            row = await cursor.fetchone()
        assert row is not None  # noqa: S101 - what was inserted is returned
        if publishing is not None:
            publishing.after_commit(self._wake)
        return row[0]

    def _wake(self) -> None:
        assert self._publisher is not None  # noqa: S101 - asked before
        try:
            self._publisher.publish_nowait(self._channel)
        except (anyio.WouldBlock, anyio.ClosedResourceError, anyio.BrokenResourceError) as exc:
            # The events are committed, and found without it: at the followers' next poll.
            emit("log.wake_lost", log=str(self._names), error=exc)


@final
class _Ways(NamedTuple):
    """A statement without a word to the followers, and with."""

    silent: LiteralString
    notifying: LiteralString


def _ways(names: Names, statement: LiteralString, source: LiteralString = "") -> _Ways:
    return _Ways(names.fill(statement + source), names.fill(statement + sql.NOTIFYING + source))


def _is_bytes(payload: object) -> bool:
    return isinstance(payload, (bytes, bytearray, memoryview))

"""Appending: events into the caller's transaction, and a word to those who follow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

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

MOST_BYTES: Final = 500_000_000
"""More can be stored, and makes the server fail whenever it is read: as text it has twice as many,
and a gigabyte is the most for that (``MaxAllocSize``). No reader would ever get past it."""


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
        self._told = 0
        """Which one of all that the publisher was ever given was the last wake-up."""

    async def append(self, conn: AsyncConnection[Any], topic: str, payload: Any) -> EventId:
        """Append one event; see `EventLog.append`."""
        _check_topic(topic)
        values: tuple[Any, ...]
        if _is_bytes(payload):
            values, ways = (topic, _take(payload)), self._one_of_bytes
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
            _check_topic(topic)
            topics.append(topic)
            is_bytes = _is_bytes(payload)
            payloads.append(None if is_bytes else Jsonb(payload))
            bodies.append(_take(payload) if is_bytes else None)
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
        publisher = self._publisher
        assert publisher is not None  # noqa: S101 - asked before
        told = publisher.statistics()
        sent = told.delivered + told.refused + told.in_flight
        if sent < self._told:
            return  # one is still in line: it goes out after this commit as well
        try:
            publisher.publish_nowait(self._channel)
        except (anyio.WouldBlock, anyio.ClosedResourceError, anyio.BrokenResourceError) as exc:
            # The events are committed, and found without it: at the followers' next poll.
            emit("log.wake_lost", log=str(self._names), error=exc)
        else:
            self._told = sent + told.pending + 1


@final
class _Ways(NamedTuple):
    """A statement without a word to the followers, and with."""

    silent: LiteralString
    notifying: LiteralString


def _ways(names: Names, statement: LiteralString, source: LiteralString = "") -> _Ways:
    return _Ways(names.fill(statement + source), names.fill(statement + sql.NOTIFYING + source))


def _is_bytes(payload: object) -> bool:
    return isinstance(payload, (bytes, bytearray, memoryview))


def _take(payload: bytes | bytearray | memoryview) -> bytes:
    """Return what is to be stored; raises where no reader could get it."""
    body = bytes(payload)
    if len(body) > MOST_BYTES:
        raise ValueError(f"a payload has {MOST_BYTES} bytes at most, not {len(body)}")
    return body


def _check_topic(topic: object) -> None:
    # The server would make text of the topics of many, whatever they are.
    if not isinstance(topic, str):
        raise TypeError(f"a topic must be a str, not {type(topic).__name__}")

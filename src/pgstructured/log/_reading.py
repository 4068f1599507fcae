"""Reading: what comes after a cursor, in one statement, so that rows and snapshot agree."""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

import psycopg
from psycopg import AsyncCursor
from psycopg.rows import tuple_row

from pgstructured._util import create
from pgstructured.errors import CursorExpiredError, NotPrimaryError

from . import _statements as sql
from ._cursors import NOTHING, Cursor, CursorParts, EventId, Reach, Snapshot, parts_of
from ._events import Origin, Page, make_events

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from typing import LiteralString

    from psycopg import AsyncConnection

    from ._names import Names

_id_of = itemgetter(0)
_FROZEN: Final = ("repeatable read", "serializable")


@final
class _Shape(NamedTuple):
    """What decides about the text of the statement."""

    anchored: bool
    seen: bool
    window: bool
    late: bool
    topics: bool


@final
class _Meta(NamedTuple):
    """What the log was at the instant of reading."""

    epoch: int
    trims: int
    reach: Reach
    is_frozen: bool


@final
class Reader:
    """Reads one log.

    Args:
        names: The log's.
    """

    def __init__(self, names: Names) -> None:
        self._names = names
        self._statements: dict[_Shape, LiteralString] = {}

    async def read(
        self,
        conn: AsyncConnection[Any],
        cursor: Cursor,
        *,
        topics: Sequence[str] | None,
        limit: int,
    ) -> Page:
        """Return what comes after ``cursor``; see `EventLog.read`."""
        while True:
            parts = parts_of(cursor)
            meta, rows = await self._fetch(conn, parts, topics=topics, limit=limit)
            if meta.is_frozen and any(
                reach is not None and not meta.reach.snapshot.covers(reach.snapshot)
                for reach in (parts.seen, parts.window)
            ):
                # The transaction sees less than the cursor has: what comes next is not for it.
                return Page(events=[], cursor=cursor)
            base = meta.trims if parts.epoch is None else parts.base
            window = parts.window or meta.reach
            origin = Origin(meta.epoch, base, parts.seen, window)
            events = make_events(rows, origin)
            if len(rows) == limit:
                return Page(events=events, cursor=events[-1].cursor)
            cursor = create(Cursor, CursorParts(meta.epoch, seen=window))
            if rows or parts.window is None:
                return Page(events=events, cursor=cursor)
            # This page was the last of its snapshot, and full; there may be more by now.

    async def now(self, conn: AsyncConnection[Any]) -> Cursor:
        """Return the cursor that has seen all there is; see `EventLog.now`."""
        meta, _ = await self._fetch(conn, CursorParts(None), topics=None, limit=0)
        return create(Cursor, CursorParts(meta.epoch, seen=meta.reach))

    async def _fetch(
        self,
        conn: AsyncConnection[Any],
        parts: CursorParts,
        *,
        topics: Sequence[str] | None,
        limit: int,
    ) -> tuple[_Meta, list[Any]]:
        statement, values = self.prepare(parts, topics=topics, limit=limit)
        async with AsyncCursor(conn, row_factory=tuple_row) as reading:
            await reading.execute(statement, values)
            rows = await reading.fetchall()
        # The first one, but SQL does not promise that.
        told = next((index for index, row in enumerate(rows) if row[0] is None), None)
        if told is None:
            raise CursorExpiredError(f"the state of event log {self._names} is gone; run create()")
        meta = self._interpret(rows.pop(told)[1], parts, conn)
        rows.sort(key=_id_of)
        del rows[limit:]
        return meta, rows

    def prepare(
        self, parts: CursorParts, *, topics: Sequence[str] | None, limit: int
    ) -> tuple[LiteralString, dict[str, Any]]:
        """Return the statement that reads from a cursor, and its values."""
        epoch, base, seen, window, after = parts
        known = seen or NOTHING
        late = after < known.last_id
        shape = _Shape(
            epoch is not None, seen is not None, window is not None, late, topics is not None
        )
        statement = self._statements.get(shape)
        if statement is None:
            statement = self._statements[shape] = self._names.fill(_compose(shape))
        values: dict[str, Any] = {
            "base": base,
            "after": after,
            "start": max(after, known.last_id),
            "limit": limit,
            "topics": topics,
            "seen": str(known.snapshot),
            "seen_id": known.last_id,
            "xmax": str(known.snapshot.xmax),
            "running": [str(xid) for xid in known.snapshot.running],
        }
        if window is not None:
            values["window"] = str(window.snapshot)
            values["window_id"] = window.last_id
        return statement, values

    def _interpret(self, text: str, parts: CursorParts, conn: AsyncConnection[Any]) -> _Meta:
        """Return what the first row says; raises where nothing must be read."""
        epoch, trims, in_recovery, isolation, now, own, last_id, elsewhere, torn, expired = (
            text.split("|")
        )
        if in_recovery == "1":
            raise NotPrimaryError(
                "an event log is read on the primary: a standby does not know which transactions"
                " are running"
            )
        if elsewhere == "1":
            raise CursorExpiredError(
                f"event log {self._names} has events of another server, or of this one before it"
                " was set back; run create() to adopt them"
            )
        if torn == "1":
            raise psycopg.errors.SerializationFailure(
                f"partitions of event log {self._names} were dropped after the transaction's"
                " snapshot was taken; begin the transaction anew"
            )
        snapshot = Snapshot.parse(now)
        reach = Reach(snapshot.without(int(own)) if own else snapshot, EventId(int(last_id)))
        # What is no transaction's has a snapshot of its own.
        is_frozen = isolation in _FROZEN and conn.info.transaction_status.name != "IDLE"
        meta = _Meta(int(epoch), int(trims), reach, is_frozen)
        if parts.epoch not in {None, meta.epoch}:
            raise CursorExpiredError(
                f"the cursor is of another event log than {self._names}, or from before it was"
                " created anew or restored"
            )
        if expired == "1":
            raise CursorExpiredError(
                f"event log {self._names} has been trimmed of events that the cursor has not seen"
            )
        furthest = parts.window or parts.seen
        if furthest is not None and furthest.last_id > reach.last_id and not meta.is_frozen:
            raise CursorExpiredError(
                f"the cursor has seen events that event log {self._names} does not have: the"
                " server was restored to an earlier state, or they were deleted by hand"
            )
        return meta


def check_topics(topics: Collection[str] | None) -> list[str] | None:
    """Return the topics to read; raises where they can't be meant."""
    if topics is None:
        return None
    if isinstance(topics, str):
        raise TypeError(f"topics must be a collection of topics, as ({topics!r},)")
    chosen: list[Any] = list(dict.fromkeys(topics))
    for topic in chosen:
        if not isinstance(topic, str):
            raise TypeError(f"a topic must be a str, not {type(topic).__name__}")
    if not chosen:
        raise ValueError("topics must be None for all of them, or at least one")
    return chosen


def check_limit(limit: int, name: str = "limit") -> int:
    """Return ``limit`` if that many events can be asked for."""
    given: Any = limit
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError(f"{name} must be a whole number above 0, not {given!r}")
    return limit


def _compose(shape: _Shape) -> LiteralString:
    """Return the statement: what is to be known, what is new, and what has come late."""
    # Which of those remembered a reader has not seen takes a look at each; whether there may be
    # any does not.
    expired: LiteralString = sql.EXPIRED if shape.seen else sql.TRIMMED_SINCE
    if not shape.anchored:
        expired = sql.NEVER
    elif shape.window:
        expired += sql.AND + sql.EXPIRED_PAGE
    elif not shape.seen:
        expired += sql.AND + sql.EXPIRED_BASE
    where: LiteralString = sql.IN_WINDOW if shape.window else sql.OTHERS
    where += sql.OF_TOPICS if shape.topics else ""
    statement = (
        sql.META.replace("{expired}", expired) + sql.UNION + sql.NEW.replace("{where}", where)
    )
    if shape.late:
        statement += sql.UNION + sql.LATE.replace("{where}", where)
    return statement

"""What reading gives: events, in pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, final

from pgstructured._util import create

from ._cursors import Cursor, CursorParts, EventId, Reach

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime


EventRow: TypeAlias = "tuple[EventId, str, Any, bytes | None, datetime]"
"""Id, topic, payload, body and time, as they are selected; the payload is in one of two."""


@final
class Origin(NamedTuple):
    """What the events of one page have in common: what their cursors are made of."""

    epoch: int
    base: int
    seen: Reach | None
    window: Reach

    def cursor_after(self, event_id: EventId) -> Cursor:
        """Return the cursor that resumes right after an event of the page."""
        parts = CursorParts(self.epoch, self.base, self.seen, self.window, event_id)
        return create(Cursor, parts)


@final
class Event:
    """One event of a log; an immutable value.

    Logs make them. A program makes its own only to test what it does with them.

    Args:
        id: Its id.
        topic: Its topic.
        payload: Its payload.
        appended_at: When it was appended.
        cursor: What its cursor is to be.
    """

    # The row as it came, and what all of the page have in common: a quarter of what it takes to
    # fill a dataclass.
    __slots__ = ("_origin", "_row")

    _origin: Origin | Cursor
    _row: EventRow

    def __init__(
        self,
        *,
        id: EventId,  # noqa: A002 - it is called so
        topic: str,
        payload: Any,
        appended_at: datetime,
        cursor: Cursor,
    ) -> None:
        self._origin = cursor
        # As it is selected, for it is to be equal to one that was read.
        is_bytes = isinstance(payload, bytes)
        self._row = (
            id,
            topic,
            None if is_bytes else payload,
            payload if is_bytes else None,
            appended_at,
        )

    @property
    def id(self) -> EventId:
        """Unique in the log, and the same each time the event is read.

        Not a position: a later one may be less.
        """
        return self._row[0]

    @property
    def topic(self) -> str:
        """What it is about, as `EventLog.append` was told."""
        return self._row[1]

    @property
    def payload(self) -> Any:
        """What was appended: any JSON value, or `bytes`."""
        row = self._row
        return row[2] if row[3] is None else row[3]

    @property
    def appended_at(self) -> datetime:
        """When it was appended, by the server's clock; its commit came later."""
        return self._row[4]

    @property
    def cursor(self) -> Cursor:
        """The cursor that resumes right after this event."""
        origin = self._origin
        return origin if isinstance(origin, Cursor) else origin.cursor_after(self.id)

    def __repr__(self) -> str:
        return (
            f"Event(id={self.id}, topic={self.topic!r}, payload={self.payload!r},"
            f" appended_at={self.appended_at!r}, cursor={self.cursor!r})"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Event):
            return NotImplemented
        return self._row == other._row

    def __hash__(self) -> int:
        return hash((self.id, self.topic, self.appended_at))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Some events, and where to go on."""

    events: list[Event]
    """In the order in which they were appended, as the server gave out their ids; none if the
    reader has caught up."""
    cursor: Cursor
    """Resumes after the last of them; also if there is none it is the one to go on with."""


_new: Callable[[Any], Event] = object.__new__


def make_events(rows: Iterable[EventRow], origin: Origin) -> list[Event]:
    """Return the events of a page's rows; the hot path."""
    events: list[Event] = []
    append = events.append
    for row in rows:
        event = _new(Event)
        event._row = row  # noqa: SLF001 - one room # pyright: ignore[reportPrivateUsage]
        event._origin = origin  # noqa: SLF001 - one room # pyright: ignore[reportPrivateUsage]
        append(event)
    return events

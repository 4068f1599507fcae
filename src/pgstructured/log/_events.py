"""What reading gives: events, in pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, final

from pgstructured._util import create

from ._cursors import Cursor, CursorParts, EventId, Reach

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime


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
@dataclass(frozen=True, slots=True, eq=False, init=False)
class Event:
    """One event of a log.

    Logs make them. A program makes its own only to test what it does with them.

    Args:
        id: Its id.
        topic: Its topic.
        payload: Its payload.
        appended_at: When it was appended.
        cursor: What its cursor is to be.
    """

    id: EventId
    """Unique in the log, and the same each time the event is read. Not a position: a later one
    may be less."""
    topic: str
    """What it is about, as `EventLog.append` was told."""
    payload: Any
    """What was appended: any JSON value, or `bytes`."""
    appended_at: datetime
    """When it was appended, by the server's clock; its commit came later."""
    _origin: Origin | Cursor

    def __init__(
        self,
        *,
        id: EventId,  # noqa: A002 - it is called so
        topic: str,
        payload: Any,
        appended_at: datetime,
        cursor: Cursor,
    ) -> None:
        _set_id(self, id)
        _set_topic(self, topic)
        _set_payload(self, payload)
        _set_appended_at(self, appended_at)
        _set_origin(self, cursor)

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
        return self._facts == other._facts

    def __hash__(self) -> int:
        return hash((self.id, self.topic, self.appended_at))

    @property
    def _facts(self) -> tuple[EventId, str, Any, datetime]:
        return self.id, self.topic, self.payload, self.appended_at


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
# The hot path: setting the slots costs half of what a frozen dataclass's own way does.
_set_id, _set_topic, _set_payload, _set_appended_at, _set_origin = (
    vars(Event)[name].__set__ for name in ("id", "topic", "payload", "appended_at", "_origin")
)


def make_events(rows: Iterable[tuple[Any, ...]], origin: Origin) -> list[Event]:
    """Return the events of rows of id, topic, payload, body and time."""
    events: list[Event] = []
    append = events.append
    for event_id, topic, payload, body, appended_at in rows:
        event = _new(Event)
        _set_id(event, event_id)
        _set_topic(event, topic)
        _set_payload(event, payload if body is None else body)
        _set_appended_at(event, appended_at)
        _set_origin(event, origin)
        append(event)
    return events

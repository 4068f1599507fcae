"""Watching what the library does: events, instruments and stdlib logging."""

from pgstructured._util import publish

from ._events import (
    EVENTS as EVENTS,
    Event as Event,
    EventKind as EventKind,
    Instrument as Instrument,
    emit as emit,
    instrumented as instrumented,
)

__all__ = ("EVENTS", "Event", "EventKind", "Instrument", "emit", "instrumented")

publish(__name__, globals())

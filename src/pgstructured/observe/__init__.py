"""Watching what the library does: events, instruments, stdlib logging and OpenTelemetry."""

from typing import TYPE_CHECKING

from pgstructured._util import lazy_door as _lazy_door, publish

from ._events import (
    EVENTS as EVENTS,
    Event as Event,
    EventKind as EventKind,
    Instrument as Instrument,
    emit as emit,
    instrumented as instrumented,
)

if TYPE_CHECKING:
    from ._opentelemetry import OpenTelemetryInstrument as OpenTelemetryInstrument

__all__ = (
    "EVENTS",
    "Event",
    "EventKind",
    "Instrument",
    "OpenTelemetryInstrument",
    "emit",
    "instrumented",
)

publish(__name__, globals())

if not TYPE_CHECKING:  # every room emits events, and few programs want these of them
    __getattr__, __dir__ = _lazy_door(
        __name__,
        {
            "_events": tuple(name for name in __all__ if name != "OpenTelemetryInstrument"),
            "_opentelemetry": ("OpenTelemetryInstrument",),
        },
    )

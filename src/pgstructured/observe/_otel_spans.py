"""What is traced: events that carry a duration are the ends of spans.

What a task has done itself, or waited for, is a child of the span it is in. What the library
finds out in the background (an outage is over, a lock is lost) belongs to no one task, and is
a trace of its own.
"""

from __future__ import annotations

from time import time_ns
from typing import TYPE_CHECKING, Final, NamedTuple, final

from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanKind, StatusCode, get_current_span

from ._events import EVENTS
from ._otel_attributes import ERROR, SYSTEM, attributes_of, names_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.trace import Tracer

    from ._otel_attributes import Facts

_NANOSECONDS: Final = 1_000_000_000


@final
class Shape(NamedTuple):
    """What a span is like."""

    name: str
    duration: str
    """The fact that is its length."""
    kind: SpanKind = SpanKind.INTERNAL
    is_own: bool = True
    """Whether the task in which the event happens has been through it."""
    failure: str | None = None
    """What has gone wrong, where the event carries no error."""
    shortest: float = 0.0
    """Seconds; no span is made of less."""


_ACQUIRE: Final = Shape("lock.acquire", "waited")

SPANS: Final[Mapping[str, Shape]] = {
    "driver.connected": Shape("connect", "took", SpanKind.CLIENT),
    "driver.cancel_settled": Shape("cancel", "took", SpanKind.CLIENT),
    # Most need not wait, and a span for each query is made by whoever traces queries.
    "pool.acquired": Shape("pool.acquire", "waited", shortest=0.001),
    "pool.recovered": Shape("pool.outage", "outage", is_own=False),
    "lock.acquired": _ACQUIRE,
    "lock.acquire_refused": _ACQUIRE,
    "lock.acquire_failed": _ACQUIRE,
    "lock.acquire_timed_out": _ACQUIRE._replace(failure="pgstructured.errors.LockTimeout"),
    "lock.released": Shape("lock.hold", "held_for"),
    "lock.lost": Shape(
        "lock.hold", "held_for", is_own=False, failure="pgstructured.errors.LockLost"
    ),
    "bus.reconnected": Shape("bus.outage", "outage", is_own=False),
    "publisher.sent": Shape("publisher.batch", "took", SpanKind.CLIENT, is_own=False),
}
"""The spans that events are the ends of, by the event's name."""

NOTES: Final = frozenset(
    {
        "driver.connect_failed",
        "pool.connect_failed",
        "pool.acquire_timed_out",
        "pool.hook_failed",
        "lock.contended",
        "lock.refreshed",
        "lock.release_failed",
        "log.read_failed",
        "log.wake_lost",
        "store.retried",
    }
)
"""Events of a task that are noted in the span it is in."""


@final
class Tracing:
    """Makes spans of events.

    Args:
        tracer: Makes the spans.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._names = {name: names_of(name, _told(name)) for name in (*SPANS, *NOTES)}

    def trace(self, event_name: str, facts: Facts) -> None:
        """Make the span that an event ends, or note it in the one it happens in."""
        shape = SPANS.get(event_name)
        if shape is not None:
            self._trace(event_name, facts, shape)
        elif event_name in NOTES:
            span = get_current_span()
            if span.is_recording():
                span.add_event(event_name, attributes_of(facts, self._names[event_name], {}))

    def _trace(self, event_name: str, facts: Facts, shape: Shape) -> None:
        seconds: float = facts[shape.duration]
        if seconds < shape.shortest:
            return
        ended = time_ns()
        attributes = attributes_of(facts, self._names[event_name], SYSTEM)
        if shape.failure is not None:
            attributes[ERROR] = shape.failure
        span = self._tracer.start_span(
            shape.name,
            context=_context(is_own=shape.is_own),
            kind=shape.kind,
            attributes=attributes,
            start_time=ended - int(seconds * _NANOSECONDS),
        )
        if ERROR in attributes:
            span.set_status(StatusCode.ERROR, str(facts.get("error") or attributes[ERROR]))
        span.end(ended)


def _told(name: str) -> list[str]:
    """Return the facts of an event that become attributes: all but the length of the span."""
    shape = SPANS.get(name)
    duration = None if shape is None else shape.duration
    return [fact for fact in (*EVENTS[name].facts, "outcome") if fact != duration]


def _context(*, is_own: bool) -> Context | None:
    """Return where a span belongs: None for the current context, or one without a parent.

    Tasks in the background go on in the context that they were started in, long after its
    span may have ended; they have none.
    """
    if is_own:
        span = get_current_span()
        if span.is_recording() or isinstance(span, NonRecordingSpan):
            return None
    return Context()

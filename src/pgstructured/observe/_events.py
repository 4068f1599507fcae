"""What happens inside, as events.

An event is a name from `EVENTS`, the time, and the facts that the table lists
for it. Emitting one costs a dictionary look-up when nobody listens.
"""

from __future__ import annotations

import logging
import math
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol, final

import anyio

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping


@final
@dataclass(frozen=True, slots=True)
class EventKind:
    """One row of the event table."""

    level: int
    """Level of the stdlib log record, from `logging`."""
    facts: tuple[str, ...]
    """Names of the facts that the event carries."""
    meaning: str
    """What has happened."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that has happened inside."""

    name: str
    """A key of `EVENTS`, as ``"lock.lost"``."""
    at: float
    """When, in event-loop seconds (`anyio.current_time`); not a number outside of an event loop."""
    facts: Mapping[str, object]
    """What is known about it; keys as `EVENTS` lists them."""


class Instrument(Protocol):
    """Receives every event, synchronously, on the task where it happens.

    It must not block and should not raise; what it raises is logged and goes no further.
    """

    def __call__(self, event: Event, /) -> None:
        """Take note of ``event``."""
        ...


EVENTS: Final[Mapping[str, EventKind]] = MappingProxyType(
    {
        "driver.connected": EventKind(
            logging.DEBUG, ("backend_pid", "took"), "a server session was opened"
        ),
        "driver.connect_failed": EventKind(
            logging.DEBUG, ("error",), "one attempt of a connect failed"
        ),
        "driver.cancel_settled": EventKind(
            logging.DEBUG, ("took",), "a cancelled statement has ended, the connection is usable"
        ),
        "driver.heartbeat": EventKind(
            logging.DEBUG, ("backend_pid", "took"), "a session that was silent has answered"
        ),
        "driver.failed": EventKind(
            logging.WARNING, ("backend_pid", "error"), "a server session was lost"
        ),
        "supervise.attempt_failed": EventKind(
            logging.WARNING,
            ("what", "attempt", "delay", "error"),
            "an attempt failed, or what it had connected is lost; the next one after delay seconds",
        ),
        "pool.connected": EventKind(
            logging.DEBUG, ("pool", "backend_pid", "took"), "a pool has made a connection"
        ),
        "pool.connect_failed": EventKind(
            logging.WARNING, ("pool", "error"), "a pool's attempt to connect has failed"
        ),
        "pool.recovered": EventKind(
            logging.INFO, ("pool", "outage"), "a pool can connect again, after so many seconds"
        ),
        "pool.acquired": EventKind(
            logging.DEBUG, ("pool", "waited"), "a task has borrowed a connection"
        ),
        "pool.acquire_timed_out": EventKind(
            logging.WARNING, ("pool", "error"), "a task could not borrow a connection in time"
        ),
        "pool.released": EventKind(
            logging.DEBUG, ("pool", "used"), "a task has given a connection back"
        ),
        "pool.hook_failed": EventKind(
            logging.WARNING, ("pool", "error"), "a hook has raised when a connection came back"
        ),
        "pool.connection_closed": EventKind(
            logging.DEBUG, ("pool", "reason"), "a pool has closed a connection"
        ),
        "lock.acquire_started": EventKind(logging.DEBUG, ("key", "shared"), "an acquire began"),
        "lock.contended": EventKind(
            logging.DEBUG, ("key", "shared"), "a lock is not free; the server is waited for"
        ),
        "lock.acquired": EventKind(
            logging.INFO, ("key", "shared", "backend_pid", "waited"), "a lock was granted"
        ),
        "lock.acquire_refused": EventKind(
            logging.DEBUG, ("key", "shared", "waited"), "a try has found the lock not free"
        ),
        "lock.acquire_failed": EventKind(
            logging.INFO,
            ("key", "shared", "waited", "error"),
            "an acquire ended by an error; by a cancellation, where that is None",
        ),
        "lock.acquire_timed_out": EventKind(
            logging.INFO, ("key", "shared", "waited"), "a lock was not granted in time"
        ),
        "lock.refreshed": EventKind(
            logging.DEBUG,
            ("key", "ttl"),
            "a round trip has found a lock held; its ttl runs anew",
        ),
        "lock.lost": EventKind(
            logging.ERROR, ("key", "reason", "sqlstate", "held_for"), "a held lock was lost"
        ),
        "lock.released": EventKind(logging.INFO, ("key", "held_for"), "a lock was released"),
        "lock.release_failed": EventKind(
            logging.WARNING,
            ("key", "error"),
            "an unlock could not be confirmed in time; its session was ended",
        ),
        "lock.session_opened": EventKind(
            logging.DEBUG, ("backend_pid",), "a session for shared use was opened"
        ),
        "lock.session_failed": EventKind(
            logging.WARNING, ("error",), "a session for shared use could not be had"
        ),
        "lock.session_closed": EventKind(
            logging.DEBUG, ("backend_pid", "error"), "a session for shared use has ended"
        ),
        "bus.connected": EventKind(
            logging.INFO, ("generation", "backend_pid", "channels"), "the bus is live"
        ),
        "bus.reconnected": EventKind(
            logging.INFO,
            ("generation", "backend_pid", "channels", "outage"),
            "the bus is live again, every LISTEN confirmed",
        ),
        "bus.lost": EventKind(logging.WARNING, ("generation", "error"), "the bus lost its session"),
        "bus.lagged": EventKind(
            logging.WARNING,
            ("channels", "lost", "overflow"),
            "a subscriber is too slow for its buffer; told again when the loss has doubled",
        ),
        "bus.gap": EventKind(
            logging.INFO, ("reason", "generation", "lost"), "a subscriber was told of a gap"
        ),
        "bus.listen_rejected": EventKind(
            logging.WARNING, ("channel", "error"), "the server refused LISTEN for one channel"
        ),
        "bus.probe_failed": EventKind(
            logging.ERROR, ("error",), "a notification to itself did not come back"
        ),
        "bus.closed": EventKind(logging.INFO, ("generation",), "the bus was closed"),
        "publisher.sent": EventKind(
            logging.DEBUG, ("count", "took"), "the server has confirmed a batch of notifications"
        ),
        "publisher.retried": EventKind(
            logging.WARNING, ("count", "error"), "a batch was not confirmed, and is sent again"
        ),
        "publisher.refused": EventKind(
            logging.ERROR, ("channel", "error"), "the server will never take a notification"
        ),
        "publisher.undelivered": EventKind(
            logging.ERROR,
            ("count", "error"),
            "a publisher has ended before the server had confirmed everything",
        ),
        "log.adopted": EventKind(
            logging.WARNING, ("log",), "a log restored from elsewhere was adopted; cursors expired"
        ),
        "log.read_failed": EventKind(
            logging.WARNING,
            ("log", "delay", "error"),
            "a follower could not read; it tries again after delay seconds",
        ),
        "log.wake_lost": EventKind(
            logging.WARNING,
            ("log", "error"),
            "a publisher did not take a wake-up; followers find the events at their next poll",
        ),
        "log.trimmed": EventKind(logging.INFO, ("log", "count"), "old events were removed"),
        "log.cursors_expired": EventKind(
            logging.WARNING,
            ("log", "names"),
            "events were removed that consumers with stored cursors had not seen",
        ),
        "log.partitions_left": EventKind(
            logging.WARNING,
            ("log", "reason"),
            "partitions could not be dropped or made now, and are left for the next time",
        ),
        "store.resolved": EventKind(
            logging.DEBUG, ("table", "schema"), "a store has found the schema of its table"
        ),
        "store.retried": EventKind(
            logging.INFO,
            ("table", "error"),
            "a statement of a store is run again, as the table is now",
        ),
    }
)
"""The event table: every event there is, its log level, facts and meaning."""

_LOGGERS: Final = {
    "driver": logging.getLogger("pgstructured.driver"),
    "supervise": logging.getLogger("pgstructured.driver"),
    "pool": logging.getLogger("pgstructured.pool"),
    "lock": logging.getLogger("pgstructured.locks"),
    "bus": logging.getLogger("pgstructured.notify"),
    "publisher": logging.getLogger("pgstructured.notify"),
    "log": logging.getLogger("pgstructured.log"),
    "store": logging.getLogger("pgstructured.store"),
}

_DESTINATIONS: Final = {
    name: (_LOGGERS[name.split(".", 1)[0]], kind.level) for name, kind in EVENTS.items()
}

# Without a handler of its own the stdlib would print warnings of a library to stderr.
logging.getLogger("pgstructured").addHandler(logging.NullHandler())

_instruments: tuple[Instrument, ...] = ()


@contextmanager
def instrumented(instrument: Instrument) -> Generator[None]:
    """Send every event of the process to ``instrument`` for the length of a block.

    Args:
        instrument: Called with each `Event`, synchronously; must not block.
    """
    global _instruments  # noqa: PLW0603 - a process-wide registry, as the stdlib's loggers are
    _instruments = (*_instruments, instrument)
    try:
        yield
    finally:
        remaining = list(_instruments)
        remaining.remove(instrument)
        _instruments = tuple(remaining)


def emit(name: str, /, **facts: object) -> None:
    """Tell the log and every instrument that ``name`` has happened.

    Args:
        name: A key of `EVENTS`.
        facts: The facts that its row lists.
    """
    logger, level = _DESTINATIONS[name]
    if logger.isEnabledFor(level):
        told = ", ".join(f"{fact}={value!r}" for fact, value in facts.items())
        logger.log(level, "%s: %s (%s)", name, EVENTS[name].meaning, told, extra={"facts": facts})
    if not _instruments:
        return
    try:
        at = anyio.current_time()
    except RuntimeError:  # a look at a connection that outlived its event loop
        at = math.nan
    event = Event(name=name, at=at, facts=MappingProxyType(facts))
    for instrument in _instruments:
        try:
            instrument(event)
        except Exception:
            logger.exception("instrument %r failed on event %s", instrument, name)

"""What is measured, and by which events.

Pools have the metrics that the semantic conventions for database clients name; what these
have no name for is ``pgstructured.*``. Labels are few and take few values: neither keys nor
channels are among them.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, final

from ._otel_attributes import SYSTEM, attributes_of, names_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from opentelemetry.metrics import Meter
    from opentelemetry.util.types import AttributeValue

    from ._otel_attributes import Facts

# The first as the conventions have them for operations; a lock may be held for hours.
_SHORT: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
_LONG: Final = (*_SHORT, 60.0, 300.0, 3600.0)
_SIZES: Final = (1.0, 10.0, 100.0, 1000.0, 10_000.0)


@final
class Metric(NamedTuple):
    """What is recorded under one name."""

    kind: Literal["histogram", "counter", "up-down counter"]
    unit: str
    meaning: str
    boundaries: tuple[float, ...] = _SHORT
    """Of a histogram's buckets."""


@final
class Measure(NamedTuple):
    """What an event records."""

    metric: str
    value: str | int = 1
    """A number, or the fact that is one, or that is counted."""
    labels: tuple[str, ...] = ()
    """Facts that become attributes."""
    constants: Mapping[str, AttributeValue] = MappingProxyType({})
    """Attributes beside them."""


METRICS: Final[Mapping[str, Metric]] = {
    # ------------------------------------------------------------ of the conventions
    "db.client.connection.count": Metric(
        "up-down counter", "{connection}", "connections of a pool, by state"
    ),
    "db.client.connection.create_time": Metric(
        "histogram", "s", "the time it took to make a connection for a pool"
    ),
    "db.client.connection.wait_time": Metric(
        "histogram", "s", "the time it took to obtain a connection from a pool"
    ),
    "db.client.connection.use_time": Metric(
        "histogram", "s", "the time between borrowing a connection and giving it back", _LONG
    ),
    "db.client.connection.timeouts": Metric(
        "counter", "{timeout}", "acquires of a pool that got no connection in time"
    ),
    # ------------------------------------------------------------ of any connection
    "pgstructured.driver.connect_time": Metric(
        "histogram", "s", "the time it took to open a server session, of a pool or not"
    ),
    "pgstructured.driver.connect_failures": Metric(
        "counter", "{failure}", "attempts to connect that failed, each host by itself"
    ),
    "pgstructured.driver.cancel_time": Metric(
        "histogram", "s", "the time a cancelled statement took to settle"
    ),
    "pgstructured.driver.heartbeat_time": Metric("histogram", "s", "the round trip of a heartbeat"),
    "pgstructured.driver.losses": Metric("counter", "{session}", "server sessions that were lost"),
    "pgstructured.supervise.failures": Metric(
        "counter", "{failure}", "attempts to get or to keep what is supervised that failed"
    ),
    # ------------------------------------------------------------ of pools, beyond
    "pgstructured.pool.connect_failures": Metric(
        "counter", "{failure}", "attempts of a pool to connect that failed"
    ),
    "pgstructured.pool.outage_time": Metric(
        "histogram", "s", "how long a pool could not connect, once it can again", _LONG
    ),
    "pgstructured.pool.hook_failures": Metric(
        "counter", "{failure}", "hooks that raised when a connection came back"
    ),
    "pgstructured.pool.closed_connections": Metric(
        "counter", "{connection}", "connections that a pool has closed, by reason"
    ),
    # ------------------------------------------------------------ of locks
    "pgstructured.lock.acquires": Metric(
        "counter", "{acquire}", "acquires that have ended, by outcome"
    ),
    "pgstructured.lock.wait_time": Metric(
        "histogram", "s", "the time an acquire took, by outcome", _LONG
    ),
    "pgstructured.lock.hold_time": Metric(
        "histogram", "s", "the time a lock was held, by outcome", _LONG
    ),
    "pgstructured.lock.contentions": Metric(
        "counter", "{acquire}", "acquires that found the lock not free, and wait"
    ),
    "pgstructured.lock.losses": Metric("counter", "{lock}", "held locks that were lost, by reason"),
    "pgstructured.lock.refreshes": Metric("counter", "{refresh}", "refreshes that found it held"),
    "pgstructured.lock.release_failures": Metric(
        "counter", "{failure}", "unlocks that could not be confirmed in time"
    ),
    "pgstructured.lock.sessions": Metric(
        "up-down counter", "{session}", "sessions that are open for many locks each"
    ),
    "pgstructured.lock.session_failures": Metric(
        "counter", "{failure}", "such sessions that could not be had"
    ),
    # ------------------------------------------------------------ of notifications
    "pgstructured.bus.losses": Metric("counter", "{session}", "sessions that the bus lost"),
    "pgstructured.bus.outage_time": Metric(
        "histogram", "s", "how long the bus was not live, once it is again", _LONG
    ),
    "pgstructured.bus.gaps": Metric(
        "counter", "{gap}", "gaps that subscribers were told of, by reason"
    ),
    "pgstructured.bus.lost_notifications": Metric(
        "counter", "{notification}", "notifications that these gaps say were lost"
    ),
    "pgstructured.bus.lags": Metric(
        "counter", "{lag}", "times that a subscriber was found too slow for its buffer"
    ),
    "pgstructured.bus.listen_failures": Metric(
        "counter", "{failure}", "channels that the server refused"
    ),
    "pgstructured.bus.probe_failures": Metric(
        "counter", "{failure}", "notifications of the bus to itself that did not come back"
    ),
    "pgstructured.publisher.batch_time": Metric(
        "histogram", "s", "the time until the server had confirmed a batch"
    ),
    "pgstructured.publisher.batch_size": Metric(
        "histogram", "{notification}", "the notifications in a confirmed batch", _SIZES
    ),
    "pgstructured.publisher.retries": Metric(
        "counter", "{batch}", "batches that were not confirmed, and are sent again"
    ),
    "pgstructured.publisher.refused_notifications": Metric(
        "counter", "{notification}", "notifications that the server will never take"
    ),
    "pgstructured.publisher.undelivered_notifications": Metric(
        "counter", "{notification}", "notifications of which a publisher's end left it unsure"
    ),
    # ------------------------------------------------------------ of tables
    "pgstructured.log.read_failures": Metric(
        "counter", "{failure}", "reads of followers that failed, and are tried again"
    ),
    "pgstructured.log.lost_wakes": Metric(
        "counter", "{wake}", "wake-ups of followers that a publisher did not take"
    ),
    "pgstructured.log.trimmed_events": Metric("counter", "{event}", "old events that were removed"),
    "pgstructured.log.expired_cursors": Metric(
        "counter", "{cursor}", "stored cursors that have missed what was removed"
    ),
    "pgstructured.log.left_partitions": Metric(
        "counter", "{time}", "times that partitions could not be dropped or made, by reason"
    ),
    "pgstructured.log.adoptions": Metric(
        "counter", "{log}", "logs restored from elsewhere that were adopted"
    ),
    "pgstructured.store.retries": Metric(
        "counter", "{statement}", "statements of a store that were run again"
    ),
}
"""Every metric there is, by name."""

_IDLE: Final[Mapping[str, AttributeValue]] = {**SYSTEM, "db.client.connection.state": "idle"}
_USED: Final[Mapping[str, AttributeValue]] = {**SYSTEM, "db.client.connection.state": "used"}
_ACQUIRE: Final = (
    Measure("pgstructured.lock.acquires", 1, ("outcome", "shared", "error")),
    Measure("pgstructured.lock.wait_time", "waited", ("outcome", "shared")),
)

MEASURES: Final[Mapping[str, tuple[Measure, ...]]] = {
    "driver.connected": (Measure("pgstructured.driver.connect_time", "took"),),
    "driver.connect_failed": (Measure("pgstructured.driver.connect_failures", 1, ("error",)),),
    "driver.cancel_settled": (Measure("pgstructured.driver.cancel_time", "took"),),
    "driver.heartbeat": (Measure("pgstructured.driver.heartbeat_time", "took"),),
    "driver.failed": (Measure("pgstructured.driver.losses", 1, ("error",)),),
    "supervise.attempt_failed": (Measure("pgstructured.supervise.failures", 1, ("what", "error")),),
    "pool.connected": (
        Measure("db.client.connection.create_time", "took", ("pool",), SYSTEM),
        Measure("db.client.connection.count", 1, ("pool",), _IDLE),
    ),
    "pool.connect_failed": (Measure("pgstructured.pool.connect_failures", 1, ("pool", "error")),),
    "pool.recovered": (Measure("pgstructured.pool.outage_time", "outage", ("pool",)),),
    "pool.acquired": (
        Measure("db.client.connection.wait_time", "waited", ("pool",), SYSTEM),
        Measure("db.client.connection.count", -1, ("pool",), _IDLE),
        Measure("db.client.connection.count", 1, ("pool",), _USED),
    ),
    "pool.acquire_timed_out": (Measure("db.client.connection.timeouts", 1, ("pool",), SYSTEM),),
    "pool.released": (
        Measure("db.client.connection.use_time", "used", ("pool",), SYSTEM),
        Measure("db.client.connection.count", -1, ("pool",), _USED),
        Measure("db.client.connection.count", 1, ("pool",), _IDLE),
    ),
    "pool.hook_failed": (Measure("pgstructured.pool.hook_failures", 1, ("pool", "error")),),
    "pool.connection_closed": (
        Measure("pgstructured.pool.closed_connections", 1, ("pool", "reason")),
        Measure("db.client.connection.count", -1, ("pool",), _IDLE),
    ),
    "lock.contended": (Measure("pgstructured.lock.contentions", 1, ("shared",)),),
    "lock.acquired": _ACQUIRE,
    "lock.acquire_refused": _ACQUIRE,
    "lock.acquire_timed_out": _ACQUIRE,
    "lock.acquire_failed": _ACQUIRE,
    "lock.refreshed": (Measure("pgstructured.lock.refreshes"),),
    "lock.released": (Measure("pgstructured.lock.hold_time", "held_for", ("outcome",)),),
    "lock.lost": (
        Measure("pgstructured.lock.hold_time", "held_for", ("outcome",)),
        Measure("pgstructured.lock.losses", 1, ("reason", "sqlstate")),
    ),
    "lock.release_failed": (Measure("pgstructured.lock.release_failures", 1, ("error",)),),
    "lock.session_opened": (Measure("pgstructured.lock.sessions", 1),),
    "lock.session_closed": (Measure("pgstructured.lock.sessions", -1),),
    "lock.session_failed": (Measure("pgstructured.lock.session_failures", 1, ("error",)),),
    "bus.lost": (Measure("pgstructured.bus.losses", 1, ("error",)),),
    "bus.reconnected": (Measure("pgstructured.bus.outage_time", "outage"),),
    "bus.gap": (
        Measure("pgstructured.bus.gaps", 1, ("reason",)),
        Measure("pgstructured.bus.lost_notifications", "lost"),
    ),
    "bus.lagged": (Measure("pgstructured.bus.lags", 1, ("overflow",)),),
    "bus.listen_rejected": (Measure("pgstructured.bus.listen_failures", 1, ("error",)),),
    "bus.probe_failed": (Measure("pgstructured.bus.probe_failures", 1, ("error",)),),
    "publisher.sent": (
        Measure("pgstructured.publisher.batch_time", "took"),
        Measure("pgstructured.publisher.batch_size", "count"),
    ),
    "publisher.retried": (Measure("pgstructured.publisher.retries", 1, ("error",)),),
    "publisher.refused": (Measure("pgstructured.publisher.refused_notifications", 1, ("error",)),),
    "publisher.undelivered": (
        Measure("pgstructured.publisher.undelivered_notifications", "count", ("error",)),
    ),
    "log.read_failed": (Measure("pgstructured.log.read_failures", 1, ("log", "error")),),
    "log.wake_lost": (Measure("pgstructured.log.lost_wakes", 1, ("log", "error")),),
    "log.trimmed": (Measure("pgstructured.log.trimmed_events", "count", ("log",)),),
    "log.cursors_expired": (Measure("pgstructured.log.expired_cursors", "names", ("log",)),),
    "log.partitions_left": (Measure("pgstructured.log.left_partitions", 1, ("log", "reason")),),
    "log.adopted": (Measure("pgstructured.log.adoptions", 1, ("log",)),),
    "store.retried": (Measure("pgstructured.store.retries", 1, ("table", "error")),),
}
"""What each event records, by its name."""


@final
class Metering:
    """Records what events measure.

    Args:
        meter: Makes what they are recorded with.
    """

    def __init__(self, meter: Meter) -> None:
        recorders = {name: _create(meter, name, metric) for name, metric in METRICS.items()}
        self._steps = {
            event: tuple(
                (recorders[measure.metric], measure, names_of(event, measure.labels))
                for measure in measures
            )
            for event, measures in MEASURES.items()
        }

    def measure(self, event_name: str, facts: Facts) -> None:
        """Record what an event measures."""
        for record, measure, names in self._steps.get(event_name, ()):
            value = _value(facts, measure.value)
            if value is not None:
                record(value, attributes_of(facts, names, measure.constants))


def _create(
    meter: Meter, name: str, metric: Metric
) -> Callable[[float, Mapping[str, AttributeValue]], None]:
    if metric.kind == "histogram":
        return meter.create_histogram(
            name,
            metric.unit,
            metric.meaning,
            explicit_bucket_boundaries_advisory=metric.boundaries,
        ).record
    if metric.kind == "counter":
        return meter.create_counter(name, metric.unit, metric.meaning).add
    return meter.create_up_down_counter(name, metric.unit, metric.meaning).add


def _value(facts: Facts, value: str | int) -> float | None:
    """Return the number to record; None where the event does not know it."""
    if isinstance(value, int):
        return value
    found = facts[value]
    return found if found is None or isinstance(found, float | int) else len(found)

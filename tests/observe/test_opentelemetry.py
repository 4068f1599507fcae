"""What is made of each event, and what an instrument needs, by the real SDK."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import psycopg
import pytest
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    use_span,
)

from pgstructured.locks import LockKey
from pgstructured.observe import EVENTS, Event, OpenTelemetryInstrument, emit, instrumented
from pgstructured.observe._otel_attributes import names_of
from pgstructured.observe._otel_metrics import MEASURES, METRICS
from pgstructured.observe._otel_spans import NOTES, SPANS

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "observe.md"
UNMEASURED = {"lock.acquire_started", "bus.connected", "bus.closed", "store.resolved"}
FAILURE = psycopg.errors.lookup("57P01")("terminating connection due to administrator command")
FACTS = {
    "attempt": 3,
    "backend_pid": 4711,
    "channel": "orders",
    "channels": ["orders", "users"],
    "count": 10,
    "delay": 0.5,
    "error": FAILURE,
    "generation": 2,
    "held_for": 2.0,
    "key": LockKey.named("nightly-report"),
    "log": "pgstructured_event",
    "lost": 5,
    "names": ["a", "b"],
    "outage": 3.0,
    "overflow": "drop_oldest",
    "pool": "web",
    "reason": "closed",
    "schema": "public",
    "shared": False,
    "sqlstate": "57P01",
    "table": "orders",
    "took": 0.25,
    "ttl": 10.0,
    "used": 0.75,
    "waited": 0.5,
    "what": "pgstructured/notify",
}
MAY_BE_NONE = {"error", "sqlstate", "lost", "ttl"}


def event(name, **facts):
    known = {fact: FACTS[fact] for fact in EVENTS[name].facts}
    return Event(name=name, at=math.nan, facts=known | facts)


def told(name):
    """Yield an event of that name with all its facts, and with those alone that are never None."""
    nothing = dict.fromkeys(MAY_BE_NONE & set(EVENTS[name].facts))
    yield event(name)
    yield event(name, **nothing)


@pytest.mark.parametrize("name", EVENTS)
def test_every_event_becomes_what_the_tables_say(name, telemetry):
    told_of = list(told(name))
    with telemetry.tracer.start_as_current_span("around"):
        for one in told_of:
            telemetry.instrument(one)
    spans = telemetry.spans()
    expected = [SPANS[name].name] * len(told_of) if name in SPANS else []
    assert [span.name for span in spans] == [*expected, "around"]
    noted = [note.name for note in spans[-1].events]
    assert noted == ([name] * len(told_of) if name in NOTES else [])
    measured = telemetry.metrics()
    assert set(measured) == {measure.metric for measure in MEASURES.get(name, ())}
    for metric in measured.values():
        assert metric.unit == METRICS[metric.name].unit
        assert metric.description == METRICS[metric.name].meaning


def test_every_event_has_a_place():
    assert set(EVENTS) - set(MEASURES) == UNMEASURED
    assert set(MEASURES) | set(SPANS) | NOTES <= set(EVENTS)
    assert not set(SPANS) & NOTES
    used = {measure.metric for measures in MEASURES.values() for measure in measures}
    assert used == set(METRICS)
    for name, measures in MEASURES.items():
        known = {*EVENTS[name].facts, "outcome", "error"}
        for measure in measures:
            assert set(measure.labels) <= known, name
            if isinstance(measure.value, str):
                assert measure.value in EVENTS[name].facts, name


def test_the_facts_here_are_those_of_the_table():
    assert set(FACTS) == {fact for kind in EVENTS.values() for fact in kind.facts}


def test_no_metric_has_a_label_of_many_values():
    labels = {x for measures in MEASURES.values() for one in measures for x in one.labels}
    assert not labels & {"key", "channel", "channels", "backend_pid", "generation", "names"}


def test_the_reference_lists_every_metric_and_every_span():
    page = PAGE.read_text(encoding="utf-8")
    labels: dict[str, set[str]] = {name: set() for name in METRICS}
    for name in MEASURES:
        for measure in MEASURES[name]:
            labels[measure.metric] |= {*names_of(name, measure.labels).values()}
            labels[measure.metric] |= set(measure.constants)
    rows = re.findall(
        r"^\| `([\w.]+)` \| (histogram|counter|up-down counter) \| `([^`]+)` \| (.*?) \|",
        page,
        re.MULTILINE,
    )
    assert [(name, kind, unit) for name, kind, unit, _ in rows] == [
        (name, metric.kind, metric.unit) for name, metric in METRICS.items()
    ]
    for name, _, _, attributes in rows:
        shown = {written_out(name, x) for x in re.findall(r"`([\w.]+)`", attributes)}
        assert shown == labels[name], name
    traced = re.findall(r"^\| `([a-z.]+)` \| ((?:`[\w.]+`(?:, )?)+) \|", page, re.MULTILINE)
    told = {span: set(re.findall(r"[\w.]+", events)) for span, events in traced}
    shapes = {(shape.name, name) for name, shape in SPANS.items()}
    assert {(span, name) for span, names in told.items() for name in names} == shapes
    (notes,) = re.findall(r"^Noted in the span.*: (.*)\.$", page, re.MULTILINE)
    assert set(re.findall(r"`([\w.]+)`", notes)) == NOTES


def written_out(metric, shown):
    """Return an attribute's name, which the reference shortens after a metric of the same room."""
    return shown if "." in shown else f"{metric.rpartition('.')[0]}.{shown}"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FAILURE, "57P01"),
        (psycopg.OperationalError("no server"), "psycopg.OperationalError"),
        (TimeoutError("late"), "TimeoutError"),
    ],
)
def test_an_error_is_its_sqlstate_or_its_class(telemetry, error, expected):
    telemetry.instrument(event("driver.failed", error=error))
    assert telemetry.totals("pgstructured.driver.losses", "error.type") == {(expected,): 1}


def test_a_pool_has_the_names_of_the_conventions(telemetry):
    for name in ("pool.connected", "pool.acquired", "pool.released", "pool.acquire_timed_out"):
        telemetry.instrument(event(name))
    pool = {"db.system.name": "postgresql", "db.client.connection.pool.name": "web"}
    for name, seconds in (("create", 0.25), ("wait", 0.5), ("use", 0.75)):
        (point,) = telemetry.points(f"db.client.connection.{name}_time")
        assert (point.count, point.sum, point.attributes) == (1, seconds, pool)
    (point,) = telemetry.points("db.client.connection.timeouts")
    assert (point.value, point.attributes) == (1, pool)
    for state, count in (("idle", 1), ("used", 0)):
        (point,) = [
            x
            for x in telemetry.points("db.client.connection.count")
            if x.attributes["db.client.connection.state"] == state
        ]
        assert point.value == count
        assert point.attributes == pool | {"db.client.connection.state": state}


def test_buckets_are_of_seconds(telemetry):
    telemetry.instrument(event("pool.acquired"))
    telemetry.instrument(event("publisher.sent"))
    (waited,) = telemetry.points("db.client.connection.wait_time")
    assert waited.explicit_bounds[:2] == (0.001, 0.005)
    (size,) = telemetry.points("pgstructured.publisher.batch_size")
    assert size.explicit_bounds[:2] == (1, 10)


def test_how_an_acquire_ends(telemetry):
    telemetry.instrument(event("lock.acquired"))
    telemetry.instrument(event("lock.acquire_refused"))
    telemetry.instrument(event("lock.acquire_timed_out"))
    telemetry.instrument(event("lock.acquire_failed"))
    telemetry.instrument(event("lock.acquire_failed", error=None))
    outcomes = {(outcome,): 1 for outcome in OUTCOMES}
    outcome = "pgstructured.lock.outcome"
    assert telemetry.totals("pgstructured.lock.acquires", outcome) == outcomes
    assert telemetry.totals("pgstructured.lock.wait_time", outcome) == outcomes
    spans = telemetry.spans("lock.acquire")
    assert {span.attributes[outcome]: span.attributes.get("error.type") for span in spans} == (
        OUTCOMES
    )
    for span in spans:
        is_error = "error.type" in span.attributes
        assert span.status.status_code is (StatusCode.ERROR if is_error else StatusCode.UNSET)
    assert spans[3].status.description == str(FAILURE)


OUTCOMES = {
    "acquired": None,
    "refused": None,
    "timed_out": "pgstructured.errors.LockTimeout",
    "failed": "57P01",
    "cancelled": None,
}


def test_a_span_lasts_as_long_as_the_event_says(telemetry):
    telemetry.instrument(event("lock.released"))
    (span,) = telemetry.spans()
    assert span.end_time - span.start_time == 2_000_000_000
    assert dict(span.attributes) == {
        "db.system.name": "postgresql",
        "pgstructured.lock.key": "nightly-report",
        "pgstructured.lock.outcome": "released",
    }
    assert span.kind is SpanKind.INTERNAL
    assert span.instrumentation_scope.name == "pgstructured"
    assert span.instrumentation_scope.version
    assert span.instrumentation_scope.schema_url == "https://opentelemetry.io/schemas/1.30.0"


def test_attributes_are_what_opentelemetry_takes(telemetry):
    with telemetry.tracer.start_as_current_span("around"):
        telemetry.instrument(event("lock.contended", key=LockKey.pair(1, 2)))
        telemetry.instrument(event("lock.release_failed"))
        telemetry.instrument(event("lock.refreshed", ttl=None))
    telemetry.instrument(event("bus.reconnected", channels=["a", "b"]))
    telemetry.instrument(event("publisher.sent"))
    outer, bus, publisher = telemetry.spans()
    assert [dict(note.attributes) for note in outer.events] == [
        {"pgstructured.lock.key": "1,2", "pgstructured.lock.shared": False},
        {"pgstructured.lock.key": "nightly-report", "error.type": "57P01"},
        {"pgstructured.lock.key": "nightly-report"},
    ]
    assert bus.attributes["pgstructured.bus.channels"] == ("a", "b")
    assert publisher.attributes["messaging.batch.message_count"] == 10


def test_a_pool_that_gives_at_once_makes_no_span(telemetry):
    telemetry.instrument(event("pool.acquired", waited=0.0))
    assert telemetry.spans() == []
    assert telemetry.totals("db.client.connection.wait_time") == 1


def test_what_a_task_does_is_part_of_its_trace(telemetry):
    with telemetry.tracer.start_as_current_span("around") as around:
        telemetry.instrument(event("lock.acquired"))
        telemetry.instrument(event("lock.lost"))
        telemetry.instrument(event("bus.reconnected"))
    acquire, lost, outage, _ = telemetry.spans()
    assert acquire.parent == around.get_span_context()
    assert (lost.parent, outage.parent) == (None, None)
    assert lost.status.status_code is StatusCode.ERROR
    assert lost.attributes["error.type"] == "pgstructured.errors.LockLost"
    assert lost.attributes["db.response.status_code"] == "57P01"
    assert lost.attributes["pgstructured.lock.reason"] == "closed"


def test_a_span_that_has_ended_gets_no_more_children(telemetry):
    # A task that reconnects goes on in the context that it was started in, for weeks.
    with telemetry.tracer.start_as_current_span("around", end_on_exit=False) as around:
        around.end()
        telemetry.instrument(event("driver.connected"))
        telemetry.instrument(event("lock.contended"))
    _, connect = telemetry.spans()
    assert connect.parent is None


@pytest.mark.parametrize("is_sampled", [True, False])
def test_a_trace_that_began_elsewhere_goes_on(telemetry, is_sampled):
    flags = TraceFlags(TraceFlags.SAMPLED if is_sampled else TraceFlags.DEFAULT)
    elsewhere = SpanContext(1, 2, is_remote=True, trace_flags=flags)
    with use_span(NonRecordingSpan(elsewhere)):
        telemetry.instrument(event("lock.acquired"))
    assert [span.parent for span in telemetry.spans()] == [elsewhere] * is_sampled


def test_without_an_sdk_it_does_nothing(caplog):
    with instrumented(OpenTelemetryInstrument()):
        for name, kind in EVENTS.items():
            emit(name, **{fact: FACTS[fact] for fact in kind.facts})
    assert not [record for record in caplog.records if record.exc_info]


def test_without_opentelemetry_it_names_the_extra(monkeypatch):
    for name in [*sys.modules]:
        if name.partition(".")[0] == "opentelemetry":
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=re.escape("pip install 'pgstructured[otel]'")):
        OpenTelemetryInstrument()


def run_python(program):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        capture_output=True,
        check=False,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=60,
    )


def test_observing_needs_no_opentelemetry():
    done = run_python(
        """
        import sys
        sys.modules["opentelemetry"] = None  # as if it were not there
        import pgstructured.observe, pgstructured.locks, pgstructured.notify
        from pgstructured.observe import OpenTelemetryInstrument
        try:
            OpenTelemetryInstrument()
        except ImportError as exc:
            print(exc)
        print(sorted(name for name in sys.modules if name.startswith("opentelemetry")))
        print("OpenTelemetryInstrument" in dir(pgstructured.observe))
        """
    )
    assert done.stderr == ""
    needs, loaded, is_listed = done.stdout.splitlines()
    assert needs.endswith("the package opentelemetry-api: pip install 'pgstructured[otel]'")
    assert (loaded, is_listed) == ("['opentelemetry']", "True")


def test_importing_it_imports_no_opentelemetry():
    done = run_python(
        """
        import sys
        import pgstructured.locks, pgstructured.notify
        from pgstructured.observe import OpenTelemetryInstrument
        print([name for name in sys.modules if name.startswith("opentelemetry")])
        """
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_global_providers_may_come_later():
    done = run_python(
        """
        from opentelemetry import metrics, trace
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
        from pgstructured.observe import OpenTelemetryInstrument, emit, instrumented

        instrument = OpenTelemetryInstrument()
        reader, exporter = InMemoryMetricReader(), InMemorySpanExporter()
        tracers = TracerProvider()
        tracers.add_span_processor(SimpleSpanProcessor(exporter))
        trace.set_tracer_provider(tracers)
        metrics.set_meter_provider(MeterProvider(metric_readers=[reader]))
        with instrumented(instrument):
            emit("lock.released", key="a key", held_for=1.0)
        print([span.name for span in exporter.get_finished_spans()])
        (resource,) = reader.get_metrics_data().resource_metrics
        print([metric.name for scope in resource.scope_metrics for metric in scope.metrics])
        """
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["['lock.hold']", "['pgstructured.lock.hold_time']"]

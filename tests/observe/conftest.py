"""What the tests of OpenTelemetry share: the real SDK, which keeps what it gets."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pgstructured.observe import OpenTelemetryInstrument


class Telemetry:
    """An instrument, and what it has recorded."""

    def __init__(self):
        self._reader = InMemoryMetricReader()
        self._exporter = InMemorySpanExporter()
        self.meters = MeterProvider(metric_readers=[self._reader], shutdown_on_exit=False)
        self.tracers = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.tracers.get_tracer("a test's own")
        self.instrument = OpenTelemetryInstrument(
            tracer_provider=self.tracers, meter_provider=self.meters
        )

    def metrics(self):
        """Return what was measured, by name."""
        data = self._reader.get_metrics_data()
        scopes = [x for part in (data.resource_metrics if data else ()) for x in part.scope_metrics]
        return {metric.name: metric for scope in scopes for metric in scope.metrics}

    def points(self, name):
        """Return the points of a metric."""
        metric = self.metrics().get(name)
        return list(metric.data.data_points) if metric else []

    def totals(self, name, *attributes):
        """Return counts or sums, by the values of some attributes."""
        totals: dict[tuple[Any, ...], Any] = {}
        for point in self.points(name):
            by = tuple(point.attributes.get(attribute) for attribute in attributes)
            value = point.count if hasattr(point, "count") else point.value
            totals[by] = totals.get(by, 0) + value
        return totals if attributes else sum(totals.values())

    def spans(self, name=None):
        """Return the spans that have ended, in that order."""
        spans = self._exporter.get_finished_spans()
        return [span for span in spans if name in {None, span.name}]

    @staticmethod
    async def eventually(condition):
        with anyio.fail_after(30):
            while not condition():  # noqa: ASYNC110 - it may be the server's
                await anyio.sleep(0.005)

    def close(self):
        self.meters.shutdown()
        self.tracers.shutdown()


@pytest.fixture
def telemetry():
    telemetry = Telemetry()
    yield telemetry
    telemetry.close()

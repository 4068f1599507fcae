"""Events, as spans and metrics of OpenTelemetry.

What is measured is the table of `_otel_metrics`, what is traced that of `_otel_spans`.
OpenTelemetry is optional, so it is not imported before an `OpenTelemetryInstrument` is made.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Final, final

from ._otel_attributes import facts_of
from ._otel_metrics import Metering

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

    from ._events import Event

_SCOPE: Final = "pgstructured"
_SCHEMA: Final = "https://opentelemetry.io/schemas/1.30.0"


@final
class OpenTelemetryInstrument:
    """Turns events into spans and metrics, for `instrumented`.

    Needs the extra ``otel``, which is OpenTelemetry's API; what exports is the program's. It
    keeps nothing, so one may be used by any number of threads and event loops.

    Args:
        tracer_provider: Makes the spans; by default the global one, also where that is set
            later.
        meter_provider: Takes the metrics; by default the global one, ditto.

    Raises:
        ImportError: if the API is not installed.
    """

    def __init__(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
    ) -> None:
        try:
            from opentelemetry.metrics import get_meter  # noqa: PLC0415 - it is optional
            from opentelemetry.trace import get_tracer  # noqa: PLC0415 - ditto
        except ImportError as exc:
            raise ImportError(
                "OpenTelemetryInstrument needs the package opentelemetry-api:"
                " pip install 'pgstructured[otel]'"
            ) from exc
        from ._otel_spans import Tracing  # noqa: PLC0415 - imports what has been found here

        ours = version(_SCOPE)
        self._metering = Metering(get_meter(_SCOPE, ours, meter_provider, _SCHEMA))
        self._tracing = Tracing(get_tracer(_SCOPE, ours, tracer_provider, _SCHEMA))

    def __call__(self, event: Event, /) -> None:
        """Measure ``event``, and trace what it is the end of."""
        facts = facts_of(event)
        self._metering.measure(event.name, facts)
        self._tracing.trace(event.name, facts)

"""A span for each request and for each of its stages, sent to an OpenTelemetry collector.

They are made when a request is over, of its timeline, and sent by a thread of their own. A
client that sends ``traceparent`` finds them in its own trace. Without an endpoint nothing of
this is imported.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..core.clock import Clock
from ..core.errors import ConfigError
from .timeline import Outcome, Timeline

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_MAX_WAITING = 16 << 10  # spans; more are dropped
_EVERY_MS = 1000
_TIMEOUT_S = 2.0  # for the collector to take them


class Spans:
    """Raises ConfigError where the packages are not installed."""

    def __init__(self, endpoint: str, model: str, clock: Clock) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(
                "observability.otlp_endpoint wants packages that are not installed: "
                f"pip install 'pdserve[otel]' ({error})"
            ) from error
        self._trace = trace
        self._contexts = TraceContextTextMapPropagator()
        self._model = model
        self._clock = clock
        self._provider: TracerProvider = TracerProvider(
            resource=Resource.create({"service.name": "pdserve"}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                OTLPSpanExporter(endpoint, timeout=_TIMEOUT_S),
                max_queue_size=_MAX_WAITING,
                schedule_delay_millis=_EVERY_MS,
            )
        )
        self._tracer = self._provider.get_tracer("pdserve")

    def ended(self, timeline: Timeline) -> None:
        trace, since = self._trace, time.time() - self._clock()

        def nanoseconds(mark: float) -> int:
            return int((since + mark) * 1e9)

        came = {"traceparent": timeline.traceparent} if timeline.traceparent is not None else {}
        operation = "chat" if timeline.chat else "text_completion"
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            self._contexts.extract(came),
            kind=trace.SpanKind.SERVER,
            attributes=_attributes(timeline, operation, self._model),
            start_time=nanoseconds(timeline.arrived),
        )
        if timeline.outcome in (Outcome.FAILED, Outcome.REFUSED):
            span.set_status(trace.StatusCode.ERROR, timeline.error)
        within = trace.set_span_in_context(span)
        for stage, start, end in timeline.stages():
            part = self._tracer.start_span(stage, within, start_time=nanoseconds(start))
            part.end(nanoseconds(end))
        span.end(nanoseconds(timeline.finished))

    def close(self) -> None:
        """Sends what waits; it blocks, for a few seconds where no collector answers."""
        self._provider.shutdown()


def _attributes(timeline: Timeline, operation: str, model: str) -> dict[str, Any]:
    found = {
        "gen_ai.operation.name": operation,
        "gen_ai.request.model": model,
        "gen_ai.response.id": timeline.call_id,
        "gen_ai.usage.input_tokens": timeline.num_prompt_tokens,
        "gen_ai.usage.output_tokens": timeline.num_output_tokens,
        "gen_ai.usage.cache_read.input_tokens": timeline.num_cached_tokens,
        "gen_ai.server.time_to_first_token": timeline.ttft,
        "gen_ai.server.time_per_output_token": timeline.tpot,
        "error.type": timeline.error,
        "pdserve.outcome": timeline.outcome,
        "pdserve.route": timeline.route,
        "pdserve.prefill_worker": timeline.prefill,
        "pdserve.decode_worker": timeline.decode,
        "pdserve.attempts": timeline.num_attempts,
    }
    if timeline.transfer is not None:
        found["pdserve.transfer.medium"] = timeline.transfer.medium
        found["pdserve.transfer.bytes"] = timeline.transfer.num_bytes
        found["pdserve.transfer.exposed"] = timeline.transfer.exposed_s
    return {name: value for name, value in found.items() if value is not None}

"""What Prometheus scrapes. Times come from timelines, states from the dispatcher at the scrape.

Names and labels are those of OpenTelemetry's ``gen_ai`` conventions where it has one, as
Prometheus writes them, and begin with ``pdserve_`` else. A histogram of a time that has an
objective has the objective among its bounds, so that attainment can be read from it.
"""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from ..core.config import SloSection
from ..core.ids import Role
from ..core.messages import TransferDone
from .dispatch import Dispatch
from .history import EventKind
from .membership import MemberState
from .snapshot import Objectives
from .timeline import Outcome, Stage, Timeline

_OF_OBJECTIVE = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1, 1.2, 1.5, 2, 3, 5, 10, 30, 100)
_DURATIONS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_STAGES_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_OWN_S = (0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.25, 1)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_NONE = "none"


class Metrics:
    """``render`` is what a scrape gets; the others are told as it happens."""

    def __init__(self, slo: SloSection, model: str) -> None:
        disable_created_metrics()
        self.registry = registry = CollectorRegistry()
        self._model = model
        self._objectives = Objectives(slo.ttft_ms, slo.tpot_ms)
        ttft_s, tpot_s = slo.ttft_ms / 1e3, slo.tpot_ms / 1e3
        ProcessCollector(registry=registry)

        def histogram(name: str, about: str, bounds: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, about, labels, buckets=bounds, registry=registry)

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(name, about, labels, registry=registry)

        labels = ("gen_ai_operation_name", "gen_ai_request_model", "route")
        self._ttft = histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From the arrival of a request to its first token",
            around(ttft_s),
            *labels,
        )
        self._tpot = histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Mean time of a request's tokens after the first",
            around(tpot_s),
            *labels,
        )
        self._total = histogram(
            "gen_ai_server_request_duration_seconds",
            "From the arrival of a request to its end",
            _DURATIONS_S,
            *labels,
            "error_type",
        )
        self._gaps = histogram(
            "pdserve_inter_token_latency_seconds",
            "Between two tokens of one answer",
            around(tpot_s),
        )
        self._stages = histogram(
            "pdserve_stage_seconds", "What a request's time went to", _STAGES_S, "stage"
        )
        self._own = histogram(
            "pdserve_router_seconds",
            "What the router itself took: in, from a request to its placement; out, from the "
            "word of its first token to the event of it",
            _OWN_S,
            "part",
        )
        self._lag = histogram(
            "pdserve_event_loop_lag_seconds",
            "How much later than it should the router looked at the time",
            _OWN_S,
        )
        self._batches = histogram(
            "pdserve_batch_size", "Answers that one step of a worker moved on", _BATCHES
        )
        self._granted = histogram(
            "pdserve_grant_wait_seconds",
            "From the start of a prompt until its decode worker had room for it",
            _STAGES_S,
        )
        self._moving = histogram(
            "pdserve_transfer_seconds",
            "From the first KV block that left to the word that all are in",
            _STAGES_S,
            "medium",
        )
        self._exposed = histogram(
            "pdserve_transfer_exposed_seconds",
            "What of a transfer came after its prompt was computed",
            _STAGES_S,
            "medium",
        )
        self._bytes = counter("pdserve_transfer_bytes", "KV that was moved", "medium")
        self._forecasts = histogram(
            "pdserve_forecast_seconds",
            "What a placement should have led to",
            _STAGES_S,
            "objective",
        )
        self._errors = histogram(
            "pdserve_forecast_error_seconds",
            "How far it was from that: late where it took longer",
            _STAGES_S,
            "objective",
            "direction",
        )
        self._tokens = counter("pdserve_tokens", "Of requests that are over", "gen_ai_token_type")
        self._requests = counter(
            "pdserve_requests", "By how they ended", "outcome", "route", "error_type"
        )
        self._replays = counter("pdserve_replays", "Attempts at requests after their first one")
        self._good = counter("pdserve_good_requests", "Done, within both objectives")
        self._slo = counter(
            "pdserve_slo", "Requests that met an objective, or did not", "objective", "met"
        )
        self._responses = counter("pdserve_http_responses", "By path and status", "path", "status")
        objectives = Gauge(
            "pdserve_slo_objective_seconds", "As configured", ("objective",), registry=registry
        )
        objectives.labels("ttft").set(ttft_s)
        objectives.labels("tpot").set(tpot_s)
        self._of_part = {part: self._own.labels(part) for part in ("in", "out")}
        self._of_stage = {stage: self._stages.labels(stage) for stage in Stage}
        for objective in ("ttft", "tpot", "both"):  # a rate needs its zero
            for met in ("yes", "no"):
                self._slo.labels(objective, met)
        for objective in ("ttft", "tpot"):
            self._forecasts.labels(objective)
            for direction in ("late", "early"):
                self._errors.labels(objective, direction)

    def watch(self, dispatch: Dispatch) -> None:
        self.registry.register(_States(dispatch))

    def render(self, accept: str) -> tuple[bytes, str]:
        """The body and its content type, in the newest format that the scraper takes."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def gap(self, seconds: float) -> None:
        self._gaps.observe(seconds)

    def lag(self, seconds: float) -> None:
        self._lag.observe(max(0.0, seconds))

    def own(self, inward_s: float | None, outward_s: float | None) -> None:
        """Of one call, as far as it came."""
        if inward_s is not None:
            self._of_part["in"].observe(inward_s)
        if outward_s is not None:
            self._of_part["out"].observe(outward_s)

    def batch(self, num_tokens: int) -> None:
        """A message of a worker: first tokens, which prefills draw, are not counted."""
        if num_tokens:
            self._batches.observe(num_tokens)

    def transfer(self, done: TransferDone) -> None:
        self._granted.observe(done.waited_s)
        self._moving.labels(done.medium).observe(done.moving_s)
        self._exposed.labels(done.medium).observe(done.exposed_s)
        self._bytes.labels(done.medium).inc(done.num_bytes)

    def response(self, path: str, status: str) -> None:
        """``path`` as it is routed, so that there are few."""
        self._responses.labels(path, status).inc()

    def refused(self, code: str | None) -> None:
        """A call that no request came of."""
        self._requests.labels("refused", _NONE, code or _NONE).inc()

    def ended(self, timeline: Timeline) -> None:
        route = timeline.route or _NONE
        operation = "chat" if timeline.chat else "text_completion"
        error = timeline.error or ("failed" if timeline.outcome is Outcome.FAILED else _NONE)
        labels = (operation, self._model, route)
        self._requests.labels(timeline.outcome, route, error).inc()
        self._total.labels(*labels, error).observe(timeline.total)
        if (ttft := timeline.ttft) is not None:
            self._ttft.labels(*labels).observe(ttft)
        if (tpot := timeline.tpot) is not None:
            self._tpot.labels(*labels).observe(tpot)
        for stage, start, end in timeline.stages():
            self._of_stage[stage].observe(end - start)
        self._tokens.labels("input").inc(timeline.num_prompt_tokens)
        self._tokens.labels("output").inc(timeline.num_output_tokens)
        self._tokens.labels("cached").inc(timeline.num_cached_tokens)
        self._replays.inc(timeline.num_attempts - 1)
        if timeline.forecast is not None and timeline.num_attempts == 1:
            self._compare("ttft", timeline.forecast.ttft_ms / 1e3, timeline.ttft)
            self._compare("tpot", timeline.forecast.tpot_ms / 1e3, timeline.tpot)
        if timeline.outcome is not Outcome.ABORTED:  # what it would have met, nobody knows
            self._judge(timeline)

    def _compare(self, objective: str, forecast_s: float, measured_s: float | None) -> None:
        if measured_s is None:
            return
        late = measured_s - forecast_s
        self._forecasts.labels(objective).observe(forecast_s)
        self._errors.labels(objective, "late" if late > 0 else "early").observe(abs(late))

    def _judge(self, timeline: Timeline) -> None:
        ttft, tpot = timeline.met(self._objectives)
        met = {"ttft": ttft, "tpot": tpot, "both": ttft and tpot}
        for objective, is_met in met.items():
            self._slo.labels(objective, "yes" if is_met else "no").inc()
        if met["both"]:
            self._good.inc()


class _States(Collector):
    """How things are at the time of a scrape."""

    def __init__(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch

    def describe(self) -> list[Metric]:
        return []  # what is collected is not asked for at the registration

    def collect(self) -> Iterator[Metric]:
        dispatch = self._dispatch
        requests = GaugeMetricFamily("pdserve_live_requests", "In the router", labels=["state"])
        requests.add_metric(["queued"], dispatch.num_queued)
        requests.add_metric(["placed"], dispatch.num_requests - dispatch.num_queued)
        yield requests
        workers = GaugeMetricFamily("pdserve_workers", "Workers", labels=["role", "state"])
        members = list(dispatch.members)
        found = Count((member.actual_role, member.state) for member in members)
        for role in Role:
            for state in MemberState:
                workers.add_metric([role, state], found[role, state])
        yield workers
        of = ["worker", "role"]
        running = GaugeMetricFamily("pdserve_worker_running", "Requests in its batch", labels=of)
        waiting = GaugeMetricFamily("pdserve_worker_waiting", "Requests in its queue", labels=of)
        blocks = GaugeMetricFamily(
            "pdserve_kv_blocks", "KV blocks of a worker", labels=[*of, "state"]
        )
        for member in members:
            if not member.alive:
                continue
            who = [member.ref.worker_id, member.actual_role]
            running.add_metric(who, member.running)
            waiting.add_metric(who, member.waiting)
            for name in ("free", "cached", "held"):
                blocks.add_metric([*who, name], getattr(member.blocks, name))
        yield from (running, waiting, blocks)
        history = dispatch.history
        events = CounterMetricFamily("pdserve_worker_events", "Of workers", labels=["event"])
        for kind in EventKind:
            events.add_metric([kind], history.counts[kind])
        yield events
        yield CounterMetricFamily(
            "pdserve_failovers", "Requests that a worker's end moved elsewhere", history.num_moved
        )


def around(objective_s: float) -> tuple[float, ...]:
    """Bounds from a fraction of an objective to a multiple of it; itself is one of them."""
    return tuple(float(f"{factor * objective_s:.6g}") for factor in _OF_OBJECTIVE)

"""What capacities are compared on: a workload, a pair of objectives, a number of GPUs.

A ``Cell`` is a workload that stays as it is, with Poisson arrivals. ``shifting`` has another.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .capacity import ATTAINMENT, LoadAt
from .worker_spec import WorkerSpec
from .workload import Arrival, Length, arrivals, poisson, read_trace, synthetic

OBJECTIVES = ((500.0, 30.0), (200.0, 15.0), (200.0, 10.0), (2000.0, 100.0))
SYNTHETIC = {"chat": (512, 256), "code": (2048, 64), "summarise": (8192, 256)}
TRACES = {
    "azure-code": "AzureLLMInferenceTrace_code.csv.gz",
    "azure-conv": "AzureLLMInferenceTrace_conv.csv.gz",
    "mooncake": "mooncake_conversation_trace.jsonl.gz",
}
REQUEST_TIMES = 8  # that a run lasts, where a request takes as long as its objectives allow


class Contest(Protocol):
    """``label`` names it among all others."""

    @property
    def label(self) -> str: ...
    @property
    def gpus(self) -> int: ...
    @property
    def seed(self) -> int: ...
    def load(self, spec: WorkerSpec, traces: Path | None) -> LoadAt: ...
    def guess(self, spec: WorkerSpec, traces: Path | None) -> float:
        """About the rate that a static fleet survives; 0 where nobody survives any."""
        ...

    def smaller(self, gpus: int) -> Contest:
        """The same for another fleet."""
        ...


@dataclass(frozen=True, slots=True)
class Cell:
    """``requests`` of a run, at least."""

    workload: str
    ttft_ms: float
    tpot_ms: float
    gpus: int
    requests: int
    seed: int = 1

    @property
    def label(self) -> str:
        return f"{self.workload} {self.ttft_ms:g}/{self.tpot_ms:g} x{self.gpus}"

    def load(self, spec: WorkerSpec, traces: Path | None) -> LoadAt:
        """As long as ``REQUEST_TIMES`` requests: in a shorter run a fleet that falls behind would
        be judged by those that its queue has not reached."""
        lengths = _lengths(self.workload, traces, self.requests, self.seed)
        answer_s = statistics.fmean(row.output for row in lengths) * self.tpot_ms / 1e3
        least_s = REQUEST_TIMES * (self.ttft_ms / 1e3 + answer_s)

        def at(rate: float) -> list[Arrival]:
            count = max(self.requests, round(rate * least_s))
            timed = poisson(lengths, rate, count, self.seed)
            return arrivals(timed, self.ttft_ms, self.tpot_ms)

        return at

    def guess(self, spec: WorkerSpec, traces: Path | None) -> float:
        """A fleet that is always busy, at half of that. Where too many prompts take longer than
        they may with a worker to each of them, there is no rate."""
        lengths = _lengths(self.workload, traces, self.requests, self.seed)[: self.requests]
        cost = spec.cost.prefill
        in_time = sum(cost.ms(row.prompt) * spec.slowdown <= self.ttft_ms for row in lengths)
        if in_time < ATTAINMENT * len(lengths):
            return 0.0
        return self.gpus * busy_rate(lengths, spec) / 2

    def smaller(self, gpus: int) -> Cell:
        return Cell(self.workload, self.ttft_ms, self.tpot_ms, gpus, self.requests, self.seed)


@functools.cache
def _lengths(workload: str, traces: Path | None, count: int, seed: int) -> list[Length]:
    if workload in SYNTHETIC:
        return synthetic(*SYNTHETIC[workload], count, seed)
    assert traces is not None
    return read_trace(traces / TRACES[workload])


def busy_rate(lengths: Sequence[Length], spec: WorkerSpec) -> float:
    """Of one worker, were it always busy: from the work of a mean request."""
    cost = spec.cost
    prefill = statistics.fmean(cost.prefill.work_ms(row.prompt) for row in lengths)
    output = statistics.fmean(row.output for row in lengths)
    prompt = statistics.fmean(row.prompt for row in lengths)
    decode = output * (cost.decode.per_sequence_ms + cost.decode.per_kv_token_ms * prompt)
    return 1e3 / (prefill + 2 * decode)

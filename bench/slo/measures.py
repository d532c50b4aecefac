"""The definitions, and what they make of a run's records. Pure; nothing else computes them.

    a run's records -> those that count (due after the warm-up) -> Summary

Every report prints ``DEFINITIONS``, so that nobody has to guess what a figure means.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...core.errors import ConfigError
from .records import Record

PERCENTILES = (50, 90, 95, 99)
SLO_SCALES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
_RESAMPLES = 300
_GAP_RESAMPLES = 60  # of whole requests with all their gaps
_Z = 1.96  # two-sided 95%

Floats = npt.NDArray[np.float64]

DEFINITIONS: tuple[tuple[str, str, str], ...] = (
    ("arrival", "t_due", "when the request was to be sent: waiting in the client counts too"),
    ("TTFT", "t_1 - t_due", "to the first event with a token"),
    ("TPOT", "(t_n - t_1) / (n - 1)", "of a request, n > 1; n as the server counts"),
    ("ITL", "t_i - t_(i-1)", "all gaps of all requests in one pool; 0 within one event"),
    ("time to second token", "t_2 - t_1", "where a transfer between workers shows"),
    ("end to end", "t_n - t_due", ""),
    ("output tokens/s", "tokens received in the window / its seconds", "of all requests"),
    ("requests/s", "requests completed of those due in the window / its seconds", ""),
    ("attainment", "good / all due in the window", "failed, refused and cut ones are not good"),
    ("good", "complete, TTFT <= its objective, TPOT <= its objective", "TPOT holds for n = 1"),
    ("goodput", "good requests due in the window / its seconds", "of this run, at its rate"),
    ("capacity@A", "the highest rate whose attainment is at least A", "by search, to a tolerance"),
    ("window", "from the end of the warm-up to the last arrival's time", ""),
    ("intervals", "95%", "percentiles: bootstrap over requests; attainment: Wilson"),
)


@dataclass(frozen=True, slots=True, order=True)
class Objectives:
    """Milliseconds. A request that takes exactly so long meets them."""

    ttft_ms: float
    tpot_ms: float

    @staticmethod
    def parse(text: str) -> Objectives:
        """``200/15``: TTFT and TPOT."""
        if not re.fullmatch(r"\d+(\.\d+)?/\d+(\.\d+)?", text):
            raise ConfigError(f"--slo: found '{text}'; allowed: TTFT/TPOT in ms, such as 500/30")
        ttft_ms, tpot_ms = (float(part) for part in text.split("/"))
        if not (ttft_ms and tpot_ms):
            raise ConfigError(f"--slo: found '{text}'; allowed: more than 0 ms each")
        return Objectives(ttft_ms, tpot_ms)

    def __str__(self) -> str:
        return f"{self.ttft_ms:g}/{self.tpot_ms:g}"

    def scaled(self, factor: float) -> Objectives:
        return Objectives(self.ttft_ms * factor, self.tpot_ms * factor)

    def no_looser_than(self, other: Objectives) -> bool:
        return self.ttft_ms <= other.ttft_ms and self.tpot_ms <= other.tpot_ms


def ttft(record: Record) -> float | None:
    return None if record.first is None else record.first - record.due


def tpot(record: Record) -> float | None:
    if record.first is None or record.last is None or record.num_output < 2:
        return None
    return (record.last - record.first) / (record.num_output - 1)


def end_to_end(record: Record) -> float | None:
    return None if record.last is None else record.last - record.due


def second_token(record: Record) -> float | None:
    gaps = token_gaps(record)
    return gaps[0] if gaps else None


def token_gaps(record: Record) -> list[float]:
    """One for each token after the first; tokens of one event have none between them."""
    gaps: list[float] = []
    before: float | None = None
    for time, tokens in record.events:
        gaps += [] if before is None else [time - before]
        gaps += [0.0] * (tokens - 1)
        before = time
    return gaps


def tokens_within(record: Record, start: float, end: float) -> float:
    """Tokens that came then. Those that showed no text of their own came among the others."""
    counted = sum(tokens for _, tokens in record.events)
    inside = sum(tokens for time, tokens in record.events if start <= time < end)
    return inside * max(record.num_output, counted) / counted if counted else 0.0


def meets_ttft(record: Record, objectives: Objectives) -> bool:
    value = ttft(record)
    return record.failure is None and value is not None and 1e3 * value <= objectives.ttft_ms


def meets_tpot(record: Record, objectives: Objectives) -> bool:
    value = tpot(record)
    met = value is None or 1e3 * value <= objectives.tpot_ms
    return record.failure is None and record.first is not None and met


def good(record: Record, objectives: Objectives) -> bool:
    return meets_ttft(record, objectives) and meets_tpot(record, objectives)


@dataclass(frozen=True, slots=True)
class Attainment:
    """Shares of all requests that count, and goodput in requests a second."""

    ttft_ms: float
    tpot_ms: float
    both: float
    low: float
    high: float
    ttft_alone: float
    tpot_alone: float
    goodput: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Times in ms: for each measure its mean, and percentiles as {value, low, high}."""

    num_requests: int
    num_completed: int
    failures: dict[str, int]
    window_s: float
    requests_s: float
    output_tokens_s: float
    mean_input: float
    mean_output: float
    times_ms: dict[str, dict[str, Any]]
    attainment: list[Attainment]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(
    records: Sequence[Record],
    window: tuple[float, float],
    objectives: Sequence[Objectives],
    *,
    seed: int = 0,
) -> Summary:
    """``window``: from the end of the warm-up to the end of the arrivals, seconds."""
    start, end = window
    length = max(end - start, 1e-9)
    counted = [record for record in records if start <= record.due < end]
    done = [record for record in counted if record.failure is None]
    tokens = sum(tokens_within(record, start, end) for record in records)
    causes = Counter(str(r.failure) for r in counted if r.failure is not None)
    return Summary(
        num_requests=len(counted),
        num_completed=len(done),
        failures=dict(sorted(causes.items())),
        window_s=length,
        requests_s=len(done) / length,
        output_tokens_s=tokens / length,
        mean_input=_mean([float(record.num_input) for record in done]),
        mean_output=_mean([float(record.num_output) for record in done]),
        times_ms=_times(done, seed),
        attainment=[attainment(counted, one, length) for one in objectives],
    )


def attainment(counted: Sequence[Record], objectives: Objectives, window_s: float) -> Attainment:
    number = len(counted)
    both = sum(good(record, objectives) for record in counted)
    low, high = wilson(both, number)
    return Attainment(
        ttft_ms=objectives.ttft_ms,
        tpot_ms=objectives.tpot_ms,
        both=both / number if number else 0.0,
        low=low,
        high=high,
        ttft_alone=sum(meets_ttft(r, objectives) for r in counted) / max(number, 1),
        tpot_alone=sum(meets_tpot(r, objectives) for r in counted) / max(number, 1),
        goodput=both / window_s,
    )


def wilson(hits: int, number: int) -> tuple[float, float]:
    """Wilson's interval of a share (Wilson 1927)."""
    if not number:
        return 0.0, 1.0
    share, square = hits / number, _Z * _Z / number
    middle = (share + square / 2) / (1 + square)
    half = _Z * math.sqrt(share * (1 - share) / number + square / (4 * number)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


_PER_REQUEST: tuple[tuple[str, Callable[[Record], float | None]], ...] = (
    ("TTFT", ttft),
    ("TPOT", tpot),
    ("second token", second_token),
    ("end to end", end_to_end),
)


def _times(done: Sequence[Record], seed: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    draw = np.random.default_rng([seed, 5])
    for name, measure in _PER_REQUEST:
        values = np.array([1e3 * v for r in done if (v := measure(r)) is not None])
        picks = _RESAMPLES if len(values) else 0
        resampled = (values[draw.integers(0, len(values), len(values))] for _ in range(picks))
        found[name] = _percentiles(values, [np.percentile(one, PERCENTILES) for one in resampled])
    gaps = [np.array(token_gaps(record)) * 1e3 for record in done]
    gaps = [one for one in gaps if len(one)]
    pooled = np.concatenate(gaps) if gaps else np.array([])
    resamples = []
    for _ in range(_GAP_RESAMPLES if gaps else 0):
        picks_of = draw.integers(0, len(gaps), len(gaps))
        whole = np.concatenate([gaps[pick] for pick in picks_of])
        resamples.append(np.percentile(whole, PERCENTILES))
    found["ITL"] = _percentiles(pooled, resamples)
    return found


def _percentiles(values: Floats, resamples: Sequence[Floats]) -> dict[str, Any]:
    if not len(values):
        return {"count": 0}
    points = np.percentile(values, PERCENTILES)
    low, high = np.percentile(np.array(resamples), [2.5, 97.5], axis=0)
    shown: dict[str, Any] = {
        f"p{percent}": {"value": float(point), "low": float(lo), "high": float(hi)}
        for percent, point, lo, hi in zip(PERCENTILES, points, low, high, strict=True)
    }
    return {"count": len(values), "mean": float(np.mean(values)), **shown}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0

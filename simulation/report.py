"""What one simulated run comes to, in figures and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .run import Outcome

_QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Report:
    """``ttft_ms`` and ``tpot_ms`` at 50, 90 and 99% of the requests that were served;
    ``forecast_error`` is the median of |forecast / TTFT - 1|; of the workers' time ``prefill`` is
    the share of steps with chunks, ``decode`` of the others."""

    policy: str
    requests: int
    attainment: float
    goodput: float
    refused: float
    ttft_ms: tuple[float, ...]
    tpot_ms: tuple[float, ...]
    forecast_error: float | None
    prefill: float
    decode: float
    cached: float  # share of the prompts' tokens that a prefix cache had
    capacity: float | None = None  # requests a second at 90%


def report(policy: str, outcome: Outcome, capacity: float | None = None) -> Report:
    served = [one for one in outcome.served if not one.refused]
    errors = [
        abs(one.ttft_forecast_ms / one.ttft_ms - 1.0)
        for one in served
        if one.ttft_forecast_ms is not None and one.ttft_ms > 0
    ]
    number = max(1, len(outcome.served))
    time = max(1e-9, outcome.end_s) * len(outcome.usage)
    prompt_tokens = sum(one.arrival.prompt for one in served)
    return Report(
        policy=policy,
        requests=len(outcome.served),
        attainment=outcome.attainment,
        goodput=outcome.goodput,
        refused=(len(outcome.served) - len(served)) / number,
        ttft_ms=_quantiles([one.ttft_ms for one in served]),
        tpot_ms=_quantiles([one.tpot_ms for one in served]),
        forecast_error=_quantiles(errors)[0] if errors else None,
        prefill=sum(usage.prefill_s for usage in outcome.usage) / time,
        decode=sum(usage.decode_s for usage in outcome.usage) / time,
        cached=sum(one.num_cached_tokens for one in served) / max(1, prompt_tokens),
        capacity=capacity,
    )


def _quantiles(values: Sequence[float]) -> tuple[float, ...]:
    ordered = sorted(values)
    if not ordered:
        return tuple(0.0 for _ in _QUANTILES)
    return tuple(ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in _QUANTILES)


def table(reports: Sequence[Report]) -> str:
    head = (
        "policy",
        "good",
        "good/s",
        "refused",
        "TTFT ms 50/90/99%",
        "TPOT ms 50/90/99%",
        "GPU prefill+decode",
        "cached",
        "forecast off by",
        "capacity/s",
    )
    rows = [head] + [
        (
            one.policy,
            f"{one.attainment:.1%}",
            f"{one.goodput:.2f}",
            f"{one.refused:.1%}",
            "/".join(f"{value:.0f}" for value in one.ttft_ms),
            "/".join(f"{value:.1f}" for value in one.tpot_ms),
            f"{one.prefill:.0%}+{one.decode:.0%}",
            f"{one.cached:.0%}",
            "-" if one.forecast_error is None else f"{one.forecast_error:.0%}",
            "-" if one.capacity is None else f"{one.capacity:.2f}",
        )
        for one in reports
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )

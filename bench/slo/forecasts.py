"""How far a server's own forecasts were from what came: of each request what the router expected
when it placed it, beside what its timeline says at the end. Errors are shares of what came."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from .records import Record

_OBJECTIVES = ("ttft", "tpot")


def forecast_errors(records: Iterable[Record]) -> dict[str, dict[str, float]]:
    """By objective; none that was never forecast. ``bias`` is the median of forecast / measured
    less 1: above 0 the router expected more. A request that was placed anew is left out."""
    ratios: dict[str, list[float]] = {}
    for record in records:
        timeline = record.server
        forecast = timeline.get("forecast") if timeline is not None else None
        if timeline is None or forecast is None:
            continue
        if record.failure is not None or timeline["attempts"] != 1:
            continue
        for objective in _OBJECTIVES:
            measured = timeline[f"{objective}_ms"]
            if measured:
                ratio = forecast[f"{objective}_ms"] / measured - 1.0
                ratios.setdefault(objective, []).append(ratio)
    return {objective: _errors(found) for objective, found in ratios.items()}


def lines(errors: dict[str, dict[str, float]]) -> list[str]:
    """Markdown."""
    if not errors:
        return []
    heads = ("requests", "median", "p95", "bias")
    found = [f"| error of the router's forecast | {' | '.join(heads)} |", "|---" * 5 + "|"]
    for objective, one in errors.items():
        shares = [f"{100 * one[name]:.1f}%" for name in heads[1:]]
        found.append(f"| {objective.upper()} | {one['requests']:.0f} | {' | '.join(shares)} |")
    return [*found, ""]


def _errors(ratios: list[float]) -> dict[str, float]:
    sizes = sorted(abs(ratio) for ratio in ratios)
    return {
        "requests": len(sizes),
        "median": statistics.median(sizes),
        "p95": sizes[min(len(sizes) - 1, len(sizes) * 95 // 100)],
        "bias": statistics.median(ratios),
    }

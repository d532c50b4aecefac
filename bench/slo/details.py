"""The part of a report that looks closely: at one run of each server and workload.

It is the fastest valid run that was not given up: its percentiles with their intervals, how
attainment depends on the scale of the objectives, where the server spent the time, and how far
its router's forecasts were from what came.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import forecasts
from .measures import PERCENTILES


def lines(report: dict[str, Any]) -> list[str]:
    """Markdown."""
    chosen = [(cell, run) for cell in report["cells"] if (run := _chosen(cell)) is not None]
    if not chosen:
        return []
    found = [
        "## A closer look",
        "",
        "The fastest valid run of each, 95% intervals in brackets.",
        "",
    ]
    for cell, run in chosen:
        found += [f"### {cell['server']}, {cell['workload']}, {_pace(run['load'])}", ""]
        found += _percentiles(run["summary"]["times_ms"])
        found += _scales(run["slo_scale"], report["objectives"], run["told"])
        found += _stages(run["stages_ms"])
        found += forecasts.lines(run["forecast_errors"])
    return found


def _chosen(cell: dict[str, Any]) -> dict[str, Any] | None:
    runs = [run for run in cell["runs"] if run["valid"] and run["gave_up"] is None]
    return max(runs, key=lambda run: run["load"]["rate"] or 0, default=None)


def _pace(load: dict[str, Any]) -> str:
    if load["concurrency"] is not None:
        return f"{load['concurrency']} at once"
    return f"{load['rate']:.3g}/s" if load["rate"] is not None else "at the trace's times"


def _percentiles(times: dict[str, Any]) -> list[str]:
    names = [f"p{percent}" for percent in PERCENTILES]
    found = [f"| ms | count | mean | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    for measure, values in times.items():
        if values["count"]:
            cells = [_interval(values[name]) for name in names]
            row = [measure, str(values["count"]), f"{values['mean']:.3g}", *cells]
            found.append(f"| {' | '.join(row)} |")
    return [*found, ""]


def _interval(value: dict[str, float]) -> str:
    return f"{value['value']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"


def _scales(
    scales: Sequence[dict[str, Any]], objectives: Sequence[str], told: str | None
) -> list[str]:
    heads = [f"x {one['scale']:g}" for one in scales]
    found = [f"| both met, objectives | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for name in objectives:
        if told in (None, name):
            shares = [f"{100 * one[name]:.0f}%" for one in scales]
            found.append(f"| {name} | {' | '.join(shares)} |")
    return [*found, ""]


def _stages(stages: dict[str, float]) -> list[str]:
    if not stages:
        return []
    parts = [f"{stage} {median:.3g}" for stage, median in stages.items()]
    return [f"Medians of the server's stages, ms: {', '.join(parts)}.", ""]

"""The report of a folder's runs: one JSON document, and the same as a Markdown table.

Runs are gathered into *cells* (a server under a workload); each cell has its runs by rate,
and where its plan was a search, the capacity for each pair of objectives.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import details, verdict
from .folder import Folder
from .forecasts import forecast_errors
from .greedy import differences
from .measures import DEFINITIONS, SLO_SCALES, Objectives, attainment
from .runs import Run
from .search import Capacity, Settings, bracket
from .stairs import Ends, between, ends, following

SCHEMA = "pdserve.bench.report/1"
DEFAULT_OBJECTIVES = (Objectives(500, 30), Objectives(200, 15), Objectives(200, 10))


@dataclass(frozen=True, slots=True)
class Cell:
    server: str
    workload: str
    num_gpus: int
    runs: tuple[Run, ...]

    @property
    def rounds(self) -> list[int]:
        return sorted({run.round for run in self.runs})

    def points(self, objectives: Objectives, round_number: int) -> dict[float, float]:
        """Attainment by rate, of the valid runs of a round that can tell. Of several at one
        rate the last counts."""
        found = {}
        for run in self.runs:
            if run.round == round_number and run.load.rate is not None and run.fault is None:
                share = run.attained(objectives)
                if share is not None:
                    found[run.load.rate] = share
        return found

    def floor(self, objectives: Objectives, round_number: int, target: float) -> float | None:
        """The highest rate that met them while the server was told of tighter ones: where it
        is told the truth it can do no worse, so a bound and no answer."""
        met = [
            run.load.rate
            for run in self.runs
            if run.round == round_number and run.load.rate is not None and run.fault is None
            if run.told is not None and run.told.no_looser_than(objectives)
            if run.gave_up is None and attainment(run.counted(), objectives, 1.0).both >= target
        ]
        return max(met, default=None)

    def capacities(self, objectives: Objectives, settings: Settings) -> list[Capacity]:
        """One for each round."""
        return [bracket(self.points(objectives, one), settings) for one in self.rounds]


def cells(runs: Sequence[Run]) -> list[Cell]:
    """In the order of their first runs."""
    grouped: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        grouped.setdefault((run.server.name, run.load.workload), []).append(run)
    return [
        Cell(server, workload, found[0].server.num_gpus, tuple(found))
        for (server, workload), found in grouped.items()
    ]


def settings_of(plan: dict[str, Any], workload: str) -> Settings | None:
    """The search's settings, None where the plan was none."""
    found = plan.get("search")
    if found is None:
        return None
    start = plan.get("starts", {}).get(workload, 1.0)
    return Settings(start=start, **found)


def build(folder: Folder) -> dict[str, Any]:
    """The whole report as JSON."""
    runs, plan = folder.runs(), folder.plan()
    objectives = [Objectives.parse(text) for text in plan.get("slos", [])]
    objectives = objectives or list(DEFAULT_OBJECTIVES)
    answers = folder.answers()
    return {
        "schema": SCHEMA,
        "created": time.time(),
        "definitions": [
            {"name": name, "formula": formula, "note": note} for name, formula, note in DEFINITIONS
        ],
        "plan": plan,
        "objectives": [str(one) for one in objectives],
        "greedy": {
            "servers": list(answers),
            "differences": [one.as_json() for one in differences(answers)] if answers else [],
        },
        "cells": [_cell(cell, objectives, plan) for cell in cells(runs)],
    }


def _cell(cell: Cell, objectives: Sequence[Objectives], plan: dict[str, Any]) -> dict[str, Any]:
    settings = settings_of(plan, cell.workload)
    found: dict[str, Any] = {
        "server": cell.server,
        "workload": cell.workload,
        "num_gpus": cell.num_gpus,
        "runs": [_run(run, objectives) for run in cell.runs],
    }
    levels = plan.get("levels", {}).get(cell.workload)
    if levels:
        target = plan["staircase"]["target"]
        found["capacity"] = [_interpolated(cell, one, levels, target) for one in objectives]
    elif settings is not None:
        found["capacity"] = [_capacity(cell, one, settings, settings.target) for one in objectives]
    return found


def _capacity(
    cell: Cell, objectives: Objectives, settings: Settings, target: float
) -> dict[str, Any]:
    """The median of the rounds, which is "not met" where most of them were."""
    rounds = cell.capacities(objectives, settings)
    rates = [one.met if one.met is not None else 0.0 for one in rounds]
    median = statistics.median(rates) if rates else 0.0
    words = rounds[0].words if len(rounds) == 1 else (f"{median:.3g}" if median else "not met")
    return {
        "objectives": str(objectives),
        "target": target,
        "tolerance": settings.tolerance,
        "rate": median or None,
        "per_gpu": median / cell.num_gpus if median else None,
        "words": words,
        "finished": all(one.finished for one in rounds),
        "rounds": [asdict(one) for one in rounds],
    }


def _interpolated(
    cell: Cell, objectives: Objectives, levels: Sequence[float], target: float
) -> dict[str, Any]:
    """Of staircases: the median of the rounds, and each round's two ends with their shares."""
    rates, finished, rounds = [], [], []
    for one in cell.rounds:
        points = cell.points(objectives, one)
        found = ends(points, target)
        floor = cell.floor(objectives, one, target)
        if not points and floor is not None:
            found = Ends(floor, None)
        rates.append(between(points, target) or found.met or 0.0)
        finished.append(bool(points) and not following(points, levels, target, None))
        rounds.append(asdict(found) | {"shares": _shares(cell, objectives, one, found)})
    median = statistics.median(rates)
    words = f"{median:.3g}" if median else f"not met at {min(levels):g}" if all(finished) else "?"
    return {
        "objectives": str(objectives),
        "target": target,
        "tolerance": None,
        "rate": median or None,
        "per_gpu": median / cell.num_gpus if median else None,
        "words": words,
        "finished": all(finished),
        "rounds": rounds,
    }


def _shares(
    cell: Cell, objectives: Objectives, round_number: int, found: Ends
) -> dict[str, list[float]]:
    """Attainment at the two ends, with its interval: value, low, high."""
    shown = {}
    for run in cell.runs:
        if run.round != round_number or run.fault is not None:
            continue
        exact = run.told is None or run.told == objectives
        tells = run.told is None or run.told.no_looser_than(objectives)
        for name, rate in (("met", found.met), ("missed", found.missed)):
            if (
                tells
                and rate is not None
                and rate == run.load.rate
                and (exact or name not in shown)
            ):
                share = attainment(run.counted(), objectives, 1.0)
                shown[name] = [share.both, share.low, share.high]
    return shown


def _run(run: Run, objectives: Sequence[Objectives]) -> dict[str, Any]:
    counted, length = run.counted(), run.window[1] - run.window[0]
    scale = [
        {
            "scale": factor,
            **{
                str(one): attainment(counted, one.scaled(factor), length).both for one in objectives
            },
        }
        for factor in SLO_SCALES
    ]
    return {
        "created": run.created,
        "round": run.round,
        "load": run.load.as_json(),
        "valid": run.fault is None,
        "fault": run.fault,
        "client": run.health.as_json(),
        "gave_up": None if run.gave_up is None else str(run.gave_up),
        "told": None if run.told is None else str(run.told),
        "summary": run.summary(objectives).as_json(),
        "slo_scale": scale if run.gave_up is None else [],
        "stages_ms": stage_medians(run),
        "forecast_errors": forecast_errors(run.counted()),
    }


def stage_medians(run: Run) -> dict[str, float]:
    """Of each stage of the server's, the median over the requests that went through it (ms);
    ``network``: the client's TTFT less what the server knows of it."""
    found: dict[str, list[float]] = {}
    for record in run.counted():
        if record.server is None or record.failure is not None:
            continue
        for stage in record.server["stages"]:
            spent = stage["end_ms"] - stage["start_ms"]
            found.setdefault(stage["stage"], []).append(spent)
        inside = record.server.get("ttft_ms")
        if inside is not None and record.first is not None:
            found.setdefault("network", []).append(1e3 * (record.first - record.due) - inside)
    return {stage: statistics.median(values) for stage, values in found.items()}


def markdown(report: dict[str, Any], peer: dict[str, Any] | None = None) -> str:
    """What a person reads: capacities side by side, then every run, then the definitions."""
    lines = ["# Benchmark report", ""]
    lines += _greedy_lines(report["greedy"])
    lines += _capacity_lines(report)
    lines += verdict.lines(report, peer)
    lines += _run_lines(report)
    lines += details.lines(report)
    lines += ["## Definitions", "", "| measure | formula | note |", "|---|---|---|"]
    lines += [f"| {d['name']} | `{d['formula']}` | {d['note']} |" for d in report["definitions"]]
    return "\n".join(lines) + "\n"


def _greedy_lines(greedy: dict[str, Any]) -> list[str]:
    if len(greedy["servers"]) < 2:
        return []
    if not greedy["differences"]:
        return [f"Greedy answers agree token for token: {', '.join(greedy['servers'])}.", ""]
    parts = [
        f"{d['one']} and {d['other']} at token {d['position']} of prompt {d['prompt']}"
        for d in greedy["differences"]
    ]
    return [f"**Greedy answers differ**: {'; '.join(parts)}.", ""]


def _capacity_lines(report: dict[str, Any]) -> list[str]:
    found = [cell for cell in report["cells"] if "capacity" in cell]
    if not found:
        return []
    first = found[0]["capacity"][0]
    servers = list(dict.fromkeys(cell["server"] for cell in found))
    by_key = {(cell["server"], cell["workload"]): cell for cell in found}
    lines = [
        f"## Capacity@{100 * first['target']:.0f}, requests/s per GPU",
        "",
        f"The highest rate at which {100 * first['target']:.0f}% of all requests meet both "
        f"objectives, {_exactness(first)}. Per GPU (or worker, on CPUs): "
        + ", ".join(f"{cell['server']} on {cell['num_gpus']}" for cell in _firsts(found))
        + ".",
        "",
        f"| workload | TTFT/TPOT ms | {' | '.join(servers)} |",
        "|---|---|" + "---|" * len(servers),
    ]
    for workload in dict.fromkeys(cell["workload"] for cell in found):
        for index, objectives in enumerate(report["objectives"]):
            row = [_capacity_words(by_key.get((s, workload)), index) for s in servers]
            lines.append(f"| {workload} | {objectives} | {' | '.join(row)} |")
    return [*lines, "", *_end_lines(found)]


def _exactness(capacity: dict[str, Any]) -> str:
    if capacity["tolerance"] is not None:
        return f"to {100 * capacity['tolerance']:.0f}%"
    return "interpolated between the level that met and the next, which missed"


def _end_lines(found: Sequence[dict[str, Any]]) -> list[str]:
    """Of staircases: what was measured at the levels that the answer lies between."""
    if found[0]["capacity"][0]["tolerance"] is not None:
        return []
    lines = [
        "Measured, rates of all GPUs together, Wilson's 95% intervals in brackets:",
        "",
        "| workload | TTFT/TPOT ms | server | met at | missed at |",
        "|---|---|---|---|---|",
    ]
    for cell in found:
        for capacity in cell["capacity"]:
            for one in capacity["rounds"]:
                sides = [_end(one[name], one["shares"].get(name)) for name in ("met", "missed")]
                names = f"{cell['workload']} | {capacity['objectives']} | {cell['server']}"
                lines.append(f"| {names} | {' | '.join(sides)} |")
    return [*lines, ""]


def _end(rate: float | None, share: Sequence[float] | None) -> str:
    if rate is None or share is None:
        return "-"
    value, low, high = (100 * one for one in share)
    return f"{rate:.3g}: {value:.0f}% ({low:.0f} to {high:.0f})"


def _firsts(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({cell["server"]: cell for cell in reversed(found)}.values())[::-1]


def _capacity_words(cell: dict[str, Any] | None, index: int) -> str:
    if cell is None:
        return "-"
    capacity = cell["capacity"][index]
    if capacity["per_gpu"] is None:
        return str(capacity["words"])
    words = f"{capacity['per_gpu']:.3g}"
    open_end = capacity["rounds"][0]["missed"] is None
    return (f">= {words}" if open_end else words) + (
        "" if capacity["finished"] else " (unfinished)"
    )


def _run_lines(report: dict[str, Any]) -> list[str]:
    lines = ["## Runs", ""]
    names = report["objectives"]
    lines.append(
        "| server | workload | load | requests | failed | req/s | out tok/s | TTFT p50 / p99 ms "
        f"| TPOT p50 / p99 ms | ITL p99 ms | {' | '.join(names)} | client |"
    )
    lines.append("|---" * (11 + len(names)) + "|")
    for cell in report["cells"]:
        for run in cell["runs"]:
            lines.append(_run_row(cell, run, names))
    return [*lines, "", *_failure_lines(report)]


def _share(run: dict[str, Any], found: dict[str, Any], name: str) -> str:
    if run["told"] not in (None, name):
        return "-"  # the server was told of others
    return f"{100 * found['both']:.0f}%" if run["gave_up"] is None else "given up"


def _run_row(cell: dict[str, Any], run: dict[str, Any], names: Sequence[str]) -> str:
    summary, load = run["summary"], run["load"]
    times = summary["times_ms"]
    shares = [
        _share(run, one, name) for one, name in zip(summary["attainment"], names, strict=True)
    ]
    pace = (
        f"{load['concurrency']} at once"
        if load["concurrency"] is not None
        else f"{load['rate']:.3g}/s"
        if load["rate"] is not None
        else f"trace x {load['time_scale']:g}"
    )
    failed = ", ".join(f"{count} {cause}" for cause, count in summary["failures"].items())
    columns = [
        cell["server"],
        cell["workload"],
        pace,
        str(summary["num_requests"]),
        failed or "0",
        f"{summary['requests_s']:.3g}",
        f"{summary['output_tokens_s']:.4g}",
        f"{_at(times, 'TTFT', 'p50')} / {_at(times, 'TTFT', 'p99')}",
        f"{_at(times, 'TPOT', 'p50')} / {_at(times, 'TPOT', 'p99')}",
        _at(times, "ITL", "p99"),
        *shares,
        "ok" if run["valid"] else f"INVALID: {run['fault']}",
    ]
    return f"| {' | '.join(columns)} |"


def _at(times: dict[str, Any], name: str, percentile: str) -> str:
    found = times[name].get(percentile)
    return "-" if found is None else f"{found['value']:.3g}"


def _failure_lines(report: dict[str, Any]) -> list[str]:
    invalid = [run for cell in report["cells"] for run in cell["runs"] if not run["valid"]]
    if not invalid:
        return []
    return [
        f"{len(invalid)} of these runs are invalid: their client lagged. They count nowhere.",
        "",
    ]


def write(folder: Folder, peer: dict[str, Any] | None = None) -> dict[str, Any]:
    """report.json and report.md; returns the report. ``peer``: see verdict.py."""
    report = build(folder)
    report |= {"ratios": verdict.ratios(report), "peer": peer}
    (folder.path / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder.path / "report.md").write_text(markdown(report, peer))
    return report

"""The pictures of a report, as PNG files. Wants matplotlib: the extra ``pdserve[bench]``.

Where one run of each server stands for its workload, it is the fastest that was valid and
still met the loosest objectives; where none did, the slowest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .measures import SLO_SCALES, Objectives, attainment, tokens_within, tpot, ttft
from .records import Record
from .report import Cell, cells
from .runs import Run

_COLOURS = ("#0b6fb8", "#d1495b", "#2a9d6f", "#e0a100", "#7a4fa3", "#4a4a4a")
_STAGES = ("tokenize", "queue", "prefill_queue", "prefill", "hand_over", "decode_queue")
_STAGE_COLOURS = ("#b8c4cc", "#e0a100", "#f3cf6d", "#0b6fb8", "#d1495b", "#7a4fa3")
_WIDTH, _HEIGHT = 4.3, 3.1  # inches of one panel
_BINS = 24  # of time
_DPI = 130


@dataclass(frozen=True, slots=True)
class Picture:
    name: str
    title: str
    figure: Figure


def draw(runs: Sequence[Run], objectives: Sequence[Objectives], target: float) -> list[Picture]:
    """Those for which the runs have something to show."""
    found = cells([run for run in runs if run.fault is None])
    if not found:
        return []
    sheet = _Sheet(found, list(objectives), target)
    pictures = [
        Picture("attainment", "Attainment against rate", sheet.attainment())
        if sheet.has_rates
        else None,
        Picture("slo-scale", "Attainment against the scale of the objectives", sheet.slo_scale()),
        Picture("distributions", "How TTFT and TPOT are spread", sheet.distributions()),
        Picture("stages", "Where the time before the stream goes", sheet.stages())
        if sheet.has_stages
        else None,
        Picture("pareto", "TTFT against throughput", sheet.pareto()) if sheet.has_rates else None,
    ]
    return [picture for picture in pictures if picture is not None]


def save(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    paths = []
    for picture in pictures:
        path = folder / f"{picture.name}.png"
        picture.figure.savefig(path, dpi=_DPI)
        paths.append(path)
    return paths


class _Sheet:
    def __init__(self, found: Sequence[Cell], objectives: list[Objectives], target: float) -> None:
        self._cells = found
        self._objectives = objectives
        self._target = target
        self._workloads = list(dict.fromkeys(cell.workload for cell in found))
        servers = dict.fromkeys(cell.server for cell in found)
        self._colour = {s: _COLOURS[i % len(_COLOURS)] for i, s in enumerate(servers)}
        self._shown = {(c.server, c.workload): _representative(c, objectives) for c in found}

    @property
    def has_rates(self) -> bool:
        return any(len({run.load.rate for run in cell.runs}) > 1 for cell in self._cells)

    @property
    def has_stages(self) -> bool:
        return any(r.server is not None for run in self._shown.values() for r in run.records)

    def attainment(self) -> Figure:
        """A row for each workload, a column for each pair of objectives."""
        figure, axes = _panels(len(self._workloads), len(self._objectives))
        for row, workload in enumerate(self._workloads):
            for column, objectives in enumerate(self._objectives):
                axis = axes[row][column]
                axis.axhline(100 * self._target, color="#888888", lw=0.8, ls="--")
                for cell in self._of(workload):
                    points = sorted(_points(cell, objectives).items())
                    if points:
                        axis.plot(
                            [rate / cell.num_gpus for rate, _ in points],
                            [100 * share for _, share in points],
                            marker="o",
                            ms=3.5,
                            lw=1.4,
                            color=self._colour[cell.server],
                            label=cell.server,
                        )
                    hopeless = _given_up(cell, objectives)
                    colour = self._colour[cell.server]
                    at = [rate / cell.num_gpus for rate in hopeless]
                    axis.plot(at, [0.0] * len(at), ls="", marker="x", ms=5, color=colour)
                axis.set_title(f"{workload}, {objectives} ms", fontsize=9)
                axis.set_ylim(-3, 103)
                axis.set_xlim(left=0)
                _label(axis, "requests/s per GPU (x: given up)", "both met, %")
        return _done(figure, axes)

    def slo_scale(self) -> Figure:
        """Of the shown runs: how much looser, or tighter, would the objectives be met?"""
        figure, axes = _panels(len(self._workloads), len(self._objectives))
        for row, workload in enumerate(self._workloads):
            for column, objectives in enumerate(self._objectives):
                axis = axes[row][column]
                axis.axvline(1, color="#888888", lw=0.8, ls=":")
                axis.axhline(100 * self._target, color="#888888", lw=0.8, ls="--")
                for server, run in self._runs_of(workload):
                    counted = run.counted()
                    shares = [
                        100 * attainment(counted, objectives.scaled(scale), 1.0).both
                        for scale in SLO_SCALES
                    ]
                    axis.plot(
                        SLO_SCALES,
                        shares,
                        marker="o",
                        ms=3.5,
                        lw=1.4,
                        color=self._colour[server],
                        label=_named(server, run),
                    )
                axis.set_xscale("log")
                ticks = [0.25, 0.5, 1, 2, 4]
                axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
                axis.minorticks_off()
                axis.set_ylim(-3, 103)
                axis.set_title(f"{workload}, {objectives} ms", fontsize=9)
                _label(axis, "objectives times", "both met, %")
        return _done(figure, axes)

    def distributions(self) -> Figure:
        figure, axes = _panels(len(self._workloads), 2)
        measures: list[tuple[str, Callable[[Record], float | None], Callable[[Objectives], float]]]
        measures = [
            ("TTFT", ttft, lambda one: one.ttft_ms),
            ("TPOT", tpot, lambda one: one.tpot_ms),
        ]
        for row, workload in enumerate(self._workloads):
            for column, (name, measure, limit) in enumerate(measures):
                axis = axes[row][column]
                for objective in sorted({limit(one) for one in self._objectives}):
                    axis.axvline(objective, color="#888888", lw=0.8, ls=":")
                for server, run in self._runs_of(workload):
                    done = [record for record in run.counted() if record.failure is None]
                    values = sorted(1e3 * v for r in done if (v := measure(r)) is not None)
                    if values:
                        shares = 100 * np.arange(1, len(values) + 1) / len(values)
                        axis.step(
                            values,
                            shares,
                            where="post",
                            lw=1.4,
                            color=self._colour[server],
                            label=_named(server, run),
                        )
                _logarithmic(axis, "x")
                axis.set_ylim(0, 101)
                axis.set_title(f"{workload}: {name}", fontsize=9)
                _label(axis, f"{name}, ms (dotted: the objectives)", "requests below, %")
        return _done(figure, axes)

    def stages(self) -> Figure:
        """Means over short spans of arrivals, one upon the other."""
        servers = list(self._colour)
        figure, axes = _panels(len(self._workloads), len(servers))
        for row, workload in enumerate(self._workloads):
            top = 0.0
            shown = dict(self._runs_of(workload))
            for column, server in enumerate(servers):
                axis = axes[row][column]
                if server in shown:
                    middles, means = _stage_means(shown[server])
                    axis.stackplot(
                        middles, means, labels=_STAGES, colors=_STAGE_COLOURS, linewidth=0
                    )
                    top = max(top, float(means.sum(axis=0).max(initial=0.0)))
                    axis.set_title(f"{workload}: {_named(server, shown[server])}", fontsize=9)
                _label(axis, "arrival, s", "mean of each stage, ms")
            for axis in axes[row]:
                axis.set_ylim(0, 1.05 * top or 1)
        return _done(figure, axes)

    def pareto(self) -> Figure:
        """Along each line the rate grows: down and to the right is better."""
        figure, axes = _panels(1, len(self._workloads))
        for column, workload in enumerate(self._workloads):
            axis = axes[0][column]
            for cell in self._of(workload):
                points = [point for run in cell.runs if (point := _pareto_point(run)) is not None]
                points.sort()
                if points:
                    axis.plot(
                        [tokens / cell.num_gpus for _, tokens, _ in points],
                        [late for _, _, late in points],
                        marker="o",
                        ms=3.5,
                        lw=1.4,
                        color=self._colour[cell.server],
                        label=cell.server,
                    )
            _logarithmic(axis, "y")
            axis.set_title(workload, fontsize=9)
            _label(axis, "output tokens/s per GPU", "TTFT p90, ms")
        return _done(figure, axes)

    def _of(self, workload: str) -> list[Cell]:
        return [cell for cell in self._cells if cell.workload == workload]

    def _runs_of(self, workload: str) -> list[tuple[str, Run]]:
        return [(cell.server, self._shown[cell.server, workload]) for cell in self._of(workload)]


def _representative(cell: Cell, objectives: Sequence[Objectives]) -> Run:
    whole = [run for run in cell.runs if run.gave_up is None] or list(cell.runs)
    loosest = max(objectives)
    whole = [run for run in whole if run.told in (None, loosest)] or whole
    met = [run for run in whole if (run.attained(loosest) or 0) >= 0.9]
    return max(met, key=_pace) if met else min(whole, key=_pace)


def _pace(run: Run) -> float:
    return run.load.rate or run.load.concurrency or 0


def _points(cell: Cell, objectives: Objectives) -> dict[float, float]:
    """Of all rounds together; runs that were given up have no share to show."""
    found: dict[float, list[float]] = {}
    for run in cell.runs:
        if run.load.rate is not None and run.gave_up is None and run.fault is None:
            share = run.attained(objectives)
            if share is not None:
                found.setdefault(run.load.rate, []).append(share)
    return {rate: float(np.mean(shares)) for rate, shares in found.items()}


def _given_up(cell: Cell, objectives: Objectives) -> list[float]:
    """The rates at which these objectives were out of reach."""
    return [
        run.load.rate
        for run in cell.runs
        if run.load.rate is not None and run.gave_up is not None and run.attained(objectives) == 0
    ]


def _pareto_point(run: Run) -> tuple[float, float, float] | None:
    """(pace, output tokens/s, TTFT p90 in ms)."""
    values = [1e3 * v for r in run.counted() if r.failure is None and (v := ttft(r)) is not None]
    if run.gave_up is not None or not values:
        return None
    start, end = run.window
    tokens = sum(tokens_within(record, start, end) for record in run.records)
    return _pace(run), tokens / (end - start), float(np.percentile(values, 90))


def _stage_means(run: Run) -> tuple[Any, Any]:
    """Times [T] and means [stages, T] in ms, over spans that have requests."""
    records = [record for record in run.records if record.server is not None]
    edges = np.linspace(0, max((r.due for r in records), default=1.0) + 1e-6, _BINS + 1)
    middles, means = [], []
    for low, high in pairwise(edges.tolist()):
        inside = [record for record in records if low <= record.due < high]
        if inside:
            middles.append((low + high) / 2)
            means.append([_mean_stage(inside, stage) for stage in _STAGES])
    return np.array(middles), np.array(means).reshape(-1, len(_STAGES)).T


def _mean_stage(records: Sequence[Record], stage: str) -> float:
    spent = sum(
        one["end_ms"] - one["start_ms"]
        for record in records
        if record.server is not None
        for one in record.server["stages"]
        if one["stage"] == stage
    )
    return float(spent / len(records))


def _named(server: str, run: Run) -> str:
    if run.load.concurrency is not None:
        return f"{server}, {run.load.concurrency} at once"
    return f"{server}, {run.load.rate:.3g}/s" if run.load.rate is not None else server


def _panels(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(
        figsize=(max(_WIDTH * columns, 6.0), _HEIGHT * rows + 0.45), layout="constrained"
    )
    made = figure.subplots(rows, columns, squeeze=False)
    return figure, [list(row) for row in made]


def _logarithmic(axis: Axes, which: Literal["x", "y"]) -> None:
    """With plain numbers at 1, 2 and 5."""
    axis.set(**{f"{which}scale": "log"})
    ticks = axis.xaxis if which == "x" else axis.yaxis
    ticks.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_formatter(NullFormatter())


def _label(axis: Axes, below: str, beside: str) -> None:
    axis.set_xlabel(below, fontsize=8)
    axis.set_ylabel(beside, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(color="#e4e4e4", lw=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _done(figure: Figure, axes: list[list[Axes]]) -> Figure:
    """A legend in each panel where labels differ from panel to panel, else one for all."""
    found = [axis.get_legend_handles_labels() for row in axes for axis in row]
    labels = {tuple(labels) for _, labels in found if labels}
    if len(labels) == 1:
        handles, names = next((h, n) for h, n in found if n)
        figure.legend(
            handles, names, loc="outside upper center", ncols=6, fontsize=8, frameon=False
        )
        return figure
    for row in axes:
        for axis in row:
            if axis.get_legend_handles_labels()[1]:
                axis.legend(fontsize=7, frameon=False)
    return figure

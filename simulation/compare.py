"""Adaptive against static policies, cell by cell: the table of ``docs/simulation.md``.

In each cell, the static policies are colocated serving at several chunk sizes and every split of
the fleet; their capacity is that of the best one. All see the same arrivals. Static policies
run twice: as the field runs them, and with our own admission and demotion.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .capacity import Capacity, ratio_interval
from .contest import Cell
from .fleets import Kind
from .search import Search
from .worker_spec import WorkerSpec


@dataclass(frozen=True, slots=True)
class Row:
    """Requests a second at 90%, of adaptive and of the best static policy of each kind, as the
    field runs it and (``ours``) with our admission and demotion. The intervals are those of the
    ratios, at 90%."""

    cell: Cell
    adaptive: float
    colocated: float
    split: float
    ours: float | None  # None where it was not run
    best: str
    best_ours: str
    interval: tuple[float, float] | None
    interval_ours: tuple[float, float] | None
    runs: int
    moves: int = 0  # of workers between roles, where adaptive serves ``adaptive``

    @property
    def static(self) -> float:
        return max(self.colocated, self.split)

    @property
    def met(self) -> bool:
        """Whether any policy meets it at any rate."""
        return max(self.adaptive, self.static, self.ours or 0.0) > 0

    @property
    def ratio(self) -> float | None:
        return self.adaptive / self.static if self.static else None

    @property
    def ratio_ours(self) -> float | None:
        return self.adaptive / self.ours if self.ours else None


def searches_of(cell: Cell, *, ours: bool = True) -> list[Search]:
    kinds = [Kind.ADAPTIVE, Kind.COLOCATED, Kind.SPLIT, *([Kind.OURS] if ours else [])]
    return [Search(cell, kind) for kind in kinds]


def row_of(cell: Cell, found: Mapping[Search, Capacity]) -> Row | None:
    """None until all that is compared is known."""
    own, mixed, parted = (
        found.get(Search(cell, kind)) for kind in (Kind.ADAPTIVE, Kind.COLOCATED, Kind.SPLIT)
    )
    if own is None or mixed is None or parted is None:
        return None
    ours = found.get(Search(cell, Kind.OURS))
    static = max(mixed, parted, key=lambda one: one.rate)
    return Row(
        cell,
        own.rate,
        mixed.rate,
        parted.rate,
        ours.rate if ours else None,
        static.name,
        ours.name if ours else "",
        ratio_interval(own, static, cell.seed),
        ratio_interval(own, ours, cell.seed) if ours else None,
        sum(one.runs for one in (own, mixed, parted, ours) if one),
        own.moves,
    )


def geometric_mean(ratios: Iterable[float | None]) -> float:
    finite = [ratio for ratio in ratios if ratio]
    return math.exp(statistics.fmean(map(math.log, finite))) if finite else math.nan


def table(rows: Sequence[Row]) -> str:
    """In Markdown. Cells that no policy can meet come last, by name."""
    lines = [
        "| workload | TTFT/TPOT ms | GPUs | colocated | split | adaptive | ratio | "
        "best static with our admission | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cell = row.cell
        if not row.met:
            continue
        own = "not run" if row.ours is None else f"{row.ours:.2f} ({row.best_ours})"
        lines.append(
            f"| {cell.workload} | {cell.ttft_ms:g}/{cell.tpot_ms:g} | {cell.gpus} | "
            f"{row.colocated:.2f} | {row.split:.2f} | {row.adaptive:.2f} | "
            f"{_ratio(row.ratio, row.interval)} | "
            f"{own} | {_ratio(row.ratio_ours, row.interval_ours)} |"
        )
    for gpus in sorted({row.cell.gpus for row in rows}):
        part = [row for row in rows if row.cell.gpus == gpus and row.met]
        field = [row.ratio for row in part if row.ratio]
        own_ratios = [row.ratio_ours for row in part if row.ratio_ours]
        lines.append(
            f"\n{gpus} GPUs, {len(part)} cells: geometric mean {geometric_mean(field):.3f}, least "
            f"{min(field, default=math.nan):.3f}; against static policies with our admission "
            f"{geometric_mean(own_ratios):.3f}, least {min(own_ratios, default=math.nan):.3f}"
        )
    unmet = [row.cell.label for row in rows if not row.met]
    if unmet:
        lines.append("\nNo policy meets: " + "; ".join(unmet))
    return "\n".join(lines)


def _ratio(ratio: float | None, interval: tuple[float, float] | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio:.2f}" + (f" ({interval[0]:.2f}-{interval[1]:.2f})" if interval else "")


def as_json(rows: Sequence[Row], spec: WorkerSpec) -> dict[str, Any]:
    return {
        "spec": asdict(spec),
        "rows": [asdict(row) | {"ratio": row.ratio, "ratio_ours": row.ratio_ours} for row in rows],
    }


def progress(search: Search, found: Capacity) -> None:
    print(
        f"{search.contest.label}, {search.kind}: {found.rate:.2f} "
        f"({found.name}, {found.runs} runs)",
        file=sys.stderr,
        flush=True,
    )

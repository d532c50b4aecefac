"""Loads that shift: long prompts with short answers, then the other way round, each minute.

No division of a fleet is right for both. Each phase is judged by itself, so a policy's capacity is
that of its worst one. In each phase come as many requests as ask for the same work: the
rates stand to each other as those that a fleet which is always busy would serve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .capacity import Capacity, LoadAt, ratio_interval
from .contest import busy_rate
from .fleets import Kind
from .search import Search
from .worker_spec import WorkerSpec
from .workload import Arrival, Length, shifting, synthetic

PHASE_S = 60.0
PHASES = 6  # the first two are not judged
_KINDS = 3000  # lengths drawn of each


@dataclass(frozen=True, slots=True)
class Shift:
    """A contest (see there). ``lengths`` are the means of prompt and answer, phase by phase."""

    lengths: tuple[tuple[int, int], ...]
    ttft_ms: float
    tpot_ms: float
    gpus: int
    seed: int = 1

    @property
    def label(self) -> str:
        kinds = " <-> ".join(f"{prompt}/{output}" for prompt, output in self.lengths)
        return f"{kinds} at {self.ttft_ms:g}/{self.tpot_ms:g} x{self.gpus}"

    def load(self, spec: WorkerSpec, traces: Path | None) -> LoadAt:
        kinds = self._kinds()
        busy = [busy_rate(kind, spec) for kind in kinds]
        mean = sum(busy) / len(busy)

        def at(rate: float) -> Sequence[Arrival]:
            return shifting(
                kinds,
                [rate * part / mean for part in busy],
                self.ttft_ms,
                self.tpot_ms,
                phases=PHASES,
                phase_s=PHASE_S,
                seed=self.seed,
            )

        return at

    def guess(self, spec: WorkerSpec, traces: Path | None) -> float:
        busy = [busy_rate(kind, spec) for kind in self._kinds()]
        return 0.45 * self.gpus * sum(busy) / len(busy)

    def smaller(self, gpus: int) -> Shift:
        return replace(self, gpus=gpus)

    def _kinds(self) -> list[list[Length]]:
        return [
            synthetic(prompt, output, _KINDS, self.seed + place)
            for place, (prompt, output) in enumerate(self.lengths)
        ]


SHIFTS = (
    (((8192, 64), (256, 512)), 500.0, 30.0),
    (((4096, 64), (256, 512)), 200.0, 15.0),
)


@dataclass(frozen=True, slots=True)
class Reached:
    """Requests a second, over all phases, of which nine in ten are good in each of them."""

    rate: float
    name: str
    ratio: float | None  # adaptive's to this
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Shifted:
    shift: Shift
    planned: float  # adaptive, with the planner
    unplanned: float
    moves: int  # of workers between roles, at the rate that ``planned`` reaches
    split: Reached
    static: Reached  # the best, all mixed included, as the field runs it
    ours: Reached  # the same with our admission and demotion


def searches_of(shift: Shift) -> list[Search]:
    return [Search(shift, kind) for kind in Kind]


def row_of(shift: Shift, found: Mapping[Search, Capacity]) -> Shifted | None:
    """None until all that is compared is known."""
    if any(search not in found for search in searches_of(shift)):
        return None
    planned, unplanned, mixed, split, ours = (
        found[Search(shift, kind)]
        for kind in (Kind.ADAPTIVE, Kind.UNPLANNED, Kind.COLOCATED, Kind.SPLIT, Kind.OURS)
    )

    def reached(one: Capacity) -> Reached:
        ratio = planned.rate / one.rate if one.rate else None
        return Reached(one.rate, one.name, ratio, ratio_interval(planned, one, shift.seed))

    return Shifted(
        shift,
        planned.rate,
        unplanned.rate,
        planned.moves,
        reached(split),
        reached(max(split, mixed, key=lambda one: one.rate)),
        reached(ours),
    )


def as_json(rows: Sequence[Shifted], spec: WorkerSpec) -> dict[str, Any]:
    return {"spec": asdict(spec), "rows": [asdict(row) for row in rows]}


def line(row: Shifted) -> str:
    parts = [
        f"{row.shift.label}: adaptive with the planner {row.planned:.2f} ({row.moves} moves), "
        f"without {row.unplanned:.2f}"
    ]
    for what, one in (
        ("best split", row.split),
        ("best static", row.static),
        ("with our admission", row.ours),
    ):
        ratio = "-" if one.ratio is None else f"{one.ratio:.2f}"
        if one.interval:
            ratio += f" ({one.interval[0]:.2f}-{one.interval[1]:.2f})"
        parts.append(f"{what} {one.rate:.2f} ({one.name}): {ratio}")
    return "; ".join(parts)

"""Loads that shift: long prompts with short answers, then the other way round, each minute.

No division of a fleet is right for both. Each phase is judged by itself, so a policy's capacity is
that of its worst one. In each phase come as many requests as ask for the same work: the
rates stand to each other as those that a fleet which is always busy would serve.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..core.config import Admission
from .capacity import Capacity, LoadAt, best_of, ratio_interval
from .compare import CHUNKS, adaptive, busy_rate, colocateds, divided
from .run import Fleet
from .worker_spec import WorkerSpec
from .workload import Arrival, shifting, synthetic

PHASE_S = 60.0
PHASES = 6  # the first two are not judged
_KINDS = 3000  # lengths drawn of each


@dataclass(frozen=True, slots=True)
class Shift:
    """``lengths`` are the means of prompt and answer, phase by phase."""

    lengths: tuple[tuple[int, int], ...]
    ttft_ms: float
    tpot_ms: float
    gpus: int
    seed: int = 1

    @property
    def label(self) -> str:
        kinds = " <-> ".join(f"{prompt}/{output}" for prompt, output in self.lengths)
        return f"{kinds} at {self.ttft_ms:g}/{self.tpot_ms:g} x{self.gpus}"


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
    seconds: float


def load_of(shift: Shift, spec: WorkerSpec) -> LoadAt:
    kinds = [
        synthetic(prompt, output, _KINDS, shift.seed + place)
        for place, (prompt, output) in enumerate(shift.lengths)
    ]
    busy = [busy_rate(kind, spec) for kind in kinds]
    mean = sum(busy) / len(busy)

    def at(rate: float) -> Sequence[Arrival]:
        return shifting(
            kinds,
            [rate * part / mean for part in busy],
            shift.ttft_ms,
            shift.tpot_ms,
            phases=PHASES,
            phase_s=PHASE_S,
            seed=shift.seed,
        )

    return at


def run(shift: Shift, spec: WorkerSpec) -> Shifted:
    began = time.process_time()
    load_at = load_of(shift, spec)
    kinds = [synthetic(prompt, output, _KINDS, shift.seed) for prompt, output in shift.lengths]
    guess = shift.gpus * sum(busy_rate(kind, spec) for kind in kinds) / len(kinds)
    least = guess / 64

    def best(fleets: Sequence[Fleet], near: float) -> Capacity:
        return best_of(fleets, load_at, near, least=least, seed=shift.seed)

    planned = best([adaptive(shift.gpus, spec)], 0.7 * guess)
    unplanned = best([adaptive(shift.gpus, spec, planned=False)], planned.rate or guess)

    def reached(found: Capacity) -> Reached:
        ratio = planned.rate / found.rate if found.rate else None
        name = found.fleet.name if found.fleet else ""
        return Reached(found.rate, name, ratio, ratio_interval(planned, found, shift.seed))

    near = 0.8 * planned.rate or guess
    field, own = Admission.OPEN, Admission.SLO
    split = best(divided(shift.gpus, spec, field), near / 2)
    mixed = best(colocateds(shift.gpus, spec, field, CHUNKS), near)
    ours = best([*colocateds(shift.gpus, spec, own, CHUNKS), *divided(shift.gpus, spec, own)], near)
    return Shifted(
        shift,
        planned.rate,
        unplanned.rate,
        planned.moves,
        reached(split),
        reached(max(split, mixed, key=lambda found: found.rate)),
        reached(ours),
        time.process_time() - began,
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

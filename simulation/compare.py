"""Adaptive against static policies, cell by cell: the table of ``docs/simulation.md``.

A cell is a workload, a pair of objectives and a number of GPUs. In each, the static policies
are colocated serving at several chunk sizes and every split of the fleet; their capacity is
that of the best one. All see the same arrivals. Static policies run twice: as the field runs
them (everybody is let in, prompts in the order of their coming), and with our own admission
and demotion.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ..core.config import Admission, Policy
from ..core.cost import StepCost
from ..core.errors import ConfigError
from ..core.ids import Role
from .capacity import ATTAINMENT, STEP, Capacity, LoadAt, best_of, ratio_interval
from .costs import EIGHT_B_ON_H200
from .run import Fleet
from .worker_spec import WorkerSpec
from .workload import Arrival, Length, arrivals, poisson, read_trace, synthetic

CHUNKS = (1024, 512, 2048, 4096)
OBJECTIVES = ((500.0, 30.0), (200.0, 15.0), (200.0, 10.0), (2000.0, 100.0))
SYNTHETIC = {"chat": (512, 256), "code": (2048, 64), "summarise": (8192, 256)}
TRACES = {
    "azure-code": "AzureLLMInferenceTrace_code.csv.gz",
    "azure-conv": "AzureLLMInferenceTrace_conv.csv.gz",
    "mooncake": "mooncake_conversation_trace.jsonl.gz",
}
_ANSWERS = 4
_NEAR_STEP = 1.06  # from one rate to the next, where a smaller fleet has said where to look


@dataclass(frozen=True, slots=True)
class Cell:
    workload: str
    ttft_ms: float
    tpot_ms: float
    gpus: int
    requests: int
    seed: int = 1

    @property
    def label(self) -> str:
        return f"{self.workload} {self.ttft_ms:g}/{self.tpot_ms:g} x{self.gpus}"


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
    seconds: float  # of one processor
    runs: int

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


def colocated(gpus: int, spec: WorkerSpec, chunk: int, admission: Admission) -> Fleet:
    spec = replace(spec, paced=False, demote=admission is Admission.SLO, chunk_tokens=chunk)
    roles = (Role.MIXED,) * gpus
    return _static(f"colocated, chunk {chunk}", roles, Policy.COLOCATED, admission, spec)


def split(prefill: int, decode: int, spec: WorkerSpec, admission: Admission) -> Fleet:
    spec = replace(spec, paced=False, demote=admission is Admission.SLO)
    roles = (Role.PREFILL,) * prefill + (Role.DECODE,) * decode
    return _static(f"split {prefill}:{decode}", roles, Policy.DISAGGREGATED, admission, spec)


def _static(
    name: str, roles: tuple[Role, ...], policy: Policy, admission: Admission, spec: WorkerSpec
) -> Fleet:
    """Who lets everybody in needs no forecast."""
    forecasts = admission is Admission.SLO
    return Fleet(name, roles, policy, admission, spec, prefix_aware=False, forecasts=forecasts)


def adaptive(gpus: int, spec: WorkerSpec, *, planned: bool = True) -> Fleet:
    """It begins with half of them in each pool; what comes of that the planner says."""
    roles = (Role.PREFILL,) * (gpus // 2) + (Role.DECODE,) * (gpus - gpus // 2)
    return Fleet("adaptive", roles, Policy.ADAPTIVE, Admission.SLO, spec, planned=planned)


def splits(gpus: int) -> list[tuple[int, int]]:
    """Every split of few GPUs, in eighths of many; the even ones first."""
    if gpus <= 8:
        shares = [(n, gpus - n) for n in range(1, gpus)]
    else:
        shares = [(gpus * n // 8, gpus - gpus * n // 8) for n in range(1, 8)]
    return sorted(shares, key=lambda share: abs(share[0] - share[1]))


def colocateds(
    gpus: int, spec: WorkerSpec, admission: Admission, chunks: Sequence[int] = CHUNKS
) -> list[Fleet]:
    return [colocated(gpus, spec, chunk, admission) for chunk in chunks]


def divided(gpus: int, spec: WorkerSpec, admission: Admission) -> list[Fleet]:
    return [split(prefill, decode, spec, admission) for prefill, decode in splits(gpus)]


@functools.cache
def _lengths(workload: str, traces: Path | None, count: int, seed: int) -> list[Length]:
    if workload in SYNTHETIC:
        return synthetic(*SYNTHETIC[workload], count, seed)
    assert traces is not None
    return read_trace(traces / TRACES[workload])


def load_of(cell: Cell, spec: WorkerSpec, traces: Path | None) -> LoadAt:
    """At least ``cell.requests``, and as long as ``_ANSWERS`` answers written at the objective or
    from as many places as there are: shorter, and a fleet would be judged while it still fills."""
    lengths = _lengths(cell.workload, traces, cell.requests, cell.seed)
    answer_s = statistics.fmean(row.output for row in lengths) * cell.tpot_ms / 1e3

    def at(rate: float) -> list[Arrival]:
        running = min(rate * answer_s, cell.gpus * spec.max_batch)
        count = max(cell.requests, round(_ANSWERS * running))
        timed = poisson(lengths, rate, count, cell.seed)
        return arrivals(timed, cell.ttft_ms, cell.tpot_ms)

    return at


def can_be_met(cell: Cell, spec: WorkerSpec, traces: Path | None) -> bool:
    """Whether enough prompts are computed in time where each has a worker to itself."""
    lengths = _lengths(cell.workload, traces, cell.requests, cell.seed)
    cost = spec.cost.prefill
    in_time = sum(cost.ms(row.prompt) * spec.slowdown <= cell.ttft_ms for row in lengths)
    return in_time >= ATTAINMENT * len(lengths)


def busy_rate(lengths: Sequence[Length], spec: WorkerSpec) -> float:
    """Of one worker, were it always busy: from the work of a mean request."""
    cost = spec.cost
    prefill = statistics.fmean(cost.prefill.work_ms(row.prompt) for row in lengths)
    output = statistics.fmean(row.output for row in lengths)
    prompt = statistics.fmean(row.prompt for row in lengths)
    decode = output * (cost.decode.per_sequence_ms + cost.decode.per_kv_token_ms * prompt)
    return 1e3 / (prefill + 2 * decode)


def guess_of(cell: Cell, spec: WorkerSpec, traces: Path | None) -> float:
    """A fleet that is always busy, at half of that."""
    lengths = _lengths(cell.workload, traces, cell.requests, cell.seed)[: cell.requests]
    return cell.gpus * busy_rate(lengths, spec) / 2


def run_cell(
    cell: Cell,
    spec: WorkerSpec,
    traces: Path | None,
    *,
    ours: bool = True,
    chunks: Sequence[int] = CHUNKS,
    earlier: Row | None = None,
    smaller: Row | None = None,
) -> Row:
    """``earlier`` is what the same cell came to before our policy was changed. As the field runs
    them static policies know nothing of it: who was the best of them is not looked for again.
    ``smaller`` is what a fleet of fewer GPUs came to. It only says where to begin."""
    began = time.process_time()
    runs = 0
    like = earlier or smaller

    def best(fleets: Sequence[Fleet], near: float, reached: float | None = None) -> Capacity:
        """``reached``: by the like of them, in ``like``."""
        nonlocal runs
        step = STEP
        if like and reached:
            near, step = reached * cell.gpus / like.cell.gpus, _NEAR_STEP
        found = best_of(fleets, load_at, near, least=guess / 64, seed=cell.seed, step=step)
        runs += found.runs
        return found

    def named(fleets: Sequence[Fleet], name: str) -> list[Fleet]:
        return sorted(fleets, key=lambda fleet: fleet.name != name)

    if not can_be_met(cell, spec, traces):
        seconds = time.process_time() - began
        return Row(cell, 0.0, 0.0, 0.0, 0.0, "", "", None, None, seconds, 0)
    load_at, guess = load_of(cell, spec, traces), guess_of(cell, spec, traces)
    own = best([adaptive(cell.gpus, spec)], 1.6 * guess, like.adaptive if like else None)
    near = 0.8 * own.rate or guess
    mixed = colocateds(cell.gpus, spec, Admission.OPEN, chunks)
    halves = divided(cell.gpus, spec, Admission.OPEN)
    if earlier is None:
        mixed = named(mixed, smaller.best if smaller else "")
        plain = best(mixed, near, smaller.colocated if smaller else None)
        parted = best(halves, near, smaller.split if smaller else None)
        static = max(plain, parted, key=lambda found: found.rate)
        rates = plain.rate, parted.rate
    else:
        static = best(named([*mixed, *halves], earlier.best)[:1], near, earlier.static)
        rates = earlier.colocated, earlier.split
    ruled = None
    if ours:
        # who did best without it first: it changes little about who that is
        name = static.fleet.name if static.fleet else ""
        fleets = [
            *divided(cell.gpus, spec, Admission.SLO),
            *colocateds(cell.gpus, spec, Admission.SLO, chunks),
        ]
        ruled = best(named(fleets, name), 1.05 * static.rate or near, like.ours if like else None)
    return Row(
        cell,
        own.rate,
        *rates,
        ruled.rate if ruled else None,
        static.fleet.name if static.fleet else "",
        ruled.fleet.name if ruled and ruled.fleet else "",
        ratio_interval(own, static, cell.seed),
        ratio_interval(own, ruled, cell.seed) if ruled else None,
        time.process_time() - began,
        runs,
    )


def run(
    cells: Iterable[Cell],
    spec: WorkerSpec,
    traces: Path | None,
    processes: int = 1,
    *,
    ours: bool = True,
    earlier: Mapping[Cell, Row] | None = None,
    known: Mapping[Cell, Row] | None = None,
    each: Callable[[Row], None] = lambda row: None,
) -> None:
    """Small fleets first: they say where to look for the larger ones. So do the ``known`` rows."""
    before, found = earlier or {}, dict(known or {})
    wanted = sorted(cells, key=lambda cell: cell.gpus)
    if processes == 1:
        for cell in wanted:
            smaller = _smaller(cell, found)
            row = run_cell(cell, spec, traces, ours=ours, earlier=before.get(cell), smaller=smaller)
            found[cell] = row
            each(row)
        return
    with ProcessPoolExecutor(processes) as pool:
        for _, fleet in itertools.groupby(wanted, key=lambda cell: cell.gpus):
            futures = [
                pool.submit(
                    run_cell,
                    cell,
                    spec,
                    traces,
                    ours=ours,
                    earlier=before.get(cell),
                    smaller=_smaller(cell, found),
                )
                for cell in fleet
            ]
            for future in as_completed(futures):
                row = future.result()
                found[row.cell] = row
                each(row)


def _smaller(cell: Cell, rows: Mapping[Cell, Row]) -> Row | None:
    """The same cell on the largest fleet that is smaller than its own."""
    alike = [
        row
        for other, row in rows.items()
        if other.gpus < cell.gpus and replace(other, gpus=cell.gpus) == cell and row.met
    ]
    return max(alike, key=lambda row: row.cell.gpus, default=None)


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


def read(path: Path, spec: WorkerSpec) -> dict[Cell, Row]:
    """What ``as_json`` has written; ConfigError where it is of other workers."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("spec") != asdict(spec):
        raise ConfigError(f"{path}: its rows are of other workers than these; give another --out")
    for row in found["rows"]:
        del row["ratio"], row["ratio_ours"]
    rows = TypeAdapter(list[Row]).validate_python(found["rows"])
    return {row.cell: row for row in rows}


def progress(row: Row) -> None:
    print(
        f"{row.cell.label}: adaptive {row.adaptive:.2f}, {row.best} {row.static:.2f}, "
        f"ratio {_ratio(row.ratio, row.interval)}; {row.best_ours} {row.ours or 0:.2f}, ratio "
        f"{_ratio(row.ratio_ours, row.interval_ours)} ({row.runs} runs, {row.seconds:.0f} s)",
        file=sys.stderr,
        flush=True,
    )


def eight_b_on_h200(cost: StepCost = EIGHT_B_ON_H200) -> WorkerSpec:
    """880,000 tokens of KV: 110 GiB at 128 KiB a token. Blocks of 64 tokens, for speed."""
    return WorkerSpec(cost, 880_000 // 64, 64)

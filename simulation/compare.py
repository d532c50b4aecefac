"""Adaptive against static policies, cell by cell: the table of ``docs/simulation.md``.

A cell is a workload, a pair of objectives and a number of GPUs. In each, the static policies
are colocated serving at several chunk sizes and every split of the fleet; their capacity is
that of the best one. All see the same arrivals. Static policies run twice: as the field runs
them (everybody is let in, prompts in the order of their coming), and with our own admission
and demotion.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..core.config import Admission, Policy
from ..core.cost import StepCost
from ..core.ids import Role
from .capacity import Capacity, find, survives
from .costs import EIGHT_B_ON_H200
from .run import Fleet
from .virtual_worker import WorkerSpec
from .workload import Arrival, Length, arrivals, poisson, read_trace, synthetic

CHUNKS = (1024, 512, 2048, 4096)
BETTER = 1.012
OBJECTIVES = ((500.0, 30.0), (200.0, 15.0), (200.0, 10.0), (2000.0, 100.0))
SYNTHETIC = {"chat": (512, 256), "code": (2048, 64), "summarise": (8192, 256)}
TRACES = {
    "azure-code": "AzureLLMInferenceTrace_code.csv.gz",
    "azure-conv": "AzureLLMInferenceTrace_conv.csv.gz",
    "mooncake": "mooncake_conversation_trace.jsonl.gz",
}
_ANSWERS = 4


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
    field runs it and (``ours``) with our admission and demotion."""

    cell: Cell
    adaptive: float
    colocated: float
    split: float
    ours: float
    best: str
    best_ours: str
    seconds: float
    runs: int

    @property
    def static(self) -> float:
        return max(self.colocated, self.split)

    @property
    def ratio(self) -> float:
        return self.adaptive / self.static if self.static else math.nan

    @property
    def ratio_ours(self) -> float:
        return self.adaptive / self.ours if self.ours else math.nan


def colocated(gpus: int, spec: WorkerSpec, chunk: int, admission: Admission) -> Fleet:
    spec = replace(spec, paced=False, demote=admission is Admission.SLO, chunk_tokens=chunk)
    roles = (Role.MIXED,) * gpus
    return Fleet(f"colocated, chunk {chunk}", roles, Policy.COLOCATED, admission, spec, False)


def split(prefill: int, decode: int, spec: WorkerSpec, admission: Admission) -> Fleet:
    spec = replace(spec, paced=False, demote=admission is Admission.SLO)
    roles = (Role.PREFILL,) * prefill + (Role.DECODE,) * decode
    name = f"split {prefill}:{decode}"
    return Fleet(name, roles, Policy.DISAGGREGATED, admission, spec, False)


def adaptive(gpus: int, spec: WorkerSpec, prefill: int | None = None) -> Fleet:
    prefill = gpus // 2 if prefill is None else prefill
    roles = (Role.PREFILL,) * prefill + (Role.DECODE,) * (gpus - prefill)
    return Fleet("adaptive", roles, Policy.ADAPTIVE, Admission.SLO, spec)


def splits(gpus: int) -> list[tuple[int, int]]:
    """Every split of few GPUs, in eighths of many; the even ones first."""
    if gpus <= 8:
        shares = [(n, gpus - n) for n in range(1, gpus)]
    else:
        shares = [(gpus * n // 8, gpus - gpus * n // 8) for n in range(1, 8)]
    return sorted(shares, key=lambda share: abs(share[0] - share[1]))


def statics(
    gpus: int, spec: WorkerSpec, admission: Admission, chunks: Sequence[int] = CHUNKS
) -> list[Fleet]:
    return [
        *(colocated(gpus, spec, chunk, admission) for chunk in chunks),
        *(split(prefill, decode, spec, admission) for prefill, decode in splits(gpus)),
    ]


@functools.cache
def _lengths(workload: str, traces: Path | None, count: int, seed: int) -> list[Length]:
    if workload in SYNTHETIC:
        return synthetic(*SYNTHETIC[workload], count, seed)
    assert traces is not None
    return read_trace(traces / TRACES[workload])


def load_of(cell: Cell, traces: Path | None) -> Callable[[float], Sequence[Arrival]]:
    """At least ``cell.requests``, and as long as ``_ANSWERS`` answers written at the objective:
    shorter, and a fleet would be judged while it still fills."""
    lengths = _lengths(cell.workload, traces, cell.requests, cell.seed)
    answer_s = statistics.fmean(row.output for row in lengths) * cell.tpot_ms / 1e3

    def at(rate: float) -> list[Arrival]:
        count = max(cell.requests, round(rate * _ANSWERS * answer_s))
        timed = poisson(lengths, rate, count, cell.seed)
        return arrivals(timed, cell.ttft_ms, cell.tpot_ms)

    return at


def guess_of(cell: Cell, spec: WorkerSpec, traces: Path | None) -> float:
    """From the work of a mean request: a fleet that is always busy, at half of that."""
    lengths = _lengths(cell.workload, traces, cell.requests, cell.seed)[: cell.requests]
    cost = spec.cost
    prefill = statistics.fmean(cost.prefill.work_ms(row.prompt) for row in lengths)
    output = statistics.fmean(row.output for row in lengths)
    prompt = statistics.fmean(row.prompt for row in lengths)
    decode = output * (cost.decode.per_sequence_ms + cost.decode.per_kv_token_ms * prompt)
    return cell.gpus * 1e3 / (prefill + 2 * decode) / 2


def run_cell(
    cell: Cell,
    spec: WorkerSpec,
    traces: Path | None,
    *,
    ours: bool = True,
    chunks: Sequence[int] = CHUNKS,
) -> Row:
    began = time.monotonic()
    load_at = load_of(cell, traces)
    guess = guess_of(cell, spec, traces)
    least = guess / 64
    runs = 0

    def capacity(fleet: Fleet, near: float) -> Capacity:
        nonlocal runs
        found = find(fleet, load_at, near, least=least, seed=cell.seed)
        runs += found.runs
        return found

    best = capacity(adaptive(cell.gpus, spec), guess).rate

    def best_static(admission: Admission, near: float) -> dict[str, tuple[float, str]]:
        """Of each kind the best. Who does not survive a rate a little above that of the best
        so far is not looked at any closer."""
        nonlocal runs
        found = {"colocated": (0.0, ""), "split": (0.0, "")}
        for fleet in statics(cell.gpus, spec, admission, chunks):
            kind = fleet.name.split()[0].strip(",")
            rate, _ = found[kind]
            if rate:
                runs += 1
                if not survives(fleet, load_at(rate * BETTER), cell.seed):
                    continue
            reached = capacity(fleet, rate * BETTER if rate else near).rate
            if reached > rate:
                found[kind] = (reached, fleet.name)
        return found

    field = best_static(Admission.OPEN, best or guess)
    static = max(rate for rate, _ in field.values())
    own = best_static(Admission.SLO, static or best or guess) if ours else field
    return Row(
        cell,
        best,
        field["colocated"][0],
        field["split"][0],
        max(rate for rate, _ in own.values()),
        max(field.values())[1],
        max(own.values())[1],
        time.monotonic() - began,
        runs,
    )


def run(
    cells: Iterable[Cell],
    spec: WorkerSpec,
    traces: Path | None,
    processes: int = 1,
    *,
    ours: bool = True,
    each: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    wanted = list(cells)
    if processes == 1:
        rows = []
        for cell in wanted:
            rows.append(run_cell(cell, spec, traces, ours=ours))
            each(rows[-1])
        return rows
    found: dict[Cell, Row] = {}
    with ProcessPoolExecutor(processes) as pool:
        futures = [pool.submit(run_cell, cell, spec, traces, ours=ours) for cell in wanted]
        for future in as_completed(futures):
            row = future.result()
            found[row.cell] = row
            each(row)
    return [found[cell] for cell in wanted]


def geometric_mean(ratios: Iterable[float]) -> float:
    finite = [ratio for ratio in ratios if math.isfinite(ratio) and ratio > 0]
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
        if max(row.adaptive, row.static, row.ours) == 0:
            continue
        lines.append(
            f"| {cell.workload} | {cell.ttft_ms:g}/{cell.tpot_ms:g} | {cell.gpus} | "
            f"{row.colocated:.2f} | {row.split:.2f} | {row.adaptive:.2f} | {row.ratio:.2f} | "
            f"{row.ours:.2f} ({row.best_ours}) | {row.ratio_ours:.2f} |"
        )
    for gpus in sorted({row.cell.gpus for row in rows}):
        part = [row for row in rows if row.cell.gpus == gpus]
        mean = geometric_mean(row.ratio for row in part)
        own = geometric_mean(row.ratio_ours for row in part)
        least = min((row.ratio for row in part if row.static), default=math.nan)
        least_own = min((row.ratio_ours for row in part if row.ours), default=math.nan)
        lines.append(
            f"\n{gpus} GPUs: geometric mean {mean:.3f}, least {least:.3f}; against static "
            f"policies with our admission {own:.3f}, least {least_own:.3f}"
        )
    unmet = [row.cell.label for row in rows if max(row.adaptive, row.static, row.ours) == 0]
    if unmet:
        lines.append("\nNo policy meets: " + "; ".join(unmet))
    return "\n".join(lines)


def as_json(rows: Sequence[Row], spec: WorkerSpec) -> dict[str, Any]:
    return {
        "spec": asdict(spec),
        "rows": [asdict(row) | {"ratio": row.ratio, "ratio_ours": row.ratio_ours} for row in rows],
    }


def save(rows: Sequence[Row], spec: WorkerSpec, path: Path) -> None:
    path.write_text(json.dumps(as_json(rows, spec), indent=1) + "\n", encoding="utf-8")


def progress(row: Row) -> None:
    print(
        f"{row.cell.label}: adaptive {row.adaptive:.2f}, {row.best} {row.static:.2f}, "
        f"ratio {row.ratio:.2f}; {row.best_ours} {row.ours:.2f}, ratio {row.ratio_ours:.2f} "
        f"({row.runs} runs, {row.seconds:.0f} s)",
        file=sys.stderr,
        flush=True,
    )


def eight_b_on_h200(cost: StepCost = EIGHT_B_ON_H200) -> WorkerSpec:
    """880,000 tokens of KV: 110 GiB at 128 KiB a token. Blocks of 64 tokens, for speed."""
    return WorkerSpec(cost, 880_000 // 64, 64)

"""``pdserve bench policies``: the adaptive policy against static ones, in virtual time.

table      capacity at 90% over workloads, objectives and fleets (see ``simulation.compare``)
shifting   the same where the load shifts each minute, each phase judged by itself
prefix     mean TTFT on a trace with named blocks: placed by them, or least loaded
forecast   how far off the TTFT forecasts are under Poisson load, and how far off one would be
           that knows the fleet to the last step, and not who comes next
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from ..core.config import Admission, Policy
from ..core.errors import ConfigError
from ..core.ids import Role
from ..simulation import compare, shifting
from ..simulation.capacity import Capacity
from ..simulation.contest import OBJECTIVES, SYNTHETIC, TRACES, Cell
from ..simulation.fleets import Kind, adaptive, eight_b_on_h200
from ..simulation.run import Fleet, Outcome, simulate
from ..simulation.search import Search, Setting, look, look_all
from ..simulation.worker_spec import WorkerSpec
from ..simulation.workload import Arrival, Length, arrivals, read_trace, rescaled

_ORACLES, _ORACLE_STEP = 150, 4  # so many requests, and from one to the next

_Found: TypeAlias = Mapping[Search, Capacity]


def main(arguments: Sequence[str]) -> int:
    options = _options(arguments)
    if options.requests < 100:
        raise ConfigError("--requests must be at least 100")
    match options.what:
        case "table":
            result = _table(options)
        case "shifting":
            result = _shifting(options)
        case "prefix":
            result = _prefix(options)
        case _:
            result = _forecast(options)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pdserve bench policies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("what", choices=["table", "shifting", "prefix", "forecast"])
    add("--traces", type=Path, metavar="DIR", help="a folder with the public traces")
    add("--gpus", default="2", metavar="N,N", help="fleets, such as 2,4,8; default 2")
    add("--workloads", metavar="A,B", help=f"default: {', '.join([*SYNTHETIC, *TRACES])}")
    add("--objectives", metavar="T/P,..", help="TTFT/TPOT ms; default: the four of the docs")
    add("--requests", type=int, default=3000, metavar="N", help="of a run, at least; default 3000")
    add("--seed", type=int, default=1, metavar="N")
    add("--slowdown", type=float, default=1.0, metavar="F", help="steps take F times their cost")
    add("--jitter", type=float, default=0.0, metavar="F", help="relative deviation of a step")
    add("--chunk", type=int, default=2048, metavar="N", help="prompt tokens a step, at most")
    add("--rate", type=float, default=7.0, metavar="R", help="prefix: requests a second")
    add("--no-own", action="store_true", help="table: no column with our own admission")
    add(
        "--kept",
        type=Path,
        metavar="DIR",
        help="keep the runs of searches for a capacity there, and take those that are there",
    )
    add("--processes", type=int, default=2, metavar="N", help="default 2")
    add("--out", type=Path, metavar="JSON")
    return parser.parse_args(arguments)


def _cells(options: argparse.Namespace) -> list[Cell]:
    names = options.workloads.split(",") if options.workloads else [*SYNTHETIC, *TRACES]
    unknown = [name for name in names if name not in {*SYNTHETIC, *TRACES}]
    if unknown:
        raise ConfigError(f"--workloads: no {unknown[0]}; allowed: {[*SYNTHETIC, *TRACES]}")
    missing = [name for name in names if name in TRACES and options.traces is None]
    if missing:
        raise ConfigError(f"--workloads: {missing[0]} needs --traces DIR")
    fleets = _fleets(options)
    try:
        objectives = (
            [
                (float(ttft), float(tpot))
                for ttft, tpot in (pair.split("/") for pair in options.objectives.split(","))
            ]
            if options.objectives
            else list(OBJECTIVES)
        )
    except ValueError as error:
        raise ConfigError(f"--objectives: {error}") from error
    return [
        Cell(name, ttft, tpot, gpus, options.requests, options.seed)
        for gpus in fleets
        for name in names
        for ttft, tpot in objectives
    ]


def _fleets(options: argparse.Namespace) -> list[int]:
    try:
        fleets = [int(text) for text in options.gpus.split(",")]
    except ValueError as error:
        raise ConfigError(f"--gpus: {error}") from error
    if min(fleets) < 2:
        raise ConfigError("--gpus: a split needs two at least")
    return fleets


def _spec(options: argparse.Namespace) -> WorkerSpec:
    return replace(
        eight_b_on_h200(),
        slowdown=options.slowdown,
        jitter=options.jitter,
        chunk_tokens=options.chunk,
    )


def _setting(options: argparse.Namespace) -> Setting:
    return Setting(_spec(options), options.traces, options.kept)


def _search(
    searches: Sequence[Search], options: argparse.Namespace, rows: Callable[[_Found], Any]
) -> _Found:
    """``rows`` of what is known are written whenever there is more."""
    known: dict[Search, Capacity] = {}

    def each(search: Search, found: Capacity) -> None:
        compare.progress(search, found)
        known[search] = found
        if options.out is not None:
            options.out.write_text(json.dumps(rows(known), indent=1) + "\n", encoding="utf-8")

    return look_all(searches, _setting(options), options.processes, each)


def _table(options: argparse.Namespace) -> dict[str, Any]:
    cells, ours = _cells(options), not options.no_own
    searches = [one for cell in cells for one in compare.searches_of(cell, ours=ours)]

    def rows(found: _Found) -> list[compare.Row]:
        """Of the cells that are complete."""
        complete = [cell for cell in cells if not ours or Search(cell, Kind.OURS) in found]
        made = [compare.row_of(cell, found) for cell in complete]
        return [row for row in made if row is not None]

    found = _search(searches, options, lambda f: compare.as_json(rows(f), _spec(options)))
    print(compare.table(rows(found)))
    return compare.as_json(rows(found), _spec(options))


def _shifting(options: argparse.Namespace) -> dict[str, Any]:
    shifts = [
        shifting.Shift(lengths, ttft_ms, tpot_ms, gpus, options.seed)
        for gpus in _fleets(options)
        for lengths, ttft_ms, tpot_ms in shifting.SHIFTS
    ]
    searches = [one for shift in shifts for one in shifting.searches_of(shift)]

    def rows(found: _Found) -> list[shifting.Shifted]:
        made = [shifting.row_of(shift, found) for shift in shifts]
        return [row for row in made if row is not None]

    found = _search(searches, options, lambda f: shifting.as_json(rows(f), _spec(options)))
    for row in rows(found):
        print(shifting.line(row))
    return shifting.as_json(rows(found), _spec(options))


def _prefix(options: argparse.Namespace) -> dict[str, Any]:
    """Half of eight workers in each pool; the trace's own bursts at ``--rate``."""
    if options.traces is None:
        raise ConfigError("prefix needs --traces DIR")
    rows = read_trace(options.traces / TRACES["mooncake"])[: options.requests]
    spec = replace(eight_b_on_h200(), prefix_cache=True)
    static = replace(spec, paced=False, demote=False)
    roles = (Role.PREFILL,) * 4 + (Role.DECODE,) * 4
    load = arrivals(rescaled(rows, options.rate, len(rows)), 1e9, 100.0, spec.block_size)
    split, own = Policy.DISAGGREGATED, Policy.ADAPTIVE
    fleets = [
        Fleet("least loaded", roles, split, Admission.OPEN, static, prefix_aware=False),
        Fleet("least loaded, less what is cached", roles, split, Admission.OPEN, static),
        Fleet("adaptive, blind to prefixes", roles, own, Admission.OPEN, spec, prefix_aware=False),
        Fleet("adaptive", roles, own, Admission.OPEN, spec),
    ]
    found = {fleet.name: _of_prefixes(simulate(fleet, load, options.seed)) for fleet in fleets}
    result = {
        "rate": options.rate,
        "requests": len(rows),
        "unbounded_cache_hit_rate": _unbounded(rows),
        "policies": found,
    }
    print(json.dumps(result, indent=1))
    return result


def _of_prefixes(outcome: Outcome) -> dict[str, Any]:
    ttft = [one.ttft_ms for one in outcome.served]
    cached = sum(one.num_cached_tokens for one in outcome.served)
    return {
        "mean_ttft_ms": round(statistics.fmean(ttft), 1),
        "median_ttft_ms": round(statistics.median(ttft), 1),
        "hit_rate": round(cached / sum(one.arrival.prompt for one in outcome.served), 4),
        "prefill_share_of_time": [
            round(usage.prefill_s / outcome.end_s, 3) for usage in outcome.usage
        ],
    }


def _unbounded(rows: Sequence[Length]) -> float:
    """The share of tokens that one cache without a bound would have held."""
    seen: set[int] = set()
    hit = 0
    for row in rows:
        known = 0
        for name in row.hash_ids:
            if name not in seen:
                break
            known += 1
        seen.update(row.hash_ids)
        hit += min(known * 512, row.prompt - 1)
    return round(hit / sum(row.prompt for row in rows), 4)


def _forecast(options: argparse.Namespace) -> dict[str, Any]:
    """At 70% of adaptive's capacity, steps with ``--jitter`` and ``--slowdown``."""
    result: dict[str, Any] = {}
    with ProcessPoolExecutor(options.processes) as pool:
        cells = _cells(options)
        futures = {pool.submit(_forecast_of, cell, _setting(options)): cell for cell in cells}
        for future in as_completed(futures):
            label, found = futures[future].label, future.result()
            print(f"{label}: {found}", file=sys.stderr, flush=True)
            result[label] = found
            if options.out is not None:
                options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    result = {cell.label: result[cell.label] for cell in cells}
    print(json.dumps(result, indent=1))
    return result


def _forecast_of(cell: Cell, setting: Setting) -> dict[str, dict[str, float]] | None:
    """None where nobody is in time."""
    capacity = look(Search(cell, Kind.ADAPTIVE), setting).rate
    if not capacity:
        return None
    at, fleet = cell.load(setting.spec, setting.traces), adaptive(cell.gpus, setting.spec)
    load = at(0.7 * capacity)
    outcome = simulate(fleet, load, cell.seed)
    errors = [
        abs(one.ttft_forecast_ms / one.ttft_ms - 1.0)
        for one in outcome.served
        if one.ttft_forecast_ms is not None and not one.refused
    ]
    return {
        "forecast": _spread(errors),
        "all but the future": _spread(_all_but_the_future(fleet, load, outcome, cell.seed)),
    }


def _spread(errors: Sequence[float]) -> dict[str, float]:
    ordered = sorted(errors)
    return {
        "median": round(ordered[len(ordered) // 2], 3),
        "p95": round(ordered[int(0.95 * len(ordered))], 3),
    }


def _all_but_the_future(
    fleet: Fleet, load: Sequence[Arrival], outcome: Outcome, seed: int
) -> list[float]:
    """By how much each of some requests would have had another TTFT, had nobody come after it: the
    error of a forecast that knows all that there is to know when it is made."""
    first = len(load) - len(outcome.served)
    errors = []
    for place, real in list(enumerate(outcome.served))[: _ORACLES * _ORACLE_STEP : _ORACLE_STEP]:
        if real.refused:
            continue
        last = first + place
        until = [*load[:last], replace(load[last], phase=0)]
        (*_, alone) = simulate(fleet, until, seed).served
        errors.append(abs(alone.ttft_ms / real.ttft_ms - 1.0))
    return errors

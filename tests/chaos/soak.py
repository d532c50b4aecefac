"""A deployment of simulated workers at the highest load that this machine gives its router.

    make soak SOAK_MINUTES=10 OUT=docs/results/soak.json

A fixed number of callers ask without a pause, the same mix all the time, hang-ups and bad
calls among it. Every few seconds it is noted what each process takes. Behind a warm-up nothing
may grow: memory (the slope of a line through all samples), descriptors, threads; and the last
minute must be as fast as the first. Clients run on the same cores, so the time that others
take of the machine is in the latencies; the router's CPU time for each call is free of that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
from deaths import MAX_CONTEXT, fleet, router_pid, spread
from footprint import Footprint, children, cpu_s, processes_of, shared_files
from served import Server
from traffic import Tally, cases, keep_asking, record

EVERY_S = 5.0
WARMUP = 0.2  # of the time: rings of what was last, allocators and caches fill
MIB_GROWN = 8.0  # of a process, behind the warm-up, by its slope; more is a fault


@dataclass(frozen=True, slots=True)
class Sample:
    """At ``at`` seconds, after so many calls; the processes by name."""

    at: float
    calls: int
    router_cpu_s: float
    processes: dict[str, Footprint]


def look(names: dict[str, int], begun: float, tally: Tally) -> Sample:
    found = {name: Footprint.of(pid) for name, pid in names.items()}
    return Sample(time.monotonic() - begun, tally.calls, cpu_s(names["router"]), found)


async def soaked(
    server: Server, folder: Path, seconds: float, seed: int, clients: int
) -> dict[str, Any]:
    all_cases = cases(seed, MAX_CONTEXT)
    async with aiohttp.ClientSession() as session:
        await record(session, server.url, all_cases)
    names = {"router": router_pid(folder), "supervisor": server.process.pid}
    names |= {name: worker["pid"] for name, worker in server.workers().items()}
    tally, stop, samples = Tally(), asyncio.Event(), []
    begun = time.monotonic()
    asking = asyncio.create_task(keep_asking(server.url, all_cases, tally, stop, clients, seed))
    while (now := time.monotonic()) < begun + seconds and not asking.done():
        samples.append(look(names, begun, tally))
        await asyncio.sleep(min(EVERY_S, begun + seconds - now))
    samples.append(look(names, begun, tally))
    stop.set()
    await asking
    await asyncio.to_thread(server.at_rest, 60.0)
    shared = shared_files(children(server.process.pid))
    minute = min(60.0, seconds / 4)
    warm = next(sample for sample in samples if sample.at >= WARMUP * seconds)
    windows = {
        "first": (warm.at, warm.at + minute),
        "last": (samples[-1].at - minute, samples[-1].at),
    }
    return {
        "seed": seed,
        "seconds": round(samples[-1].at, 1),
        "clients": clients,
        "calls": tally.calls,
        "calls_a_second": round(tally.calls / samples[-1].at, 1),
        "outcomes": dict(tally.counts),
        "errors": dict(tally.errors),
        "faults": tally.faults,
        "router_cpu_share": round(
            (samples[-1].router_cpu_s - samples[0].router_cpu_s) / samples[-1].at, 3
        ),
        "minutes": {name: window(samples, tally, begun, *at) for name, at in windows.items()},
        "processes": {name: growth(samples, name, warm.at) for name in names},
        "shared": sorted(map(str, shared)),
    }


def window(
    samples: Sequence[Sample], tally: Tally, begun: float, since: float, until: float
) -> dict[str, Any]:
    """How fast it was between two moments."""
    inside = [sample for sample in samples if since <= sample.at <= until]
    streams = [one for one in tally.streams if since <= one[0] - begun <= until]
    calls = inside[-1].calls - inside[0].calls
    cpu = inside[-1].router_cpu_s - inside[0].router_cpu_s
    return {
        "since_s": round(since, 1),
        "until_s": round(until, 1),
        "calls_a_second": round(calls / (inside[-1].at - inside[0].at), 1),
        "router_cpu_ms_a_call": round(1e3 * cpu / max(1, calls), 3),
        "first_token_s": spread([first for _, first, _ in streams]),
        "whole_stream_s": spread([total for _, _, total in streams]),
    }


def growth(samples: Sequence[Sample], name: str, warm_at: float) -> dict[str, Any]:
    """Of one process: at the start, behind the warm-up, at the end, and the slope in between."""
    warm = [sample for sample in samples if sample.at >= warm_at]
    rss = [sample.processes[name].rss_kib / 1024 for sample in warm]
    line = statistics.linear_regression([sample.at for sample in warm], rss)
    calls = warm[-1].calls - warm[0].calls
    grown = line.slope * (warm[-1].at - warm[0].at)
    return {
        "start": asdict(samples[0].processes[name]),
        "warm": asdict(warm[0].processes[name]),
        "end": asdict(samples[-1].processes[name]),
        "calls_behind_warmup": calls,
        "mib_by_slope": round(grown, 3),
        "bytes_a_call_by_slope": round(grown * 2**20 / max(1, calls), 1),
        "most_fds": max(sample.processes[name].fds for sample in samples),
    }


def run(seconds: float, seed: int, workers: int, clients: int) -> dict[str, Any]:
    """The figures of a whole run. ``faults`` says all that was not as it must be."""
    with fleet(workers, workers, step_ms=0) as (server, folder):
        report = asyncio.run(soaked(server, folder, seconds, seed, clients))
    faults: list[str] = report["faults"]
    if server.process.returncode != 0:
        faults.append(f"the deployment ended with {server.process.returncode}")
    faults += [f"left running: {line}" for line in processes_of(folder)]
    faults += [f"left in /dev/shm: {path}" for path in report.pop("shared") if Path(path).exists()]
    for name, found in report["processes"].items():
        if found["mib_by_slope"] > MIB_GROWN:
            faults.append(f"{name} grows: {found}")
        if found["end"]["fds"] > found["warm"]["fds"] + 2 * clients:
            faults.append(f"descriptors of {name}: {found}")
        if found["end"]["threads"] > found["warm"]["threads"] + 2:
            faults.append(f"threads of {name}: {found}")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 16))
    parser.add_argument("--workers", type=int, default=2, help="of each pool")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    load = os.getloadavg()[0]  # what else ran
    report = run(60 * options.minutes, options.seed, options.workers, options.clients)
    report |= {"cores": os.cpu_count(), "load_average_before": load}
    text = json.dumps(report, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())

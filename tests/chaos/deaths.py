"""Simulated workers, real processes, killed by the hundred under mixed traffic.

    make deaths DEATHS=1000 OUT=docs/results/chaos-simulated.json

A simulated worker's tokens are a hash over the KV that it holds, so a block that is lost,
stale or swapped comes out as a wrong token. SIGKILL takes one to all but one worker of a
fleet at a time, and sometimes all of it; the supervisor starts them again. At the end everything
is asked once more, and nothing may be held, left or grown.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from footprint import Footprint, children, processes_of, shared_files
from served import STOP_LIMIT_S, Server, ready_url, start
from traffic import Outcome, Tally, ask, cases, keep_asking, record

MAX_CONTEXT = 1024
BACK_S = 120.0  # for a killed worker to be of use again
AT_LEAST_UP_S = 2.0  # a worker is not killed sooner: its start would be all it does

FLEET = """
model: {{path: tiny, load: dummy, max_context: {max_context}}}
engine: simulated
pools:
  prefill: {{workers: {prefill}, device: cpu}}
  decode: {{workers: {decode}, device: cpu}}
kv: {{memory: 192KiB}}  # 192 blocks: a few long prompts fill it
simulation: {{step_ms: {step_ms}}}
router: {{max_queue: 256}}
"""


@dataclass(slots=True)
class Deaths:
    """What the killing has done so far."""

    num: int = 0
    at_a_time: list[int] = field(default_factory=list)
    back_s: list[float] = field(default_factory=list)
    shared: set[Path] = field(default_factory=set)  # every file in /dev/shm that was ever used


@contextlib.contextmanager
def fleet(prefill: int, decode: int, step_ms: float = 2.0) -> Iterator[tuple[Server, Path]]:
    """A deployment in a runtime folder of its own; it is ended, and must have left nothing."""
    with tempfile.TemporaryDirectory(prefix="pd-", dir="/tmp") as name:
        folder = Path(name)
        file = folder / "fleet.yaml"
        text = FLEET.format(
            max_context=MAX_CONTEXT, prefill=prefill, decode=decode, step_ms=step_ms
        )
        file.write_text(text)
        process = start(file, env={"XDG_RUNTIME_DIR": name})
        try:
            yield Server(process, ready_url(process)), folder
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()


def router_pid(folder: Path) -> int:
    (written,) = folder.glob("pdserve/*/http.json")
    return int(json.loads(written.read_text())["pid"])


async def kill(
    server: Server, wanted: int, limit_s: float, deaths: Deaths, rng: random.Random
) -> None:
    """Kills until ``wanted`` have died or the time is over, each time whoever has been up for long
    enough, and waits for the last to be back."""
    end = time.monotonic() + limit_s
    seen: dict[str, tuple[int, float]] = {}  # by worker: its epoch, and since when it is known
    waiting: dict[str, tuple[int, float]] = {}  # killed: its epoch, and when
    while deaths.num < wanted or waiting:
        await asyncio.sleep(0.1)
        workers = await asyncio.to_thread(server.workers)
        now = time.monotonic()
        if now > end:
            wanted = deaths.num
        ready = []
        for name, worker in workers.items():
            if worker["state"] != "ready":
                continue
            epoch = worker["epoch"]
            if name in waiting and epoch != waiting[name][0]:
                deaths.back_s.append(now - waiting.pop(name)[1])
            if seen.get(name, (0, 0.0))[0] != epoch:
                seen[name] = epoch, now
                deaths.shared |= shared_files([worker["pid"]])
            if name not in waiting and now - seen[name][1] >= AT_LEAST_UP_S:
                ready.append(name)
        late = [name for name, (_, at) in waiting.items() if now - at > BACK_S]
        assert not late, f"not back within {BACK_S:.0f} s: {late}; {workers}"
        if deaths.num >= wanted or not ready or rng.random() > 0.25:
            continue
        everybody = rng.random() < 0.02
        count = len(ready) if everybody else rng.randint(1, min(4, len(ready)))
        victims = rng.sample(ready, min(count, wanted - deaths.num))
        deaths.at_a_time.append(len(victims))
        for name in victims:
            os.kill(workers[name]["pid"], signal.SIGKILL)
            waiting[name] = workers[name]["epoch"], now
            deaths.num += 1


def measured(server: Server, folder: Path) -> dict[str, Any]:
    """The processes that live through it all, and what lies in the run folder."""
    run_dir = next(path for path in (folder / "pdserve").iterdir() if path.is_dir())
    return {
        "router": asdict(Footprint.of(router_pid(folder))),
        "supervisor": asdict(Footprint.of(server.process.pid)),
        "children": len(children(server.process.pid)),
        "run_folder_files": len(list(run_dir.iterdir())),
    }


async def disturbed(
    server: Server,
    folder: Path,
    wanted: int,
    limit_s: float,
    seed: int,
    clients: int,
    calm_s: float,
) -> dict[str, Any]:
    """Record, kill under traffic, rest, ask everything again: the figures, before it ends."""
    all_cases = cases(seed, MAX_CONTEXT, each=6 if wanted > 100 else 2)
    deaths, tally, again = Deaths(), Tally(), Tally()
    async with aiohttp.ClientSession() as session:
        await record(session, server.url, all_cases)
    calm = Tally()
    quiet = asyncio.Event()
    asyncio.get_running_loop().call_later(calm_s, quiet.set)
    await keep_asking(server.url, all_cases, calm, quiet, clients, seed + 1)
    await asyncio.to_thread(server.at_rest, 30.0)
    before = measured(server, folder)
    begun = time.monotonic()
    stop = asyncio.Event()
    asking = asyncio.create_task(keep_asking(server.url, all_cases, tally, stop, clients, seed))
    killing = asyncio.create_task(kill(server, wanted, limit_s, deaths, random.Random(seed)))
    try:
        await asyncio.wait({asking, killing}, return_when=asyncio.FIRST_COMPLETED)
        killing.result() if killing.done() else asking.result()
    finally:
        stop.set()
        killing.cancel()
        await asyncio.wait({asking, killing})
    took_s = time.monotonic() - begun
    async with aiohttp.ClientSession() as session:
        for case in all_cases:
            again.add(case, await ask(session, server.url, case))
    await asyncio.to_thread(server.at_rest, 30.0)
    after = measured(server, folder)
    return {
        "seed": seed,
        "deaths": deaths.num,
        "kills_at_a_time": {
            str(size): deaths.at_a_time.count(size) for size in sorted(set(deaths.at_a_time))
        },
        "took_s": round(took_s, 1),
        "calls": tally.calls,
        "kinds": dict(tally.kinds),
        "outcomes": dict(tally.counts),
        "errors": dict(tally.errors),
        "faults": calm.faults + tally.faults + again.faults,
        "asked_again": dict(again.counts),
        "worker_back_s": spread(deaths.back_s),
        "longest_pause_of_a_stream_s": spread(tally.gaps),
        "undisturbed_pause_s": spread(calm.gaps),
        "before": before,
        "after": after,
        "shared_files": {
            "used": len(deaths.shared),
            "listed_at_rest": sum(path.exists() for path in deaths.shared),
        },
        "shared": sorted(map(str, deaths.shared)),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "p50": round(statistics.median(ordered), 3),
        "p99": round(ordered[len(ordered) * 99 // 100], 3),
        "max": round(ordered[-1], 3),
    }


def run(
    wanted: int,
    seed: int,
    prefill: int,
    decode: int,
    clients: int,
    *,
    calm_s: float = 10.0,
    limit_s: float = math.inf,
) -> dict[str, Any]:
    """The figures of a whole run. ``faults`` says all that was not as it must be."""
    with fleet(prefill, decode) as (server, folder):
        report = asyncio.run(disturbed(server, folder, wanted, limit_s, seed, clients, calm_s))
        faults: list[str] = report["faults"]
    code = server.process.returncode
    if code != 0:
        faults.append(f"the deployment ended with {code}")
    faults += [f"left running: {line}" for line in processes_of(folder)]
    faults += [f"left in /dev/shm: {path}" for path in report.pop("shared") if Path(path).exists()]
    before, after = report["before"], report["after"]
    for what in ("children", "run_folder_files"):
        if after[what] > before[what]:
            faults.append(f"{what}: {before[what]} before, {after[what]} after")
    if report["shared_files"]["listed_at_rest"] > prefill + decode:
        faults.append(f"files in /dev/shm at rest: {report['shared_files']}")
    for process in ("router", "supervisor"):
        if after[process]["fds"] > before[process]["fds"] + 2 * clients:
            faults.append(f"descriptors of the {process}: {before}, {after}")
    if sum(report["asked_again"].values()) != sum(
        report["asked_again"].get(outcome, 0)
        for outcome in (Outcome.RIGHT, Outcome.HUNG_UP, Outcome.REFUSED)
    ):
        faults.append(f"asked again at rest: {report['asked_again']}")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deaths", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="and no longer")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 16))
    parser.add_argument("--prefill", type=int, default=4)
    parser.add_argument("--decode", type=int, default=4)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    print(f"seed {options.seed}", file=sys.stderr)
    report = run(
        options.deaths,
        options.seed,
        options.prefill,
        options.decode,
        options.clients,
        limit_s=60 * options.minutes,
    )
    report["cores"] = os.cpu_count()
    text = json.dumps(report, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())

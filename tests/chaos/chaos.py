"""`make chaos`: a real deployment under mixed traffic, broken on purpose for some minutes.

    up        start, ask everything once and keep the answers, note what processes take
    broken    clients ask without a pause; one fault after the other, and after each the wait
              until all is whole again
    at rest   nothing runs, waits or is held; everything is asked once more; nobody has grown
    down      SIGINT; nothing is left

Exit code 1 where anything was not as it must be; the list of it is in the report.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import aiohttp
import judge
import report
from footprint import Footprint
from judge import Blow, Seen
from plan import DEADLY, Kind, Strike, strikes
from smollm2 import LIMIT_S, record, smollm2_cases
from strike import impossible, inflict
from traffic import Case, Outcome, Told, ask
from world import World, world

_REST_AFTER_ERROR_S = 1.0
_GROWN_BY = 12  # threads or descriptors: a pool of threads may fill, a connection may linger


@dataclass(frozen=True, slots=True)
class Options:
    """How long to break it: until the time or the number of worker deaths is reached."""

    seed: int
    minutes: float
    deaths: int | None
    kinds: tuple[Kind, ...]
    clients: int = 5
    strikes: int | None = None


@dataclass(slots=True)
class Notes:
    seen: list[Seen] = field(default_factory=list)
    blows: list[Blow] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add(self, case: Case, told: Told, began: float) -> None:
        text = f"{told.why}: {told.text!r}, not {case.expected!r}"
        why = text if told.outcome is Outcome.WRONG else told.why
        ended = time.monotonic()
        self.seen.append(Seen(case.kind, began, ended, told.outcome, why, told.gap_s))


def say(text: str) -> None:
    print(f"chaos: {text}", file=sys.stderr, flush=True)


def run(options: Options) -> dict[str, Any]:
    notes = Notes()
    with world(notes.faults) as made:
        skipped = impossible(made)
        asyncio.run(_broken(made, options, skipped, notes))
    notes.faults += judge.faults(notes.seen, notes.blows)
    return report.of(options.seed, notes.seen, notes.blows, notes.faults, skipped)


async def _broken(made: World, options: Options, skipped: dict[Kind, str], notes: Notes) -> None:
    cases = smollm2_cases(options.seed)
    url = made.server.url
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None),
    ) as session:
        say("up; asking everything once, undisturbed")
        await record(session, url, cases)
        await made.rest()
        before = made.footprints()
        stop = asyncio.Event()
        clients = [
            asyncio.create_task(_client(session, url, cases, notes, stop, options.seed, number))
            for number in range(options.clients)
        ]
        try:
            await _strike(made, options, skipped, notes)
        finally:
            stop.set()
            done = await asyncio.gather(*clients, return_exceptions=True)
        notes.faults += [f"a client broke: {one!r}" for one in done if one is not None]
        say("over; asking everything once more")
        for case in cases:
            began = time.monotonic()
            notes.add(case, await ask(session, url, case, LIMIT_S), began)
    await made.rest()
    notes.faults += grown(before, made.footprints())


async def _strike(made: World, options: Options, skipped: dict[Kind, str], notes: Notes) -> None:
    kinds = [kind for kind in options.kinds if kind not in skipped]
    end = time.monotonic() + 60 * options.minutes
    deaths = 0
    for strike in islice(strikes(options.seed, kinds), options.strikes):
        await asyncio.sleep(strike.quiet_s)
        if time.monotonic() > end or (options.deaths is not None and deaths >= options.deaths):
            return
        notes.blows.append(await _blow(made, strike))
        deaths += len(strike.victims) if strike.kind in DEADLY else 0


async def _blow(made: World, strike: Strike) -> Blow:
    began = time.monotonic()
    await inflict(made, strike)
    lifted = time.monotonic()
    whole = await made.whole()
    made.footprints()  # of the new lives, for what they might leave behind
    say(f"{strike}; whole again after {whole - lifted:.1f} s")
    return Blow(strike, began, lifted, whole)


async def _client(
    session: aiohttp.ClientSession,
    url: str,
    cases: Sequence[Case],
    notes: Notes,
    stop: asyncio.Event,
    seed: int,
    number: int,
) -> None:
    rng = random.Random(f"{seed} {number}")
    while not stop.is_set():
        case = rng.choice(cases)
        began = time.monotonic()
        told = await ask(session, url, case, LIMIT_S)
        notes.add(case, told, began)
        if told.outcome in (Outcome.ERROR, Outcome.CUT):
            await asyncio.sleep(_REST_AFTER_ERROR_S)


def grown(before: dict[int, Footprint], after: dict[int, Footprint]) -> list[str]:
    """Of the processes that lived through it all."""
    return [
        f"process {pid} has grown: {was}, now {after[pid]}"
        for pid, was in before.items()
        if pid in after
        and (after[pid].fds > was.fds + _GROWN_BY or after[pid].threads > was.threads + _GROWN_BY)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 16))
    parser.add_argument("--deaths", type=int, help="end after so many deaths of workers")
    parser.add_argument("--faults", default=",".join(Kind), help="comma-separated; default: all")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    say(f"seed {chosen.seed}")
    kinds = tuple(Kind(word) for word in chosen.faults.split(","))
    found = run(Options(chosen.seed, chosen.minutes, chosen.deaths, kinds))
    found["cores"] = os.cpu_count()
    text = json.dumps(found, indent=2)
    if chosen.out is not None:
        chosen.out.write_text(text + "\n")
    print(report.table(found, f"make chaos SEED={chosen.seed}"))
    say(f"calls: {json.dumps(found['calls'])}")
    for fault in found["faults"]:
        say(f"FAULT {fault}")
    for kind, why in found["skipped"].items():
        say(f"skipped {kind}: {why}")
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())

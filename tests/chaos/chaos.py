"""`make chaos`: a real deployment under mixed traffic, broken on purpose for some minutes.

Twice over: most of the time workers that a supervisor keeps, on this host; then for a while
workers with a host each, whose network is cut.

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
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import aiohttp
import judge
import report
from apart import NoHosts, apart, hosts, on_front
from deployed import Deployed
from footprint import Footprint
from judge import Blow, Seen
from plan import APART, DEADLY, Kind, Strike, strikes
from smollm2 import LIMIT_S, record, smollm2_cases
from strike import impossible, inflict
from traffic import Case, Outcome, Told, ask
from world import world

_REST_AFTER_ERROR_S = 1.0
_SHARE_APART = 0.2  # of the time
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

    def add(self, case: Case, told: Told, began: float, ended: float) -> None:
        text = f"{told.why}: {told.text!r}, not {case.expected!r}"
        why = text if told.outcome is Outcome.WRONG else told.why
        self.seen.append(Seen(case.kind, began, ended, told.outcome, why, told.gap_s))


def say(text: str) -> None:
    print(f"chaos: {text}", file=sys.stderr, flush=True)


def run(options: Options) -> dict[str, Any]:
    notes = Notes()
    skipped: dict[Kind, str] = {}
    cases = smollm2_cases(options.seed)
    far = [kind for kind in options.kinds if kind in APART]
    near = [kind for kind in options.kinds if kind not in APART]
    share = _SHARE_APART if near and far else 1.0 if far else 0.0
    if near:
        with world(notes.faults) as made:
            skipped |= impossible(made)
            kinds = tuple(kind for kind in near if kind not in skipped)
            minutes = options.minutes * (1.0 - share)
            some = replace(options, kinds=kinds, minutes=minutes)
            asyncio.run(_broken(made, cases, some, notes))
    if far:
        try:
            some = replace(options, kinds=tuple(far), minutes=options.minutes * share)
            _break_apart(cases, some, notes)
        except NoHosts as error:
            skipped |= dict.fromkeys(far, str(error))
    notes.faults += judge.faults(notes.seen, notes.blows)
    return report.of(options.seed, notes.seen, notes.blows, notes.faults, skipped)


def _break_apart(cases: Sequence[Case], options: Options, notes: Notes) -> None:
    def job() -> None:
        with apart(net, notes.faults) as made:
            asyncio.run(_broken(made, cases, options, notes))

    with hosts() as net:
        on_front(net, job)


async def _broken(made: Deployed, cases: Sequence[Case], options: Options, notes: Notes) -> None:
    url = made.server.url
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None),
    ) as session:
        await made.whole()
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
            await _strike(made, options, notes)
        finally:
            stop.set()
            done = await asyncio.gather(*clients, return_exceptions=True)
        notes.faults += [f"a client broke: {one!r}" for one in done if one is not None]
        say("over; asking everything once more")
        for told in await asyncio.gather(*(_seen(session, url, case) for case in cases)):
            notes.add(*told)
    await made.rest()
    notes.faults += grown(before, made.footprints())


async def _strike(made: Deployed, options: Options, notes: Notes) -> None:
    end = time.monotonic() + 60 * options.minutes
    deaths = 0
    for strike in islice(strikes(options.seed, options.kinds), options.strikes):
        await asyncio.sleep(strike.quiet_s)
        if time.monotonic() > end or (options.deaths is not None and deaths >= options.deaths):
            return
        notes.blows.append(await _blow(made, strike, notes))
        deaths += len(strike.victims) if strike.kind in DEADLY else 0


async def _blow(made: Deployed, strike: Strike, notes: Notes) -> Blow:
    pids = made.pids()
    began = time.monotonic()
    await inflict(made, strike)
    lifted = time.monotonic()
    whole = await made.whole()
    made.footprints()  # of the new lives, for what they might leave behind
    anew = {name for name, pid in made.pids().items() if pid != pids.get(name)}
    if others := anew - set(strike.victims):
        notes.faults.append(f"{strike}: {', '.join(sorted(others))} had to be started again, too")
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
        case, told, began, ended = await _seen(session, url, rng.choice(cases))
        notes.add(case, told, began, ended)
        if told.outcome in (Outcome.ERROR, Outcome.CUT):
            await asyncio.sleep(_REST_AFTER_ERROR_S)


async def _seen(
    session: aiohttp.ClientSession, url: str, case: Case
) -> tuple[Case, Told, float, float]:
    began = time.monotonic()
    told = await ask(session, url, case, LIMIT_S)
    return case, told, began, time.monotonic()


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

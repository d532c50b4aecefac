"""Many capacities at once: each kind of fleet in each contest is a search of its own.

Searches share nothing, so any number of processes may work on them. A large fleet's begins
where that of a smaller fleet ended, and so waits for it: what comes out does not depend on how many
processes there are, nor on who is done first. Each keeps its runs in a file of its own
(``memo``): an interruption loses the runs that were on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .capacity import STEP, Capacity, best_of
from .contest import Contest
from .fleets import Kind, fleets_of
from .memo import Memo
from .worker_spec import WorkerSpec

_GUESS = {  # of its guess
    Kind.ADAPTIVE: 1.6,
    Kind.UNPLANNED: 1.6,
    Kind.COLOCATED: 1.2,
    Kind.SPLIT: 1.2,
    Kind.OURS: 1.5,
}
_NEAR_STEP = 1.06  # from one rate to the next, where a smaller fleet has said where to look


@dataclass(frozen=True, slots=True)
class Search:
    contest: Contest
    kind: Kind

    @property
    def name(self) -> str:
        """As that of a file."""
        return re.sub(r"[^a-z0-9.]+", "-", f"{self.contest.label} {self.kind}".lower())


@dataclass(frozen=True, slots=True)
class Setting:
    """What all searches have in common. ``kept``: a folder for what they find out."""

    spec: WorkerSpec
    traces: Path | None = None
    kept: Path | None = None


def look(search: Search, setting: Setting, rate: float | None = None) -> Capacity:
    """``rate``: where to begin, if anybody has an idea."""
    contest, spec = search.contest, setting.spec
    guess = contest.guess(spec, setting.traces)
    if not guess:
        return Capacity(0.0, 0)
    of: dict[str, Any] = {"spec": asdict(spec), "seed": contest.seed, "contest": repr(contest)}
    path = setting.kept / f"{search.name}.jsonl" if setting.kept is not None else None
    return best_of(
        fleets_of(search.kind, contest.gpus, spec),
        contest.load(spec, setting.traces),
        rate or _GUESS[search.kind] * guess,
        least=guess / 64,
        seed=contest.seed,
        step=_NEAR_STEP if rate else STEP,
        memo=Memo(path, of),
    )


def look_all(
    searches: Iterable[Search],
    setting: Setting,
    processes: int,
    each: Callable[[Search, Capacity], None] = lambda search, found: None,
) -> dict[Search, Capacity]:
    """``each`` is told of what is found, as it is found."""
    wanted = list(dict.fromkeys(searches))
    before = {search: _smaller(search, wanted) for search in wanted}
    found: dict[Search, Capacity] = {}
    if processes == 1:
        for search in sorted(wanted, key=lambda one: one.contest.gpus):
            found[search] = look(search, setting, _near(search, before[search], found))
            each(search, found[search])
        return found
    waiting = sorted(wanted, key=lambda one: one.contest.gpus, reverse=True)  # the long ones first
    running: dict[Future[Capacity], Search] = {}
    with ProcessPoolExecutor(processes) as pool:
        while waiting or running:
            ready = [one for one in waiting if before[one] is None or before[one] in found]
            for search in ready[: processes - len(running)]:
                waiting.remove(search)
                near = _near(search, before[search], found)
                running[pool.submit(look, search, setting, near)] = search
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                search = running.pop(future)
                found[search] = future.result()
                each(search, found[search])
    return found


def _smaller(search: Search, wanted: Iterable[Search]) -> Search | None:
    """The same on the largest of the smaller fleets."""
    contest = search.contest
    alike = [
        one
        for one in wanted
        if one.kind is search.kind
        and one.contest.gpus < contest.gpus
        and contest.smaller(one.contest.gpus) == one.contest
    ]
    return max(alike, key=lambda one: one.contest.gpus, default=None)


def _near(search: Search, before: Search | None, found: Mapping[Search, Capacity]) -> float | None:
    if before is None or not found[before].rate:
        return None
    return found[before].rate * search.contest.gpus / before.contest.gpus

"""The rate at which a share of the requests still meets both objectives.

Of one fleet, or of the best of several. Both are looked for alike: a rate that somebody survives
is a floor, one that nobody survives a ceiling, and whoever has not survived the floor is out of the
race. So of many fleets only those near the best are run often, and what is hopeless is
given up early in its run.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .memo import Memo, Point, Tried
from .run import Fleet, Outcome, simulate
from .workload import Arrival

ATTAINMENT = 0.9
STEP = 1.15  # from one rate to the next while the capacity is not bracketed
_FARTHEST = 1e6  # nothing finds the end of a load that costs nothing
WIDTH = 1.03  # of the bracket, in which the capacity is then interpolated
_BLOCKS = 24  # of a run, drawn anew for an interval: neighbours share their queues
_DRAWS = 400

LoadAt = Callable[[float], Sequence[Arrival]]


@dataclass(frozen=True, slots=True)
class Capacity:
    """``rate`` in requests a second; 0 where not even one at a time meets the objectives.
    The fleet of that ``name`` reaches it; ``low`` and ``high`` are its runs on both sides of it."""

    rate: float
    runs: int
    name: str = ""
    low: Point | None = None
    high: Point | None = None
    moves: int = 0  # of workers between roles, in the run at ``low``


@dataclass(slots=True)
class _Racer:
    fleet: Fleet
    failed_at: float = math.inf  # the lowest rate that it did not survive
    got: int = 0  # how far it came there


@dataclass(slots=True)
class _Race:
    racers: list[_Racer]  # the most promising first
    load_at: LoadAt
    seed: int
    memo: Memo
    runs: int = 0
    best: _Racer | None = None
    low: Point | None = None
    moves: int = 0
    high: float = math.inf

    def survived(self, rate: float) -> bool:
        """Whether anybody does. Whoever has been the best so far is asked first."""
        for racer in self.racers:
            if racer.failed_at <= rate:
                continue
            tried = self.tried(racer.fleet, rate, ATTAINMENT)
            if tried.point is not None and tried.point.attainment >= ATTAINMENT:
                self.best, self.low, self.moves = racer, tried.point, tried.moves
                self.racers = [one for one in self.racers if one.failed_at > rate]
                self.racers.sort(key=lambda one: one is not racer)
                return True
            racer.failed_at, racer.got = rate, tried.got
        self.racers.sort(key=lambda one: (one is not self.best, -one.failed_at, -one.got))
        self.high = min(self.high, rate)
        return False

    def tried(self, fleet: Fleet, rate: float, give_up_below: float) -> Tried:
        self.runs += 1
        run = f"{fleet.name} at {rate!r}, given up below {give_up_below}"
        tried = self.memo.get(run)
        if tried is None:
            tried = _run(fleet, rate, self.load_at(rate), self.seed, give_up_below)
            self.memo.put(run, tried)
        return tried


def _run(
    fleet: Fleet, rate: float, load: Sequence[Arrival], seed: int, give_up_below: float
) -> Tried:
    """Hundreds of thousands of objects that all live to its end: the collector would go through
    them for nothing, a third of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        outcome = simulate(fleet, load, seed, give_up_below=give_up_below)
    finally:
        if collects:
            gc.enable()
    point = None if outcome.cut else _point(rate, outcome)
    return Tried(point, len(outcome.served), outcome.moves)


def _point(rate: float, outcome: Outcome) -> Point:
    phases: dict[int, list[bool]] = {}
    for one in outcome.served:
        phases.setdefault(one.arrival.phase, []).append(one.good)
    return Point(rate, outcome.attainment, tuple(map(_block_shares, phases.values())))


def find(fleet: Fleet, load_at: LoadAt, guess: float, *, least: float, seed: int = 0) -> Capacity:
    """``load_at(rate)`` are the arrivals; below ``least`` it is not looked for."""
    return best_of([fleet], load_at, guess, least=least, seed=seed)


def best_of(
    fleets: Sequence[Fleet],
    load_at: LoadAt,
    guess: float,
    *,
    least: float,
    seed: int = 0,
    step: float = STEP,
    width: float = WIDTH,
    memo: Memo | None = None,
) -> Capacity:
    """The capacity of the best of them. Brackets from ``guess`` in a ``step`` that grows, halves in
    logarithms until the ends of the bracket differ by a factor of ``width``, and goes between
    the runs at both in the end."""
    race = _Race([_Racer(fleet) for fleet in fleets], load_at, seed, memo or Memo(None, None))
    rate = guess
    if race.survived(rate):
        while step < _FARTHEST and race.survived(rate := rate * step):
            step *= step
    else:
        while rate > least and not race.survived(rate := rate / step):
            step *= step
    if race.low is None or race.best is None:
        return Capacity(0.0, race.runs)
    while race.high / race.low.rate > width:
        race.survived(math.sqrt(race.low.rate * race.high))
    # the winner's own run at the ceiling, to its end
    name, low = race.best.fleet.name, race.low
    high = race.tried(race.best.fleet, race.high, ATTAINMENT / 2).point
    if high is None:
        return Capacity(low.rate, race.runs, name, low, moves=race.moves)
    rate = min(high.rate, _between(low, high, low.attainment, high.attainment))
    return Capacity(rate, race.runs, name, low, high, race.moves)


def _between(low: Point, high: Point, at_low: float, at_high: float) -> float:
    """Where the attainment is what it should be, on a line through both; not far outside."""
    slope = max(0.3, (at_low - at_high) / math.log(high.rate / low.rate))
    return low.rate * math.exp(min(0.2, max(-0.2, (at_low - ATTAINMENT) / slope)))


def ratio_interval(
    one: Capacity, other: Capacity, seed: int, share: float = 0.9
) -> tuple[float, float] | None:
    """Of ``one.rate / other.rate``, by drawing blocks of requests anew, the same ones for both,
    for both saw the same arrivals. It knows of the chance in a run, not of
    who happened to be the best. None where there is no bracket to go by."""
    runs = (one.low, one.high, other.low, other.high)
    if any(point is None for point in runs):
        return None
    shares = [point.blocks for point in runs if point is not None]
    rng = random.Random(f"blocks {seed}")
    ratios = []
    for _ in range(_DRAWS):
        drawn = rng.choices(range(_BLOCKS), k=_BLOCKS)
        a, b, c, d = (
            min(sum(phase[block] for block in drawn) / _BLOCKS for phase in phases)
            for phases in shares
        )
        assert one.low and one.high and other.low and other.high
        ratios.append(_between(one.low, one.high, a, b) / _between(other.low, other.high, c, d))
    ratios.sort()
    tail = round((1.0 - share) / 2 * _DRAWS)
    return ratios[tail], ratios[-tail - 1]


def _block_shares(good: Sequence[bool]) -> tuple[float, ...]:
    edges = [len(good) * block // _BLOCKS for block in range(_BLOCKS + 1)]
    return tuple(
        sum(good[start:end]) / max(1, end - start) for start, end in itertools.pairwise(edges)
    )

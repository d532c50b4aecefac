"""The rate at which a share of the requests still meets both objectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .run import Fleet, Outcome, simulate
from .workload import Arrival

ATTAINMENT = 0.9
_STEP = 1.15  # from one rate to the next while the capacity is not bracketed
_FARTHEST = 1e6  # nothing finds the end of a load that costs nothing
_WIDTH = 1.012  # of the bracket in the end


@dataclass(frozen=True, slots=True)
class Capacity:
    """``rate`` in requests a second; 0 where not even one at a time meets the objectives."""

    rate: float
    outcome: Outcome | None
    runs: int


def survives(fleet: Fleet, load: Sequence[Arrival], seed: int = 0) -> bool:
    outcome = simulate(fleet, load, seed, give_up_below=ATTAINMENT)
    return not outcome.cut and outcome.attainment >= ATTAINMENT


def find(
    fleet: Fleet,
    load_at: Callable[[float], Sequence[Arrival]],
    guess: float,
    *,
    least: float,
    seed: int = 0,
) -> Capacity:
    """Brackets from ``guess`` and halves, in logarithms. ``load_at(rate)`` are the arrivals; below
    ``least`` it is not looked for."""
    runs = 0
    below: Outcome | None = None

    def passes(rate: float) -> bool:
        nonlocal runs, below
        runs += 1
        outcome = simulate(fleet, load_at(rate), seed, give_up_below=ATTAINMENT)
        good = not outcome.cut and outcome.attainment >= ATTAINMENT
        if good:
            below = outcome
        return good

    low = high = guess
    step = _STEP
    if passes(guess):
        while step < _FARTHEST and passes(high := low * step):
            low, step = high, step * step
    else:
        while high > least and not passes(low := high / step):
            high, step = low, step * step
        if below is None:
            return Capacity(0.0, None, runs)
    while high / low > _WIDTH:
        middle = math.sqrt(low * high)
        if passes(middle):
            low = middle
        else:
            high = middle
    return Capacity(low, below, runs)

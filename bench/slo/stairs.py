"""Capacity from staircases: one run holds one rate after the other, each judged by itself.

    levels    the rates that there are, given ahead, each held for so long; no drain between them
    climb     up from a rate that should be met, until one has been missed
    descend   one lower level at a time, where the first was missed already
    answer    between the highest level that met and the next, which missed: interpolated

For where time is dear. A bisection drains the server and ramps it up again for every rate; here
both happen once for a staircase. A level is short, so its share has Wilson's interval beside it.
Pure: points go in, the next levels come out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_FAR = 0.15  # who misses by so much goes down two levels at once


@dataclass(frozen=True, slots=True)
class Step:
    """One level of a run: seconds since its start. What is due before ``judged`` is its ramp."""

    rate: float
    start: float
    judged: float
    end: float

    @property
    def window(self) -> tuple[float, float]:
        return self.judged, self.end

    @property
    def length_s(self) -> float:
        return self.end - self.start


def steps(
    rates: Sequence[float], duration_s: float, warmup_s: float, min_requests: int
) -> tuple[Step, ...]:
    """Each as long as ``duration_s``, or until ``min_requests`` are to be expected."""
    made: list[Step] = []
    now = 0.0
    for rate in rates:
        length = max(duration_s, warmup_s + min_requests / rate)
        made.append(Step(rate, now, now + warmup_s, now + length))
        now += length
    return tuple(made)


@dataclass(frozen=True, slots=True)
class Ends:
    """The two levels between which the capacity lies. ``met`` None: none did so far; ``missed``
    None: none did. A level above a missed one counts for nothing."""

    met: float | None
    missed: float | None


def ends(points: Mapping[float, float], target: float) -> Ends:
    """``points``: attainment by rate."""
    missed = min((rate for rate, share in points.items() if share < target), default=None)
    below = (r for r, s in points.items() if s >= target and (missed is None or r < missed))
    return Ends(max(below, default=None), missed)


def following(
    points: Mapping[float, float], levels: Sequence[float], target: float, guess: float | None
) -> tuple[float, ...]:
    """The next levels to climb, ascending; stop at the first that is missed. Empty: all is
    known that these levels can tell. ``guess``: a level that should be met."""
    found = ends(points, target)
    rates = sorted(levels)
    if found.met is None and found.missed is None:
        start = max((rate for rate in rates if guess is not None and rate <= guess), default=None)
        return tuple(rate for rate in rates if start is None or rate >= start)
    if found.met is None:
        assert found.missed is not None
        lower = tuple(rate for rate in rates if rate < found.missed)
        far = points[found.missed] < target - _FAR
        return lower[-2:-1] if far and len(lower) > 1 else lower[-1:]
    return tuple(
        rate for rate in rates if found.met < rate and (found.missed is None or rate < found.missed)
    )


def between(points: Mapping[float, float], target: float) -> float | None:
    """The rate at which the line through the two ends (attainment over the rate's logarithm)
    passes the target. The highest level where none missed; None where none met."""
    found = ends(points, target)
    if found.met is None or found.missed is None:
        return found.met
    high, low = points[found.met], points[found.missed]
    part: float = (found.missed / found.met) ** ((high - target) / (high - low))
    return found.met * part


def slot(rate: float) -> int:
    """Of a level's own random numbers: all servers get the same at a rate, levels don't share."""
    return round(1000 * math.log2(rate) + 100_000)

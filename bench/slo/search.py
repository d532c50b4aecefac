"""The search for capacity: the highest rate at which enough requests meet both objectives.

    bracket   from a first guess by doubling or halving, until one rate meets and one misses
    bisect    in the middle (of logarithms), until the two lie within the tolerance

Pure: points go in, the next rate to try comes out. So it can go on from the runs that a folder
holds, and points that were measured for other objectives serve as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_STEP = 2.0
_CLOSE = 1.3  # the step while the guess is only being confirmed


@dataclass(frozen=True, slots=True)
class Settings:
    """Rates in 1/s; ``tolerance``: how far the two ends may lie apart, as a ratio less 1."""

    start: float
    target: float = 0.9
    tolerance: float = 0.05
    lowest: float = 0.1
    highest: float = 10_000.0
    min_requests: int = 30  # of a run: at a low rate it takes longer than it was to

    def duration_s(self, rate: float, duration_s: float, warmup_s: float) -> float:
        """How long a run at this rate lasts; a share of a handful of requests says nothing."""
        return max(duration_s, warmup_s + self.min_requests / rate)


@dataclass(frozen=True, slots=True)
class Capacity:
    """``met``: the highest rate that met, below every rate that missed; None: "not met", not
    even at the lowest rate tried. ``missed``: the lowest that missed, None: none did."""

    met: float | None
    missed: float | None
    finished: bool

    @property
    def words(self) -> str:
        if self.met is None:
            return "not met" if self.finished else "?"
        if not self.finished:
            return f">= {self.met:.3g}, unfinished"
        return f"{self.met:.3g}" if self.missed is not None else f">= {self.met:.3g}"


def bracket(points: Mapping[float, float], settings: Settings) -> Capacity:
    """``points``: attainment by rate. Noise may let a rate above a missed one meet: the lowest
    miss counts, and so the answer is the lower one."""
    misses = [rate for rate, share in points.items() if share < settings.target]
    missed = min(misses, default=None)
    meets = [
        rate
        for rate, share in points.items()
        if share >= settings.target and (missed is None or rate < missed)
    ]
    met = max(meets, default=None)
    if met is None:
        finished = missed is not None and missed <= settings.lowest * (1 + 1e-9)
    elif missed is None:
        finished = met >= settings.highest * (1 - 1e-9)
    else:
        finished = missed / met <= 1 + settings.tolerance
    return Capacity(met, missed, finished)


def next_rate(points: Mapping[float, float], settings: Settings) -> float | None:
    """The rate to try next, None where the search has ended."""
    found = bracket(points, settings)
    if found.finished:
        return None
    if found.met is None and found.missed is None:
        return min(max(settings.start, settings.lowest), settings.highest)
    if found.met is None:
        assert found.missed is not None
        return max(settings.lowest, found.missed / _step(points))
    if found.missed is None:
        return min(settings.highest, found.met * _step(points))
    return math.sqrt(found.met * found.missed)


def _step(points: Mapping[float, float]) -> float:
    """A good guess is close; one that was not is left in longer steps."""
    return _CLOSE if len(points) == 1 else _STEP


def search(measure: Callable[[float], float], settings: Settings) -> Capacity:
    """``measure(rate)`` is the attainment there."""
    points: dict[float, float] = {}
    while (rate := next_rate(points, settings)) is not None:
        points[rate] = measure(rate)
    return bracket(points, settings)

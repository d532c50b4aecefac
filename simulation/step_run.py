"""A number of steps of a virtual worker that are one event."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..prefill.phase import Chunk
from .virtual_batch import Stream


@dataclass(slots=True)
class StepRun:
    """It has begun at ``start`` (s); each step is ``slope_s`` longer than the one before. A step
    with ``chunks`` is a run of one. ``skipped`` streams sit it out."""

    start: float
    steps: int
    first_s: float
    slope_s: float
    chunks: list[Chunk]
    work_ms: float  # of the chunks
    skipped: tuple[Stream, ...] = ()
    version: int = 0  # counts how often its end has moved

    @property
    def end(self) -> float:
        return self.after(self.steps)

    def after(self, steps: int) -> float:
        """When so many of them are done."""
        return self.start + steps * self.first_s + self.slope_s * steps * (steps - 1) / 2

    def cut_short(self, now: float) -> bool:
        """It ends with the step that is on; False where it would have anyway."""
        if self.chunks or self.steps == 1 or self.end <= now:
            return False
        passed = now - self.start
        if self.slope_s > 0:
            half, whole = self.slope_s / 2, self.first_s - self.slope_s / 2
            steps = math.ceil((math.sqrt(whole * whole + 4 * half * passed) - whole) / (2 * half))
        else:
            steps = math.ceil(passed / self.first_s)
        steps = max(1, steps)
        while self.after(steps) < now:  # by rounding
            steps += 1
        if steps >= self.steps:
            return False
        self.steps = steps
        self.version += 1
        return True

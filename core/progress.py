"""How far a long piece of work is, for a person who waits for it.

A child of ``pdserve serve`` writes lines that the supervisor draws as bars; a process at a
terminal of its own keeps one line up to date; any other writes nothing.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from .clock import Clock, monotonic

SWITCH = "PDSERVE_PROGRESS"  # set in the environment of whoever is drawn by its parent
_MARK = "progress: "
_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Step:
    """``percent`` is None where nobody knows; 100 is the end."""

    what: str
    percent: int | None

    @property
    def line(self) -> str:
        return f"{_MARK}{'?' if self.percent is None else self.percent} {self.what}"

    @staticmethod
    def parse(line: str) -> Step | None:
        """None where the line is something else."""
        if not line.startswith(_MARK):
            return None
        percent, _, what = line.removeprefix(_MARK).partition(" ")
        if percent == "?":
            return Step(what, None)
        return Step(what, min(100, int(percent))) if percent.isdecimal() else None


class Progress:
    """``with Progress("loading", total) as progress: progress.advance(part)``."""

    def __init__(self, what: str, total: int | None = None, clock: Clock = monotonic) -> None:
        self._what = what
        self._total = total
        self._done = 0
        self._clock = clock
        self._last = -_EVERY_S

    def __enter__(self) -> Progress:
        self._say(Step(self._what, None if self._total is None else 0))
        return self

    def __exit__(self, *_: object) -> None:
        self._say(Step(self._what, 100))

    def advance(self, part: int) -> None:
        self._done += part
        now = self._clock()
        if self._total and now - self._last >= _EVERY_S:
            self._last = now
            self._say(Step(self._what, min(99, 100 * self._done // self._total)))

    def _say(self, step: Step) -> None:
        if SWITCH in os.environ:
            print(step.line, file=sys.stderr, flush=True)
        elif sys.stderr.isatty():
            over = step.percent == 100
            shown = "" if over or step.percent is None else f" {step.percent} %"
            text = "" if over else f"{step.what}{shown}"
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

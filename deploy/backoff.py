"""When to start a child again that has ended: exponential backoff, as a pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile


@dataclass(frozen=True, slots=True)
class Life:
    """One run of a child, in monotonic seconds."""

    started: float
    ended: float

    @property
    def length(self) -> float:
        return self.ended - self.started


@dataclass(frozen=True, slots=True)
class Restart:
    """Wait ``delay`` seconds; ``short_lives`` in a row lie behind (1 after a first death)."""

    delay: float
    short_lives: int


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """The delay doubles with each short life in a row; a life of ``healthy_s`` starts afresh.

    ``loop_lives`` short lives in a row are a crash loop: worth one loud sentence.
    """

    first_s: float = 0.5
    longest_s: float = 30.0
    healthy_s: float = 60.0
    loop_lives: int = 5

    def restart(self, now: float, lives: Sequence[Life]) -> Restart:
        """What to do at ``now`` after these lives, oldest first and at least one."""
        short = takewhile(lambda life: life.length < self.healthy_s, reversed(lives))
        count = sum(1 for _ in short)
        doublings = max(0, count - 1)
        wait = min(self.longest_s, self.first_s * 2.0 ** min(doublings, 32))
        return Restart(delay=max(0.0, lives[-1].ended + wait - now), short_lives=max(1, count))

    def is_loop(self, restart: Restart) -> bool:
        """True at the death that makes it a loop, and not at those after it."""
        return restart.short_lives == self.loop_lives

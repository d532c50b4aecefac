"""When to start a child again that has ended: exponential backoff, as a pure function.

A life *pays* where it was of use and was then told to end or killed by somebody else, or where
it was of use for ``healthy_s``. All others are short, and several of them in a row are a crash
loop, however long each start takes: what fails after minutes of loading costs more than what
fails at once. So kills from outside, at whatever rate, keep no worker down that comes up again;
but one that the kernel ends for its memory while it starts is in a loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile


@dataclass(frozen=True, slots=True)
class Life:
    """One run of a child, in monotonic seconds. ``up``: when it was of use, if it ever was."""

    started: float
    ended: float
    up: float | None = None
    from_outside: bool = False  # it was told to end, or killed

    def pays(self, healthy_s: float) -> bool:
        if self.up is None:
            return False
        return self.from_outside or self.ended - self.up >= healthy_s


@dataclass(frozen=True, slots=True)
class Restart:
    """Wait ``delay`` seconds; ``short_lives`` in a row lie behind."""

    delay: float
    short_lives: int


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """The delay doubles with each short life in a row; a life that pays starts afresh.

    ``loop_lives`` short lives in a row are a crash loop: worth one loud sentence.
    """

    first_s: float = 0.5
    longest_s: float = 300.0  # a start may cost many seconds of CPU
    healthy_s: float = 60.0
    loop_lives: int = 5

    def restart(self, now: float, lives: Sequence[Life]) -> Restart:
        """What to do at ``now`` after these lives, oldest first and at least one."""
        short = takewhile(lambda life: not life.pays(self.healthy_s), reversed(lives))
        count = sum(1 for _ in short)
        doublings = max(0, count - 1)
        wait = min(self.longest_s, self.first_s * 2.0 ** min(doublings, 32))
        return Restart(delay=max(0.0, lives[-1].ended + wait - now), short_lives=count)

    def is_loop(self, restart: Restart) -> bool:
        """True at the death that makes it a loop, and not at those after it."""
        return restart.short_lives == self.loop_lives

"""Messages that are lost, doubled, held back or overtaken on purpose, by a seeded plan.

Pure: messages and the time go in, what goes on now comes out. Each end disturbs what comes
in to it (and what goes out, where nobody else could), so that a message is lost after all
that its sender had to do for it. The seed fixes the draws; which message meets which draw is
up to the traffic.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator
from enum import StrEnum
from typing import Generic, TypeVar

from .config import DisturbanceSection

Item = TypeVar("Item")

MAX_HELD = 4096  # messages; more are lost, as in a full queue


class Fate(StrEnum):
    DROPPED = "dropped"
    DOUBLED = "doubled"
    DELAYED = "delayed"
    DAMAGED = "damaged"


class Disturbance(Generic[Item]):
    """One direction of one link.

    With ``in_order`` nothing overtakes what is held back, as within one connection; without,
    everything may. Half of the copies of a doubled message come behind it, half late.
    """

    def __init__(
        self, rates: DisturbanceSection, rng: random.Random, *, in_order: bool = False
    ) -> None:
        self._rates = rates
        self._rng = rng
        self._in_order = in_order
        self._held: list[tuple[float, int, Item]] = []  # a heap; the number keeps the order
        self._numbers = itertools.count()
        self._latest = 0.0  # when the last one that is held is let go
        self._idle = not (rates.drop or rates.duplicate or rates.delay)  # no draws, no cost
        self.fates: Counter[Fate] = Counter()

    def take(self, item: Item, now: float) -> list[Item]:
        """What of this message goes on at once: it, twice it, or nothing (by now)."""
        if self._idle:
            return [item]
        if self._falls(self._rates.drop):
            self.fates[Fate.DROPPED] += 1
            return []
        doubled = self._falls(self._rates.duplicate)
        self.fates[Fate.DOUBLED] += doubled
        first = self._hold(item, self._wait(), now)
        if not doubled:
            return first
        wait = self._rng.uniform(0.0, self._longest) if self._rng.random() < 0.5 else 0.0
        return first + self._hold(item, wait, now)

    def due(self, now: float) -> list[Item]:
        """What has been held back long enough."""
        return list(self._let_go(now))

    @property
    def next_due(self) -> float:
        """When something is; infinity where nothing is held back."""
        return self._held[0][0] if self._held else math.inf

    def __str__(self) -> str:
        return ", ".join(f"{self.fates[fate]} {fate}" for fate in Fate)

    def _let_go(self, now: float) -> Iterator[Item]:
        while self._held and self._held[0][0] <= now:
            yield heapq.heappop(self._held)[2]

    def _hold(self, item: Item, wait: float, now: float) -> list[Item]:
        until = now + wait
        if self._in_order and self._held:
            until = max(until, self._latest)
        if until <= now:
            return [item]
        if len(self._held) >= MAX_HELD:
            self.fates[Fate.DROPPED] += 1
            return []
        self._latest = max(self._latest, until)
        heapq.heappush(self._held, (until, next(self._numbers), item))
        return []

    def _wait(self) -> float:
        if not self._falls(self._rates.delay):
            return 0.0
        self.fates[Fate.DELAYED] += 1
        return self._rng.uniform(0.0, self._longest)

    @property
    def _longest(self) -> float:
        return self._rates.delay_ms / 1e3

    def _falls(self, share: float) -> bool:
        return share > 0.0 and self._rng.random() < share

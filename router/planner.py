"""Which workers should change their role. Pure: loads and the time in, moves out.

The two phases ask for so many workers' worth of time: prefill as much as the prompts that came
in take, decode as much as the batches fill of what their objectives allow. A worker in the role
``mixed`` does both, whichever is asked for, and loses a part of its time to that. How busy a
division of the fleet is, its busiest part says: those who can prefill, those who can decode,
or all of them together.

A move is made only where that is busy and gets less so by a good part, has been so for a while,
and the last move has had time to show: a load that swings faster than that is the placement's
affair, not a role's. Out of ``mixed`` it is enough that nothing gets worse: a phase apart has the
shorter tails. So what leads into that role and what leads out of it are never right at once.

In a large fleet one worker at a time would take minutes where its first division was wrong: up
to an eighth of the workers move at once, from one role to another, as many as serve best.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from ..core.ids import Role
from .forecast import FULL, MARGIN
from .roles import Holder, Move
from .snapshot import Snapshot

GAIN = 0.85  # the busiest part must come down to so much of what it is
FINE_GAIN = 0.95  # in a fleet of which several may move: its load swings less
BUSY = 0.6  # below that nobody needs to be moved
SETTLED_S = 5.0  # for so long in a row
COOL_S = 15.0  # from one move to the next
SHARE = 8  # of so many workers one at a time; of fewer as well
MIXED = 0.9  # of its time a mixed worker has for the phases: a step with both pays for both
_MEMORY_S = 5.0  # of the loads

Change = tuple[Role, Role]  # before, after


@dataclass(frozen=True, slots=True)
class Demand:
    """In workers: 1.0 keeps one busy all the time."""

    prefill: float
    decode: float

    def busiest(self, division: Mapping[Role, int]) -> float:
        """How busy the busiest part of it would be; infinite where a phase has nobody."""
        mixed = MIXED * division.get(Role.MIXED, 0)
        prefill = division.get(Role.PREFILL, 0) + mixed
        decode = division.get(Role.DECODE, 0) + mixed
        if not prefill or not decode:
            return math.inf
        together = (self.prefill + self.decode) / (prefill + decode - mixed)
        return max(self.prefill / prefill, self.decode / decode, together)


def decode_demand(snapshot: Snapshot) -> float:
    """How much of what the objectives, places and memory allow all batches fill, in workers."""
    if not snapshot.measured:
        return 0.0
    c = snapshot.columns
    step = c.decode_base + c.per_sequence * c.batch + c.per_kv * c.kv
    full = step / (MARGIN * c.tpot_ms)  # 0 where nothing decodes: nothing is asked of a step
    # no place or no memory left: full as well, however far off the objective is
    taken = (c.batch >= c.max_batch) | (c.kv >= FULL * c.capacity)
    full = np.where(taken, np.maximum(full, 1.0), full)
    return float(((c.batch > 0) * full).sum())


class Planner:
    def __init__(self) -> None:
        self._demand = Demand(0.0, 0.0)
        self._looked: float | None = None
        self._since: float | None = None  # the same change has been the better one
        self._moved: float | None = None
        self._change: Change | None = None

    def look(
        self, now: float, prefill_ms: float, decode: float, workers: Iterable[Holder]
    ) -> Sequence[Move]:
        """``prefill_ms``: of the prompts placed since the last look; ``decode`` as of now. All
        moves are of one kind."""
        holders = list(workers)
        before, self._looked = self._looked, now
        if before is None or now <= before:
            return ()
        self._smooth(prefill_ms / 1e3 / (now - before), decode, now - before)
        change, count = self._better(Counter(one.role for one in holders))
        if change != self._change:
            self._change, self._since = change, now
        cooling = self._moved is not None and now < self._moved + COOL_S
        if change is None or cooling or self._since is None or now < self._since + SETTLED_S:
            return ()
        self._moved, self._since = now, now
        source, target = change
        free = [one for one in holders if one.role is source]
        # back to where they were started, else the least busy ones
        free.sort(key=lambda w: (w.native is not target, w.num_requests, w.worker_id))
        return [Move(one.worker_id, source, target) for one in free[:count]]

    def _smooth(self, prefill: float, decode: float, seconds: float) -> None:
        keep = max(0.0, 1.0 - seconds / _MEMORY_S)
        self._demand = Demand(
            self._demand.prefill * keep + prefill * (1.0 - keep),
            self._demand.decode * keep + decode * (1.0 - keep),
        )

    def _better(self, division: Counter[Role]) -> tuple[Change | None, int]:
        """From which role to which workers should go, if any, and how many."""
        now = self._demand.busiest(division)
        best, change, count = math.inf, None, 0
        if now < BUSY:
            return None, 0
        most = max(1, division.total() // SHARE)
        gain = GAIN if most == 1 else FINE_GAIN
        for (source, there), target in product(division.items(), Role):
            if target is source:
                continue
            enough = now if source is Role.MIXED else gain * now
            for number in range(1, min(most, there) + 1):
                moved = Counter({source: there - number, target: division[target] + number})
                after = self._demand.busiest({**division, **moved})
                if after <= enough and after < best:
                    best, change, count = after, (source, target), number
        return change, count

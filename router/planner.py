"""Which worker should change its role. Pure: loads and the time in, at most one move out.

The two phases ask for so many workers' worth of time: prefill as much as the prompts that came
in take, decode as much as the batches fill of what their objectives allow. The better division
is the one whose busier pool is the less busy. A move is made only where that is so by a
good part, has been so for a while, and the last move has had time to show: a load that swings
faster than that is the placement's affair, not a role's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..core.ids import Role
from .forecast import MARGIN
from .roles import Holder, Move
from .snapshot import Snapshot

GAIN = 0.85  # the busier pool must come down to so much of what it is
SETTLED_S = 5.0  # for so long in a row
COOL_S = 15.0  # from one move to the next
_MEMORY_S = 5.0  # of the loads


@dataclass(frozen=True, slots=True)
class Demand:
    """In workers: 1.0 keeps one busy all the time."""

    prefill: float
    decode: float

    def busiest(self, prefill: int, decode: int) -> float:
        """How busy the busier of two such pools would be."""
        return max(self.prefill / prefill, self.decode / decode)


def decode_demand(snapshot: Snapshot) -> float:
    """How much of what the objectives allow all batches fill, in workers."""
    if not snapshot.measured:
        return 0.0
    c = snapshot.columns
    step = c.decode_base + c.per_sequence * c.batch + c.per_kv * c.kv
    full = step / (MARGIN * c.tpot_ms)  # 0 where nothing decodes: nothing is asked of a step
    return float(((c.batch > 0) * full).sum())


class Planner:
    def __init__(self) -> None:
        self._demand = Demand(0.0, 0.0)
        self._looked: float | None = None
        self._since: float | None = None  # the same change has been the better one
        self._moved: float | None = None
        self._change = 0

    @property
    def demand(self) -> Demand:
        return self._demand

    def look(
        self, now: float, prefill_ms: float, decode: float, workers: Iterable[Holder]
    ) -> Move | None:
        """``prefill_ms``: of the prompts placed since the last look; ``decode`` as of now. Workers
        in the role ``mixed`` do both, and stay."""
        holders = list(workers)
        before, self._looked = self._looked, now
        if before is None or now <= before:
            return None
        self._smooth(prefill_ms / 1e3 / (now - before), decode, now - before)
        num_prefill = sum(one.role is Role.PREFILL for one in holders)
        num_decode = sum(one.role is Role.DECODE for one in holders)
        change = self._better(num_prefill, num_decode)
        if change != self._change:
            self._change, self._since = change, now
        cooling = self._moved is not None and now < self._moved + COOL_S
        if change == 0 or cooling or self._since is None or now < self._since + SETTLED_S:
            return None
        self._moved, self._since = now, now
        source, target = Role.DECODE, Role.PREFILL
        if change < 0:
            source, target = target, source
        free = [one for one in holders if one.role is source]
        # back to where it was started, else the least busy one
        one = min(free, key=lambda w: (w.native is not target, w.num_requests, w.worker_id))
        return Move(one.worker_id, source, target)

    def _smooth(self, prefill: float, decode: float, seconds: float) -> None:
        keep = max(0.0, 1.0 - seconds / _MEMORY_S)
        self._demand = Demand(
            self._demand.prefill * keep + prefill * (1.0 - keep),
            self._demand.decode * keep + decode * (1.0 - keep),
        )

    def _better(self, prefill: int, decode: int) -> int:
        """1 for one more to prefill, -1 for one fewer, 0 to leave them."""
        if not prefill or not decode:
            return 0
        best, change = GAIN * self._demand.busiest(prefill, decode), 0
        for step in (1, -1):
            if prefill + step >= 1 and decode - step >= 1:
                busiest = self._demand.busiest(prefill + step, decode - step)
                if busiest < best:
                    best, change = busiest, step
        return change

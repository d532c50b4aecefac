"""What each worker has been given and has not done yet: kept as it changes, for the policy.

How far a prompt has come its worker does not say, only when it leaves the queue and when it is
done. A step that ends one prompt goes on with the next. So what has been computed since
the one before was done, at the pace of late, and was not of this one, is taken to be of those
that have left the queue as well.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from dataclasses import dataclass, field

from ..core.ids import WorkerRef
from .reading import Asked
from .snapshot import Placement

_KEEP = 0.95  # of the pace of prompts, from one to the next
_PRIOR_MS = 100.0
_PRIOR_PACE = 0.8
_LATER = 0.002  # by how much one prompt moves what is thought of the next: more would swing
_LATEST = 1.5  # and it is never thought to be further off


@dataclass(slots=True)
class Load:
    """As in ``WorkerView``. ``tpots`` counts the requests of each objective."""

    prefill_tokens: int = 0
    kv_tokens: int = 0
    num_requests: int = 0
    prefill_ms: float = 0.0
    head_ms: float = 0.0
    head_since: float = 0.0
    num_heads: int = 0
    batch: int = 0
    kv_growth: float = 0.0
    pace: float = _PRIOR_PACE
    late: float = 1.0
    late_at: float = 0.0
    tpots: Counter[float] = field(default_factory=Counter)

    @property
    def tpot_ms(self) -> float:
        """The tightest objective of those that decode here."""
        return min(self.tpots, default=math.inf)


@dataclass(slots=True)
class _Charge:
    """What one placed request adds to the loads of its workers."""

    placement: Placement
    prefill_tokens: int
    kv_tokens: int
    prefill_ms: float
    growth: float
    tpot_ms: float
    work_ms: float  # what the prompt takes, whether or not anybody waits for it
    due: float  # when (s) its first token should come
    expected: float  # ``growth`` as it was at first
    head: bool = False


@dataclass(slots=True)
class _Pace:
    """Of a worker's prompts: ms of chunks in a ms, of late; and how many times as long as forecast
    the median of them takes."""

    since: float = 0.0  # when the last one was done, or the first one of a row began
    work_ms: float = _PRIOR_MS * _PRIOR_PACE
    time_ms: float = _PRIOR_MS
    late: float = 1.0
    late_at: float = 0.0

    @property
    def rate(self) -> float:
        return self.work_ms / self.time_ms

    def done(self, work_ms: float, now: float) -> None:
        self.work_ms = self.work_ms * _KEEP + work_ms
        self.time_ms = self.time_ms * _KEEP + (now - self.since) * 1e3
        self.since = now

    def came(self, due: float, now: float) -> None:
        """Where as many come later than this as come sooner, it is the median."""
        step = 1.0 + _LATER if now > due else 1.0 / (1.0 + _LATER)
        self.late = min(_LATEST, max(1.0 / _LATEST, self.late * step))
        self.late_at = now


class Loads:
    def __init__(self) -> None:
        self._loads: dict[WorkerRef, Load] = {}
        self._paces: dict[WorkerRef, _Pace] = {}
        self._charges: dict[str, _Charge] = {}
        self._due: list[tuple[float, int, _Charge]] = []  # a heap; the number settles a tie
        self._count = 0
        self.asked = Asked()

    def __getitem__(self, worker: WorkerRef) -> Load:
        return self._loads.get(worker) or Load()

    def placed(
        self,
        request_id: str,
        placement: Placement,
        num_tokens: int,
        growth: float = 0.0,
        tpot_ms: float = math.inf,
        deadline: float = math.inf,
        arrived: float = 0.0,
    ) -> None:
        """``growth``: the tokens that its answer is expected to hold on average while it runs: it
        counts for so many from the first to twice that many, as those after it will;
        ``deadline``: when (s) its first token is due; ``arrived``: since when (s) it waits."""
        assert request_id not in self._charges
        forecast = placement.forecast
        work_ms = forecast.work_ms if forecast is not None else 0.0
        due = arrived + forecast.ttft_ms / 1e3 if forecast is not None else math.inf
        charge = _Charge(
            placement, num_tokens, num_tokens, work_ms, growth, tpot_ms, work_ms, due, growth
        )
        self._charges[request_id] = charge
        if deadline < math.inf and work_ms > 0:
            self._count += 1
            heapq.heappush(self._due, (deadline - work_ms / 1e3, self._count, charge))
        prefill, decode = self._of(placement.prefill), self._of(placement.decode)
        prefill.prefill_tokens += num_tokens
        prefill.prefill_ms += work_ms
        decode.kv_tokens += num_tokens
        decode.kv_growth += growth
        decode.batch += 1
        decode.tpots[tpot_ms] += 1
        for worker in placement.workers:
            self._of(worker).num_requests += 1

    def started(self, request_id: str, now: float) -> None:
        """The prompt has left its queue: from now on what is left of it gets less."""
        charge = self._charges.get(request_id)
        if charge is not None and charge.prefill_tokens and not charge.head:
            worker = charge.placement.prefill
            load = self._of(worker)
            if not load.num_heads:
                load.head_since = now
                self._pace(worker).since = now
            charge.head = True
            load.num_heads += 1
            load.head_ms += charge.prefill_ms

    def demote(self, now: float) -> set[WorkerRef]:
        """Prompts that can't make their deadline any more step behind all others: nobody waits
        for them now. Returns the workers for which that has changed anything."""
        changed = set()
        while self._due and self._due[0][0] < now:
            _, _, charge = heapq.heappop(self._due)
            if charge.prefill_ms and not charge.head:
                load = self._of(charge.placement.prefill)
                load.prefill_ms = max(0.0, load.prefill_ms - charge.prefill_ms)
                charge.prefill_ms = 0.0
                changed.add(charge.placement.prefill)
        return changed

    def token(self, request_id: str, now: float, count: int = 1) -> None:
        """The prompt is computed with the first token; each one grows the sequence."""
        charge = self._charges[request_id]
        decode = self._of(charge.placement.decode)
        if charge.prefill_tokens:
            self._came(charge, now)
            self._computed(charge, now)
            self._prefilled(charge)
        grown = min(charge.growth + charge.expected, count)
        decode.kv_tokens += count
        decode.kv_growth -= grown
        charge.kv_tokens += count
        charge.growth -= grown

    def left(self, request_id: str) -> None:
        """The request is on no worker any more."""
        charge = self._charges.pop(request_id, None)
        if charge is None:
            return
        self._prefilled(charge)
        decode = self._of(charge.placement.decode)
        decode.kv_tokens -= charge.kv_tokens
        decode.kv_growth -= charge.growth
        decode.batch -= 1
        decode.tpots[charge.tpot_ms] -= 1
        if not decode.tpots[charge.tpot_ms]:
            del decode.tpots[charge.tpot_ms]
        for worker in charge.placement.workers:
            load = self._of(worker)
            load.num_requests -= 1
            if not load.num_requests:
                assert load.prefill_tokens == load.kv_tokens == load.batch == 0
                del self._loads[worker]

    def _came(self, charge: _Charge, now: float) -> None:
        """How late first tokens are here, that the next ones are forecast so."""
        worker = charge.placement.prefill
        if charge.due < math.inf:
            load, pace = self._of(worker), self._pace(worker)
            pace.came(charge.due, now)
            load.late, load.late_at = pace.late, pace.late_at

    def _computed(self, charge: _Charge, now: float) -> None:
        """What was done beside it is the others' who have left the queue."""
        worker = charge.placement.prefill
        if not charge.head or charge.work_ms <= 0:
            return
        load, pace = self._of(worker), self._pace(worker)
        pace.done(charge.work_ms, now)
        load.pace = pace.rate
        others_ms = load.head_ms - charge.prefill_ms
        beside_ms = (now - load.head_since) * 1e3 * pace.rate - charge.work_ms
        load.head_since = now - max(0.0, min(beside_ms, others_ms)) / 1e3 / pace.rate

    def gone(self, worker: WorkerRef) -> None:
        """That life of a worker is over, and never comes back."""
        self._paces.pop(worker, None)

    def _prefilled(self, charge: _Charge) -> None:
        load = self._of(charge.placement.prefill)
        load.prefill_tokens -= charge.prefill_tokens
        load.prefill_ms = max(0.0, load.prefill_ms - charge.prefill_ms)
        if not load.prefill_tokens:
            load.prefill_ms = 0.0  # and not what rounding has left
        if charge.head:
            load.num_heads -= 1
            load.head_ms = max(0.0, load.head_ms - charge.prefill_ms) if load.num_heads else 0.0
        charge.prefill_tokens, charge.prefill_ms, charge.head = 0, 0.0, False

    def _pace(self, worker: WorkerRef) -> _Pace:
        pace = self._paces.get(worker)
        if pace is None:
            pace = self._paces[worker] = _Pace()
        return pace

    def _of(self, worker: WorkerRef) -> Load:
        load = self._loads.get(worker)
        if load is None:
            pace = self._paces.get(worker)
            load = self._loads[worker] = Load()
            if pace is not None:
                load.pace, load.late, load.late_at = pace.rate, pace.late, pace.late_at
        return load

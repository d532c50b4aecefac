"""One run: a fleet, a load, virtual time from the first arrival to the last token."""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ..core.config import Admission, Policy
from ..core.ids import Role, WorkerRef
from .served import Served
from .virtual_router import VirtualRouter
from .virtual_worker import Usage, VirtualWorker
from .worker_spec import WorkerSpec
from .workload import NOT_JUDGED, Arrival


@dataclass(frozen=True, slots=True)
class Fleet:
    """What is compared: who the workers are and by which policy they are used."""

    name: str
    roles: tuple[Role, ...]
    policy: Policy
    admission: Admission
    spec: WorkerSpec
    prefix_aware: bool = True
    planned: bool = False  # the planner moves workers between roles
    forecasts: bool = True  # False where nobody needs any: they are half of a decision's time


@dataclass(frozen=True, slots=True)
class Outcome:
    """``served`` are those that are judged. ``attainment``: the share of them that met both
    objectives, in the worst phase of the load. ``cut``: the run was given up because too many had
    missed already."""

    served: tuple[Served, ...]
    attainment: float
    usage: tuple[Usage, ...]
    span_s: float  # from the first arrival that counts to the last
    end_s: float  # when the last request was over
    cut: bool = False
    moves: int = 0  # of workers between roles

    @property
    def goodput(self) -> float:
        """Requests a second that met both objectives."""
        return sum(one.good for one in self.served) / self.span_s if self.span_s else 0.0


@dataclass(slots=True)
class _Events:
    """What will happen, in the order of time; of one moment, in the order of asking."""

    heap: list[tuple[float, int, Callable[[float], None]]] = field(default_factory=list)
    count: int = 0

    def at(self, time: float, call: Callable[[float], None]) -> None:
        self.count += 1
        heapq.heappush(self.heap, (time, self.count, call))


def simulate(
    fleet: Fleet, load: Sequence[Arrival], seed: int = 0, *, give_up_below: float = 0.0
) -> Outcome:
    """``give_up_below``: ends as soon as the attainment can't reach that any more."""
    events = _Events()
    router = VirtualRouter(
        fleet.policy,
        fleet.admission,
        prefix_aware=fleet.prefix_aware,
        forecasts=fleet.forecasts,
    )
    rng = random.Random(f"steps {seed}")
    workers = [
        VirtualWorker(WorkerRef(f"{role}-{i}", 1), role, replace(fleet.spec), events, router, rng)
        for i, role in enumerate(fleet.roles)
    ]
    router.join(workers)
    if fleet.planned:
        for second in range(1, int(load[-1].time)):
            events.at(float(second), router.plan)
    judged = Counter(arrival.phase for arrival in load)
    may_miss = {phase: (1.0 - give_up_below) * count for phase, count in judged.items()}
    may_miss[NOT_JUDGED] = math.inf
    now, position, cut = 0.0, 0, False
    heap = events.heap
    while position < len(load) or heap:
        if position < len(load) and (not heap or load[position].time <= heap[0][0]):
            arrival = load[position]
            now = arrival.time
            router.arrive(arrival, now)
            position += 1
        else:
            now, _, call = heapq.heappop(heap)
            call(now)
        phase = router.missed_last
        if give_up_below and router.missed[phase] > may_miss[phase]:
            cut = True
            break
    if not cut:
        unfinished = [one for one in router.served if not one.over]
        assert not unfinished, f"{len(unfinished)} requests never ended"
        for worker in workers:
            worker.check()
    measured = tuple(one for one in router.served if one.arrival.phase != NOT_JUDGED)
    good = Counter(one.arrival.phase for one in measured if one.good)
    shares = [good[phase] / judged[phase] for phase in judged if phase != NOT_JUDGED]
    span = measured[-1].arrival.time - measured[0].arrival.time if measured else 0.0
    return Outcome(
        measured,
        min(shares, default=0.0),
        tuple(worker.usage for worker in workers),
        span,
        now,
        cut,
        router.moves,
    )
